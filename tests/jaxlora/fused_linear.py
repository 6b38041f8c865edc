"""A stand-in on any device for the Hopper kernels of a step's linears."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from jaxlora.models.layers import matmul
from kernels_pallas.lora_linear.op import Implementation, check, ending
from kernels_pallas.lora_matmul import reference
from kernels_pallas.lora_matmul.op import LoraBatch


class Call(NamedTuple):
    """What a linear asked for when its step was traced."""

    tokens: int
    d_in: int
    splits: tuple[int, ...]
    with_lora: bool
    ending: str
    """"residual", "gated" or nothing."""


@contextlib.contextmanager
def chosen(
    *sizes: int, prompt_tokens: int | None = None, lora_prompt_tokens: int | None = None
) -> Iterator[set[Call]]:
    """Engines that are started meanwhile run decode steps of these sizes through the op's formula,
    but for steps of one row without adapters, and all steps of ``prompt_tokens`` or more, or of
    ``lora_prompt_tokens`` if those with adapters have a limit of their own. They tell here what
    their linears ask of it."""
    lora_prompt_tokens = lora_prompt_tokens or prompt_tokens
    calls: set[Call] = set()
    base_sizes = tuple(size for size in sizes if size > 1)

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
        shared: Any,
        early: bool,
    ) -> jax.Array:
        assert early
        check(x, weight, splits, a, b, batch, residual, gated=gated)
        tokens = x.shape[0]
        least = prompt_tokens if batch is None else lora_prompt_tokens
        of_prompts = least is not None and tokens >= least
        assert of_prompts or tokens in (base_sizes if batch is None else sizes)
        assert (shared is None) == (batch is None)
        how = "gated" if gated else "" if residual is None else "residual"
        calls.add(Call(x.shape[0], x.shape[1], splits, batch is not None, how))
        z = matmul(x, weight)
        if a is not None and b is not None and batch is not None:
            # The kernel contracts ranks by sixteen, and relies on zeros above the true rank.
            batch = dataclasses.replace(batch, ranks=-(-batch.ranks // 16) * 16)
            z = reference.lora_matmul(z, x, a, b, batch, splits=splits)
            # Whatever a call leaves behind, the next one has in its result.
            z = z + shared[0].astype(z.dtype)
            shared[0] += 1
            shared[0] -= 1
        return ending(z, residual, gated=gated)

    implementation = Implementation(
        name="stand-in",
        function=lora_linear,
        sizes=sizes,
        base_sizes=base_sizes,
        prompt_tokens=prompt_tokens,
        lora_prompt_tokens=lora_prompt_tokens,
        share=lambda _: jax.new_ref(jnp.zeros(1, jnp.int32)),
    )
    with mock.patch(
        "jaxlora.engine.build.choose_lora_linear", return_value=(implementation, "cpu: a test")
    ):
        yield calls
