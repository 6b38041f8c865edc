"""The op of a whole linear with its adapters, and of what follows it.

With ``z = x W^T`` and, for token ``t`` of slot ``s`` and member ``m`` of the group (as in
:mod:`kernels_pallas.lora_matmul.op`)::

    z[t, cols(m)] += (x[t] @ a[s, rows(m)].T) @ b[s, :, cols(m)]

the result is ``z``, or ``residual + z``, or, gated, ``silu(z[:, :half]) * z[:, half:]``.

As in that op, slots no block names are never read. Of a slot's ``a`` and ``b`` the rows from the
true rank up to the next multiple of 16 must be zero, those beyond are never read.

Shape letters: T tokens (padded), S slots, M members of the group, r the bank's rank capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul.op import LoraBatch


class EarlyKernels(NamedTuple):
    """What a program needs whose kernels begin before the ones in front of them have ended."""

    norm: Callable[..., jax.Array]
    """``(x, weight, *, eps) -> y``, RMSNorm of each row, which lets the linear that reads it
    begin."""
    options: Mapping[str, str]
    """Of XLA, for the program."""


class Implementation(NamedTuple):
    """One way to compute the op."""

    name: str
    function: Callable[..., jax.Array]
    """``(x, weight, *, splits, a, b, batch, residual, gated, shared, early) -> y``, as
    :func:`check` has them; ``shared`` is what ``share`` made, and None without adapters. ``early``
    promises that the device may read the weight and the batch, though not x, before it has ended
    what it was given last: that writes neither of them."""
    sizes: tuple[int, ...]
    """The (padded) numbers of tokens it serves in small steps, ascending."""
    base_sizes: tuple[int, ...]
    """Those of them at which it also serves linears without adapters."""
    prompt_tokens: int | None
    """From so many (padded) tokens on it serves steps of any multiple of 8, without adapters; None
    for an implementation that serves small steps only."""
    lora_prompt_tokens: int | None
    """The same of linears with adapters."""
    share: Callable[[LoraBatch], Any]
    """Makes what the calls of a program with adapters share."""
    early: EarlyKernels | None = None
    """For programs of decode steps all of whose linears it runs; None if nothing is gained."""

    def serves(self, tokens: int, *, num_slots: int) -> bool:
        """Whether a linear of a step of so many (padded) tokens should run in it; ``num_slots`` are
        those of the bank, 0 where the linear has no adapters."""
        least = self.lora_prompt_tokens if num_slots else self.prompt_tokens
        if least is not None and tokens >= least and tokens % 8 == 0:
            return True
        return tokens in (self.sizes if num_slots else self.base_sizes)


def ending(
    z: Float[Array, "T d_out"], residual: Float[Array, "T d_out"] | None = None, *, gated: bool
) -> Float[Array, "T columns"]:
    """What follows the linear, where no kernel does it along with that: the gate, or adding
    ``residual``, or nothing."""
    if gated:
        gate, up = jnp.split(z, 2, axis=1)
        return jax.nn.silu(gate) * up
    return z if residual is None else residual + z


def check(
    x: Float[Array, "T d_in"],
    weight: Float[Array, "d_out d_in"],
    splits: tuple[int, ...],
    a: Float[Array, "LS Mr d_in"] | None,
    b: Float[Array, "LS r d_out"] | None,
    batch: LoraBatch | None,
    residual: Float[Array, "T d_out"] | None,
    *,
    gated: bool,
) -> int:
    """Raises ValueError unless the shapes and dtypes fit together; returns the rank capacity r, 0
    without adapters. ``splits`` are the widths of the group's members, in column order."""
    if sum(splits) != weight.shape[0]:
        raise ValueError(f"splits {splits} must cover weight's {weight.shape[0]} rows")
    if gated and (len(splits) != 2 or splits[0] != splits[1] or residual is not None):
        raise ValueError(f"a gate needs two members of equal width and no residual, not {splits}")
    if residual is not None and residual.shape != (x.shape[0], weight.shape[0]):
        raise ValueError(f"residual {residual.shape} must be [tokens, d_out]")
    arrays = [array for array in (x, weight, a, b, residual) if array is not None]
    if len({array.dtype for array in arrays}) != 1:
        raise ValueError(f"dtypes differ: {[array.dtype.name for array in arrays]}")
    if a is None or b is None or batch is None:
        if any(array is not None for array in (a, b, batch)):
            raise ValueError("a, b and batch go together")
        return 0
    slots, rank, d_out = b.shape
    if d_out != weight.shape[0] or a.shape != (slots, len(splits) * rank, x.shape[1]):
        raise ValueError(
            f"a {a.shape} and b {b.shape} must be [slots, members * rank, d_in] and "
            f"[slots, rank, d_out] for x {x.shape}, weight {weight.shape} and splits {splits}"
        )
    if batch.token_slots.shape != (x.shape[0],):
        raise ValueError(f"the batch has {batch.token_slots.shape[0]} tokens, x has {x.shape[0]}")
    return rank
