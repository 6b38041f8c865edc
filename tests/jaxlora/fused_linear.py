"""A stand-in on any device for the Hopper kernel of a decode step's linears."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import jax

from jaxlora.models.layers import matmul
from kernels_pallas.lora_linear.op import Implementation, check, ending
from kernels_pallas.lora_matmul import reference
from kernels_pallas.lora_matmul.op import LoraBatch


class Call(NamedTuple):
    """What a linear asked for when its step was traced."""

    d_in: int
    splits: tuple[int, ...]
    with_lora: bool
    ending: str
    """"residual", "gated" or nothing."""


@contextlib.contextmanager
def chosen(*sizes: int) -> Iterator[set[Call]]:
    """Engines that are started meanwhile run decode steps of these sizes through the op's formula,
    and tell here what their linears ask of it."""
    calls: set[Call] = set()

    def lora_linear(
        x: jax.Array,
        weight: jax.Array,
        *,
        splits: tuple[int, ...],
        a: jax.Array | None,
        b: jax.Array | None,
        batch: LoraBatch | None,
        residual: jax.Array | None,
        gated: bool,
    ) -> jax.Array:
        check(x, weight, splits, a, b, batch, residual, gated=gated)
        assert x.shape[0] in sizes
        how = "gated" if gated else "" if residual is None else "residual"
        calls.add(Call(x.shape[1], splits, batch is not None, how))
        z = matmul(x, weight)
        if a is not None and b is not None and batch is not None:
            # The kernel contracts ranks by sixteen, and relies on zeros above the true rank.
            batch = dataclasses.replace(batch, ranks=-(-batch.ranks // 16) * 16)
            z = reference.lora_matmul(z, x, a, b, batch, splits=splits)
        return ending(z, residual, gated=gated)

    implementation = Implementation(name="stand-in", function=lora_linear, sizes=sizes)
    with mock.patch(
        "jaxlora.engine.build.choose_lora_linear", return_value=(implementation, "cpu: a test")
    ):
        yield calls
