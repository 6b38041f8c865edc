"""Adapters of tiny models in several pieces, as large ones are sent."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

from jaxlora.adapters.bank import AdapterBank
from jaxlora.engine import build_adapters

PIECE_BYTES = 4000


def in_small_pieces() -> Any:
    """While an engine is made in it: to each device its adapters, and the matrices that they bring,
    come in several pieces, not all of one size."""
    bank = functools.partial(AdapterBank, piece_bytes=PIECE_BYTES)
    return mock.patch.object(build_adapters, "AdapterBank", bank)
