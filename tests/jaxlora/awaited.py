"""Tests that are coroutines."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import ParamSpec

_P = ParamSpec("_P")


def awaited(test: Callable[_P, Coroutine[None, None, None]]) -> Callable[_P, None]:
    """The test as pytest calls it, on an event loop of its own; it has ten minutes, because the
    machine may be busy."""

    @functools.wraps(test)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 600))

    return call
