"""The op: add every token's own LoRA product to a base matmul's output.

For token ``t`` served by slot ``s = token_slots[t]``, and member ``m`` of the group (a group is
the linears that read the same input: q, k and v, or gate and up)::

    y[t, cols(m)] += (x[t] @ a[s, rows(m)].T) @ b[s, :, cols(m)]        y[t] += 0 where s < 0

``rows(m)`` is ``m * r ... (m + 1) * r`` and ``cols(m)`` are the member's columns of the group's
output. The scale (alpha / r or alpha / sqrt(r)) is already part of ``b``. Rows of ``a`` and ``b``
at or above ``ranks[s]`` are never needed, and neither is any slot no token names: an
implementation must give finite results with NaN in either place.

``a`` and ``b`` may hold the slots of several layers, LS in all, where the batch says which are
this layer's; what is above as ``a[s]`` is ``a[first_slot + s]`` then.

Shape letters: T tokens in the step (padded), S slots, LS slots of all layers, M members of the
group, r the bank's rank capacity, W blocks (padded).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.leaf import leaf


# Not checked at run time: its leaves are numpy on the host, and shapes or shardings where JAX maps
# over the tree.
@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraBatch:
    """Which slot serves which token in one step, already cut into blocks.

    The host sorts the step's sequences by slot, so the tokens of one slot are one run and a block
    is a plain range of tokens: ``block_starts[i] ... block_starts[i] + block_counts[i]``, all of
    them served by ``block_slots[i]``. Blocks at or past ``num_blocks[0]`` are padding: they repeat
    the last block's slot and start, with a count of zero, so that fetching "the next block" of a
    pipeline fetches nothing new.
    """

    token_slots: Int32[Array, " T"]
    """Slot of each token, -1 for tokens without an adapter and for padding."""
    ranks: Int32[Array, " S"]
    """True rank of the adapter in each slot, 0 for an empty slot."""
    block_slots: Int32[Array, " W"]
    block_starts: Int32[Array, " W"]
    block_counts: Int32[Array, " W"]
    num_blocks: Int32[Array, " 1"]
    first_slot: Int32[Array, " 1"] | None = None
    """Where in ``a`` and ``b`` the S slots begin, if these hold more than one layer's."""
    block_tokens: int = dataclasses.field(metadata={"static": True})
    """Most tokens in a block."""

    def of_layer(self, number: int, of: int) -> LoraBatch:
        """The same batch for arrays that hold the slots of so many layers, one after the other."""
        if of == 1:
            return self
        first = jnp.full(1, number * self.ranks.shape[0], jnp.int32)
        return dataclasses.replace(self, first_slot=first)

    @property
    def first(self) -> Int32[Array, " 1"]:
        """``first_slot``, or zero."""
        return jnp.zeros(1, jnp.int32) if self.first_slot is None else self.first_slot


class Implementation(NamedTuple):
    """One way to compute the op, and how it wants its blocks cut."""

    name: str
    function: Callable[..., jax.Array]
    """``(y, x, a, b, batch, *, splits) -> y``, as :func:`check` describes the arguments."""
    block_tokens: Callable[[int], int]
    """Most tokens in a block, for a step of so many (padded) tokens."""
    aligned: bool
    """Blocks must not cross a multiple of ``block_tokens`` (hardware that tiles its outputs)."""
    stacked: bool = True
    """``a`` and ``b`` may hold the slots of several layers."""
    gated: Callable[..., jax.Array] | None = None
    """With the same arguments, of two members z = y + product as above: silu(z[:, :half]) *
    z[:, half:], for all tokens; None where nothing is gained by computing both at once."""

    def plan(self, token_slots: np.ndarray, ranks: np.ndarray) -> LoraBatch:
        """:func:`plan`, with the blocks that it wants."""
        block_tokens = self.block_tokens(len(token_slots))
        return plan(token_slots, ranks, block_tokens=block_tokens, aligned=self.aligned)


def max_blocks(num_tokens: int, num_slots: int, block_tokens: int) -> int:
    """Upper bound on the blocks of a step, whatever its mix: every slot's run ends in at most one
    block that is not full, and aligned cuts add at most one block a tile."""
    return -(-num_tokens // block_tokens) + min(num_slots, num_tokens)


def plan(
    token_slots: np.ndarray, ranks: np.ndarray, *, block_tokens: int, aligned: bool
) -> LoraBatch:
    """Cuts one step's tokens into blocks, on the host (numpy in, numpy leaves out).

    ``token_slots``: int32 ``[T]``, each slot's tokens in one run, -1 for no adapter.
    ``ranks``: int32 ``[S]``. Raises ValueError if a slot's tokens are not one run, or a slot is not
    below S.
    """
    num_tokens, num_slots = len(token_slots), len(ranks)
    edges = np.flatnonzero(np.diff(token_slots)) + 1
    run_starts = np.concatenate([[0], edges])
    run_ends = np.concatenate([edges, [num_tokens]])
    run_slots = token_slots[run_starts]
    served = run_slots >= 0
    if run_slots.max() >= num_slots:
        # On the device an index out of range would become another adapter's.
        raise ValueError(f"slot {run_slots.max()} does not exist, the bank has {num_slots} slots")
    if len(np.unique(run_slots[served])) != served.sum():
        raise ValueError("the tokens of one slot must be adjacent; sort the step's rows by slot")
    slots, starts, counts = [], [], []
    for slot, start, end in zip(
        run_slots[served], run_starts[served], run_ends[served], strict=True
    ):
        at = int(start)
        while at < end:
            stop = (at // block_tokens + 1) * block_tokens if aligned else at + block_tokens
            stop = min(stop, int(end))
            slots.append(int(slot))
            starts.append(at)
            counts.append(stop - at)
            at = stop
    capacity = max_blocks(num_tokens, num_slots, block_tokens)
    padding = capacity - len(slots)

    def padded(values: list[int], fill: int) -> Any:
        return leaf(values + [fill] * padding, np.int32)

    return LoraBatch(
        token_slots=leaf(token_slots, np.int32),
        ranks=leaf(ranks, np.int32),
        block_slots=padded(slots, slots[-1] if slots else 0),
        block_starts=padded(starts, starts[-1] if starts else 0),
        block_counts=padded(counts, 0),
        num_blocks=leaf([len(slots)], np.int32),
        block_tokens=block_tokens,
    )


def max_cover(num_tokens: int, num_slots: int, block_tokens: int) -> int:
    """Blocks that :func:`cover` has room for, whatever the mix: each slot's tokens are one run, and
    those without an adapter lie between them."""
    runs = min(num_tokens, 2 * num_slots + 1)
    return (num_tokens + runs * (block_tokens - 1)) // block_tokens


def cover(
    token_slots: Int32[Array, " T"], num_slots: int, block_tokens: int
) -> tuple[Int32[Array, " V"], Int32[Array, " V"], Int32[Array, " V"]]:
    """Cuts all of a step's tokens into blocks, on the device: those without an adapter, too.

    ``token_slots`` are as :func:`plan` takes them. Returns slots, starts and counts as in
    :class:`LoraBatch`, but ``num_slots`` is the slot of tokens without an adapter, and blocks of
    padding start at T. Every token is in one block.
    """
    num_tokens = token_slots.shape[0]
    capacity = max_cover(num_tokens, num_slots, block_tokens)
    token = jnp.arange(num_tokens)
    changes = jnp.concatenate([jnp.ones(1, bool), token_slots[1:] != token_slots[:-1]])
    run_start = lax.cummax(jnp.where(changes, token, 0))
    begins = (token - run_start) % block_tokens == 0
    (starts,) = jnp.nonzero(begins, size=capacity, fill_value=num_tokens)
    slots = token_slots[jnp.minimum(starts, num_tokens - 1)]
    slots = jnp.where(slots < 0, num_slots, slots)
    return slots, starts, jnp.diff(starts, append=num_tokens)


def check(
    y: Float[Array, "T d_out"],
    x: Float[Array, "T d_in"],
    a: Float[Array, "LS Mr d_in"],
    b: Float[Array, "LS r d_out"],
    batch: LoraBatch,
    splits: tuple[int, ...],
) -> int:
    """Raises ValueError unless the shapes fit together; returns the rank capacity r.

    ``splits`` are the output widths of the group's members, in column order.
    """
    if sum(splits) != y.shape[1] or b.shape[2] != y.shape[1]:
        raise ValueError(f"splits {splits} and b {b.shape} must cover y's {y.shape[1]} columns")
    rank = b.shape[1]
    if a.shape != (b.shape[0], len(splits) * rank, x.shape[1]):
        raise ValueError(
            f"a {a.shape} must be [slots, members * rank, d_in] = "
            f"[{b.shape[0]}, {len(splits)} * {rank}, {x.shape[1]}]"
        )
    if x.shape[0] != y.shape[0] or batch.token_slots.shape != (x.shape[0],):
        raise ValueError(f"x {x.shape}, y {y.shape} and the batch must have the same tokens")
    return rank
