"""What few adapters have beyond LoRA on the layers' linears, in a forward pass of its own.

*Vectors* change a linear's outputs one by one, ``y = gain * (x W^T) + base bias + shift``: the gain
is DoRA's magnitude over norm (arXiv:2402.09353, equation 5), the shift is PEFT's lora_bias, scaled.
The low-rank product is added afterwards as for any adapter; DoRA's gain is part of its B already.
The embedding and the output head have LoRA of their own.

Of several devices each has its part: of a linear whose outputs are split its columns, and where
products are summed every gain and, on the first device, the shift; of the vocabulary its rows.

A slot whose adapter has no extras may hold anything here: its tokens have slot -1 in the batches of
this module.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxlora.models.layers import look_up, matmul
from kernels_pallas.lora_matmul.op import LoraBatch
from kernels_pallas.lora_matmul.reference import IMPLEMENTATION as REFERENCE


class Vectors(NamedTuple):
    """Gains (1 without DoRA) and shifts (0 without a bias) by slot; None where never needed."""

    gain: Float32[Array, "S d_out"] | None
    shift: Float32[Array, "S d_out"] | None


GroupVectors = dict[str, Vectors]
"""Group name -> vectors."""


class VocabularyPair(NamedTuple):
    """LoRA on the embedding, whose ``a`` has a row a token, or on the output head."""

    a: Float[Array, "S V r"] | Float[Array, "S r d"]
    b: Float[Array, "S r d"] | Float[Array, "S r V"]
    vectors: Vectors


class Extras(NamedTuple):
    """The arrays of all slots; what the engine was not started for is None or empty."""

    layers: list[GroupVectors]
    embed: VocabularyPair | None
    lm_head: VocabularyPair | None
    has_matrix: dict[str, Bool[Array, " S"]]
    """Whether a slot's adapter has an "embed" or "lm_head" of its own."""
    matrices: dict[str, Float[Array, "S V d"]]
    """Those matrices, by the same names."""


@no_type_check  # leaves are numpy on the host, tracers in a program
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtrasBatch:
    """Which slot serves which token, and which row of logits; -1 for adapters without extras."""

    tokens: LoraBatch
    rows: LoraBatch


def with_vectors(
    y: Float[Array, "T d_out"],
    vectors: Vectors,
    slots: Int32[Array, " T"],
    *,
    bias: Float[Array, " d_out"] | None = None,
) -> Float[Array, "T d_out"]:
    """``gain * y + bias + shift``, in float32; tokens of slot -1 have gain 1 and shift 0."""
    # Gathered when y is there and not before: a compiler did so for all layers at once.
    y, slots = lax.optimization_barrier((y, slots))
    mine, at = (slots >= 0)[:, None], jnp.maximum(slots, 0)
    wide = y.astype(jnp.float32)
    if vectors.gain is not None:
        wide = wide * jnp.where(mine, vectors.gain[at], 1.0)
    if bias is not None:
        wide = wide + bias.astype(jnp.float32)
    if vectors.shift is not None:
        wide = wide + jnp.where(mine, vectors.shift[at], 0.0)
    return wide.astype(y.dtype)


def embedded_with_lora(
    x: Float[Array, "T d"],
    token_ids: Int32[Array, " T"],
    pair: VocabularyPair,
    batch: LoraBatch,
    num_devices: int,
) -> Float[Array, "T d"]:
    """The base's embeddings of some tokens, changed by every token's own adapter; like them a part
    of a sum over the devices."""
    slots = batch.token_slots
    x = with_vectors(x, pair.vectors, slots)
    # A look-up is the product with a one-hot vector: what is left of x A^T is a row of A.
    hidden = look_up(pair.a, token_ids, num_devices, slots=jnp.maximum(slots, 0))
    num_slots, rank, width = pair.b.shape
    identity = jnp.broadcast_to(jnp.eye(rank, dtype=hidden.dtype), (num_slots, rank, rank))
    return REFERENCE.function(x, hidden, identity, pair.b, batch, splits=(width,))


def own_embeddings(
    x: Float[Array, "T d"],
    token_ids: Int32[Array, " T"],
    extras: Extras,
    batch: LoraBatch,
    num_devices: int,
) -> Float[Array, "T d"]:
    """The base's embeddings, or rows of the adapter's own matrix where it has one; like them a part
    of a sum over the devices."""
    slots, at = batch.token_slots, jnp.maximum(batch.token_slots, 0)
    mine = (slots >= 0) & extras.has_matrix["embed"][at]
    rows = look_up(extras.matrices["embed"], token_ids, num_devices, slots=at)
    return jnp.where(mine[:, None], rows, x)


def own_logits(
    logits: Float32[Array, "R V"], hidden: Float[Array, "R d"], extras: Extras, batch: LoraBatch
) -> Float32[Array, "R V"]:
    """The base's scores, or those of the adapter's own head where it has one."""
    num_rows = min(batch.block_tokens, len(hidden))

    def replace(i: jax.Array, logits: jax.Array) -> jax.Array:
        start = batch.block_starts[i]
        # As in the reference of the LoRA op: a block at the end starts earlier.
        first = jnp.minimum(start, len(hidden) - num_rows)
        row = first + jnp.arange(num_rows)
        mine = (row >= start) & (row < start + batch.block_counts[i])
        matrix = lax.dynamic_index_in_dim(
            extras.matrices["lm_head"], batch.block_slots[i], keepdims=False
        )
        rows = lax.dynamic_slice_in_dim(hidden, first, num_rows)
        own = matmul(rows, matrix, preferred_element_type=jnp.dtype(jnp.float32))
        kept = lax.dynamic_slice_in_dim(logits, first, num_rows)
        own = jnp.where(mine[:, None], own, kept)
        return lax.dynamic_update_slice_in_dim(logits, own, first, 0)

    def replace_if_own(i: jax.Array, logits: jax.Array) -> jax.Array:
        has = extras.has_matrix["lm_head"][batch.block_slots[i]]
        return lax.cond(has, replace, lambda i, same: same, i, logits)

    return lax.fori_loop(0, batch.num_blocks[0], replace_if_own, logits)


def logits_with_lora(
    logits: Float32[Array, "R V"],
    hidden: Float[Array, "R d"],
    pair: VocabularyPair,
    batch: LoraBatch,
) -> Float32[Array, "R V"]:
    """The base's scores, changed by every row's own adapter."""
    logits = with_vectors(logits, pair.vectors, batch.token_slots)
    # The kernels add to the model's dtype; scores are float32.
    return REFERENCE.function(logits, hidden, pair.a, pair.b, batch, splits=(logits.shape[1],))
