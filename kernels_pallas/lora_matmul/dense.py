"""The op as two matmuls over all slots: ``(one-hot mask of (x A_all^T)) B_all``.

It reads every slot, and its cost follows neither the active adapters nor their ranks. Where slots
are few and steps large that is less than what a kernel spends on visiting them one by one; see
:mod:`.tpu` for where that is. On a GPU without a kernel it is what runs, unless slots are very
many: there a loop waits for the host each time round.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul import reference
from kernels_pallas.lora_matmul.op import Implementation, LoraBatch, check
from kernels_pallas.lora_matmul.reference import dot

GPU_ROWS = 4096
"""Most slots * rank on a GPU: with more, XLA's loop over the active adapters reads less."""


def lora_matmul(
    y: Float[Array, "T d_out"],
    x: Float[Array, "T d_in"],
    a: Float[Array, "S Mr d_in"],
    b: Float[Array, "S r d_out"],
    batch: LoraBatch,
    *,
    splits: tuple[int, ...],
) -> Float[Array, "T d_out"]:
    """``y`` plus every token's LoRA product (formula and shapes: :mod:`.op`), however the batch is
    cut into blocks. Both matmuls accumulate in float32."""
    rank = check(y, x, a, b, batch, splits)
    num_tokens, d_in = x.shape
    num_slots, members = a.shape[0], len(splits)
    mine = batch.token_slots[:, None] == jnp.arange(num_slots)
    below_rank = jnp.arange(rank) < batch.ranks[:, None]
    # [S, r, 1]: what is not needed may hold anything, and zero times NaN is NaN.
    read = (mine.any(axis=0)[:, None] & below_rank)[:, :, None]
    column = jnp.arange(num_slots * members * rank)
    slot = column // (members * rank)
    kept = (batch.token_slots[:, None] == slot) & (column % rank < batch.ranks[slot])

    hidden = dot(x, a.reshape(num_slots * members * rank, d_in), contract=(1, 1))
    # Masked before it is reshaped: the other way round ends libtpu 0.0.52 when it compiles for v5p.
    hidden = jnp.where(kept, hidden.astype(x.dtype), 0)
    hidden = hidden.reshape(num_tokens, num_slots, members, rank)
    delta, start = [], 0
    for m, width in enumerate(splits):
        b_member = jnp.where(read, b[:, :, start : start + width], 0)
        left = hidden[:, :, m].reshape(num_tokens, num_slots * rank)
        right = b_member.reshape(num_slots * rank, width)
        delta.append(dot(left, right, contract=(1, 0)))
        start += width
    total = y.astype(jnp.float32) + jnp.concatenate(delta, axis=1)
    # Rows without an adapter go back bit for bit.
    return jnp.where((batch.token_slots >= 0)[:, None], total.astype(y.dtype), y)


def lora_matmul_by_size(
    y: Float[Array, "T d_out"],
    x: Float[Array, "T d_in"],
    a: Float[Array, "S Mr d_in"],
    b: Float[Array, "S r d_out"],
    batch: LoraBatch,
    *,
    splits: tuple[int, ...],
) -> Float[Array, "T d_out"]:
    """:func:`lora_matmul`, or what is faster on a GPU for so many slots."""
    slots, rank, _ = b.shape
    function = lora_matmul if slots * rank <= GPU_ROWS else reference.lora_matmul
    return function(y, x, a, b, batch, splits=splits)


IMPLEMENTATION = Implementation(
    name="dense",
    function=lora_matmul_by_size,
    block_tokens=lambda num_tokens: num_tokens,
    aligned=False,
    stacked=False,
)
