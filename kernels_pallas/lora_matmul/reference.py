"""The op in plain jnp, block by block: what runs on a CPU, and in float32 everywhere.

One loop iteration reads one slot's A and B and at most ``block_tokens`` rows of x, and the loop
ends after the last real block: the cost follows the active adapters. Rows above the true rank are
read (a dynamic extent has no place in XLA) but masked, so that they may hold anything.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul.op import Implementation, LoraBatch, check


def lora_matmul(
    y: Float[Array, "T d_out"],
    x: Float[Array, "T d_in"],
    a: Float[Array, "LS Mr d_in"],
    b: Float[Array, "LS r d_out"],
    batch: LoraBatch,
    *,
    splits: tuple[int, ...],
) -> Float[Array, "T d_out"]:
    """``y`` plus every token's LoRA product (formula and shapes: :mod:`.op`).

    Both matmuls accumulate in float32; the rank-sized intermediate is rounded to x's dtype, as a
    bfloat16 model run by PEFT rounds it. In float32 the precision is HIGHEST on every platform.
    """
    rank = check(y, x, a, b, batch, splits)
    num_tokens, d_in = x.shape
    rows = min(batch.block_tokens, num_tokens)
    members, first_slot = len(splits), batch.first[0]

    def add_block(i: jax.Array, y: jax.Array) -> jax.Array:
        slot, start = batch.block_slots[i], batch.block_starts[i]
        # A slice that would run past the end starts earlier instead; the mask below knows.
        first = jnp.minimum(start, num_tokens - rows)
        token = first + jnp.arange(rows)
        mine = (token >= start) & (token < start + batch.block_counts[i])
        used = jnp.arange(rank) < batch.ranks[slot]

        x_rows = lax.dynamic_slice(x, (first, 0), (rows, d_in))
        x_rows = jnp.where(mine[:, None], x_rows, 0)
        a_slot = lax.dynamic_index_in_dim(a, first_slot + slot, keepdims=False)
        b_slot = lax.dynamic_index_in_dim(b, first_slot + slot, keepdims=False)
        b_slot = jnp.where(used[:, None], b_slot, 0)

        hidden = dot(x_rows, a_slot, contract=(1, 1)).astype(x.dtype)
        hidden = jnp.where(jnp.tile(used, members), hidden, 0)
        delta, column = [], 0
        for m, width in enumerate(splits):
            b_member = b_slot[:, column : column + width]
            delta.append(dot(hidden[:, m * rank : (m + 1) * rank], b_member, contract=(1, 0)))
            column += width
        y_rows = lax.dynamic_slice(y, (first, 0), (rows, y.shape[1]))
        total = y_rows.astype(jnp.float32) + jnp.concatenate(delta, axis=1)
        # Rows of a neighbour go back bit for bit.
        y_rows = jnp.where(mine[:, None], total.astype(y.dtype), y_rows)
        return lax.dynamic_update_slice(y, y_rows, (first, 0))

    return lax.fori_loop(0, batch.num_blocks[0], add_block, y)


def dot(left: jax.Array, right: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    """The product over one dimension of each side, in float32; exact float32 on every platform."""
    return lax.dot_general(
        left,
        right,
        dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _block_tokens(num_tokens: int) -> int:
    return 8 if num_tokens <= 64 else 64


IMPLEMENTATION = Implementation(
    name="reference",
    function=lora_matmul,
    block_tokens=_block_tokens,
    aligned=False,
)
