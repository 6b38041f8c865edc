"""PEFT's adapter_config.json and tensors, turned into an Adapter or refused by name."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from jaxlora.adapters.adapter import Adapter
from jaxlora.config import ModelConfig


def load_adapter(
    name: str,
    path: str | os.PathLike[str],
    model: ModelConfig,
    *,
    max_rank: int,
    target_modules: Collection[str] | None = None,
) -> Adapter:
    """Reads a PEFT folder."""
    raise NotImplementedError


def adapter_from_tensors(
    name: str,
    tensors: Mapping[str, np.ndarray[Any, np.dtype[Any]] | jax.Array],
    config: Mapping[str, Any],
    model: ModelConfig,
    *,
    max_rank: int,
    target_modules: Collection[str] | None = None,
) -> Adapter:
    """Builds an adapter from tensors in memory under PEFT's names."""
    raise NotImplementedError
