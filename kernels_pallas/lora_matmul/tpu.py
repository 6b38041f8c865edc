"""The op as one Mosaic TPU kernel.

The grid is (column tile of y, work item), items innermost. An item is one block of tokens and one
chunk of its adapter's rank rows: as many rows as a vector register holds, 16 in bfloat16 and 8 in
float32. The index maps look the item's slot up in prefetched scalars, and the number of items is
the grid's bound, known at run time: a slot without tokens, a chunk above the true rank and a
padding block are never visited, so never fetched.

Why one kernel and not a shrink and an expand. At decode the op is bound by the bytes of A and B
and by the number of grid steps, each of which costs some hundred nanoseconds however little it
does. Doing both products in one step halves the steps, and VMEM holds whole rows of y. At prefill
it does not: 128 tokens need 1.5 kB a column (y coming and going, two buffers each, and a float32
sum), 44 MB for gate and up of an 8B model. So the columns are cut, and ``x A^T``, computed with
the first column tile, stays in VMEM for the others: ``T * r`` numbers in whole lanes, 2 MB for 2048
tokens at rank 64. A second kernel would write it to HBM and read it back. Either way x, y, A and B
move once, but for an adapter of several chunks whose tokens span several tiles. Its A and B are
fetched once a tile: ``M * r / block_tokens`` of the bytes of x, ``r / (2 * block_tokens)`` of y's.

Items are in the order of the tokens, so a tile of y is summed in float32 while it is resident and
is written once. Rows of other tokens in the tile go back bit for bit.

Unmeasured on hardware: results are checked in interpret mode, and the compiler accepts the kernel
for v5e, v5p, v6e and 7x. The two cores that v5p shows as one device would need the items split
between them; one core does the work.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from kernels_pallas.lora_matmul import dense
from kernels_pallas.lora_matmul.op import Implementation, LoraBatch, check

LANES = 128
SUBLANES = 8

VMEM_BUDGET = 24 * 2**20
"""Bytes of the kernel's buffers. A core has 64 MiB or more, which XLA uses too."""
VMEM_LIMIT = 40 * 2**20
"""Bytes the compiler may use, values between the buffers included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel cuts its operands."""

    rank_chunk: int
    """Rank rows of an item."""
    columns: int
    """Columns of y in a tile: all of them, or a multiple of 128 that divides every member's."""


def choose_config(
    num_tokens: int,
    block_tokens: int,
    d_in: int,
    splits: tuple[int, ...],
    rank: int,
    dtype: DTypeLike,
) -> Config:
    """The finest rank chunks, and the widest tiles of y with which all buffers fit the budget.

    Coarser chunks would spare an adapter of high rank some grid steps and cost one of low rank
    bytes it does not need; only a measurement could say that this pays. Raises ValueError where no
    tile of y fits.
    """
    size = jnp.dtype(dtype).itemsize
    rank_chunk = min(rank, SUBLANES * 4 // size)
    chunk_rows = len(splits) * rank_chunk
    # Two buffers an operand: one in use, one in flight.
    fixed = 2 * (block_tokens + chunk_rows) * d_in * size
    tiles, chunks = pl.cdiv(num_tokens, block_tokens), pl.cdiv(rank, rank_chunk)
    hidden = block_tokens * pl.cdiv(chunk_rows, LANES) * LANES * size
    column = 2 * (2 * block_tokens + rank_chunk) * size + 4 * block_tokens
    if fixed + hidden + column * sum(splits) <= VMEM_BUDGET:
        return Config(rank_chunk=rank_chunk, columns=sum(splits))
    room = (VMEM_BUDGET - fixed - hidden * tiles * chunks) // column
    common = math.gcd(*splits)
    widths = [w for w in range(LANES, min(room, common) + 1, LANES) if common % w == 0]
    if not widths:
        raise ValueError(
            f"a step of {num_tokens} tokens in blocks of {block_tokens}, {d_in} inputs, outputs "
            f"{splits} and rank {rank} does not fit {VMEM_BUDGET} bytes of VMEM, and no multiple "
            f"of {LANES} columns that does divides every output; use fewer tokens a step"
        )
    return Config(rank_chunk=rank_chunk, columns=widths[-1])


class Scalars(NamedTuple):
    """What the index maps and the kernel read to know what to do: the items and the batch.

    I is the most items a batch can have; only the first ``num_items`` mean anything.
    """

    item_blocks: Int32[Array, " I"]
    item_chunks: Int32[Array, " I"]
    num_items: Int32[Array, " 1"]
    """At least 1: a batch without a served token has one item, of a block without tokens."""
    block_slots: Int32[Array, " W"]
    block_starts: Int32[Array, " W"]
    block_counts: Int32[Array, " W"]
    ranks: Int32[Array, " S"]


def list_work(batch: LoraBatch, rank: int, rank_chunk: int) -> Scalars:
    """The batch's blocks, each times the rank chunks its adapter has; r is the bank's ``rank``.

    A few operations on some hundred integers. They are the same in every layer and in groups of
    one rank capacity, so that XLA keeps one copy of them in a step.
    """
    num_blocks = len(batch.block_slots)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    block_ranks = jnp.where(block < batch.num_blocks[0], batch.ranks[batch.block_slots], 0)
    chunks = lax.div(block_ranks + (rank_chunk - 1), np.int32(rank_chunk))
    ends = jnp.cumsum(chunks)
    item = jnp.arange(num_blocks * pl.cdiv(rank, rank_chunk), dtype=jnp.int32)
    item_blocks = jnp.sum(item[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    item_blocks = jnp.minimum(item_blocks, num_blocks - 1)
    return Scalars(
        item_blocks=item_blocks,
        item_chunks=item - (ends - chunks)[item_blocks],
        num_items=jnp.maximum(ends[-1:], 1),
        block_slots=batch.block_slots,
        block_starts=batch.block_starts,
        block_counts=batch.block_counts,
        ranks=batch.ranks,
    )


def lora_matmul(
    y: Float[Array, "T d_out"],
    x: Float[Array, "T d_in"],
    a: Float[Array, "S Mr d_in"],
    b: Float[Array, "S r d_out"],
    batch: LoraBatch,
    *,
    splits: tuple[int, ...],
    config: Config | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T d_out"]:
    """``y`` plus every token's LoRA product (formula and shapes: :mod:`.op`), y updated in place.

    The batch's blocks must be aligned, ``block_tokens`` a multiple of 8 or all tokens, and the
    bank's rank a multiple of 8; ValueError otherwise. ``interpret`` is for tests.
    """
    rank = check(y, x, a, b, batch, splits)
    num_tokens, d_in = x.shape
    num_slots, members, d_out = a.shape[0], len(splits), y.shape[1]
    rows = min(batch.block_tokens, num_tokens)
    if rows % SUBLANES and rows != num_tokens:
        raise ValueError(f"block_tokens {rows} must be a multiple of {SUBLANES} or {num_tokens}")
    if rank % SUBLANES:
        # Otherwise taking A's members apart would copy the bank.
        raise ValueError(
            f"the bank's rank {rank} must be a multiple of {SUBLANES}: round it up, adapters of "
            "any rank below it cost no more"
        )
    if config is None:
        config = choose_config(num_tokens, rows, d_in, splits, rank, x.dtype)
    column_tiles, chunks = d_out // config.columns, pl.cdiv(rank, config.rank_chunk)
    # A single column tile uses x A^T at once; several need those of all tiles and chunks.
    kept = pl.cdiv(num_tokens, rows) * chunks if column_tiles > 1 else 1

    scalars = list_work(batch, rank, config.rank_chunk)
    x_map, a_map, b_map, y_map = _index_maps(rows)
    y_spec = pl.BlockSpec((rows, config.columns), y_map)
    active = min(num_slots, num_tokens)
    return pl.pallas_call(
        functools.partial(_kernel, splits=splits, chunks=chunks),
        name="lora_matmul",
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(column_tiles, scalars.num_items[0]),
            in_specs=[
                pl.BlockSpec((rows, d_in), x_map),
                pl.BlockSpec((None, members, config.rank_chunk, d_in), a_map),
                pl.BlockSpec((None, config.rank_chunk, config.columns), b_map),
                y_spec,
            ],
            out_specs=y_spec,
            scratch_shapes=[
                pltpu.VMEM((kept, rows, members * config.rank_chunk), x.dtype),
                pltpu.VMEM((rows, config.columns), jnp.float32),
            ],
        ),
        input_output_aliases={len(scalars) + 3: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        # The most a step can need; how much it does need is known only at run time.
        cost_estimate=pl.CostEstimate(
            flops=2 * num_tokens * rank * (members * d_in + d_out),
            transcendentals=0,
            bytes_accessed=(x.size + active * rank * (members * d_in + d_out)) * x.dtype.itemsize
            + 2 * y.size * y.dtype.itemsize,
        ),
        interpret=interpret,
    )(*scalars, x, a.reshape(num_slots, members, rank, d_in), b, y)


def _tile(scalars: Scalars, item: Any, rows: int) -> Any:
    """Which ``rows`` of x and y an item works on."""
    # lax.div, because Python's floor division asks Mosaic for the sign and it for a live TPU.
    return lax.div(scalars.block_starts[scalars.item_blocks[item]], np.int32(rows))


def _index_maps(rows: int) -> tuple[Any, Any, Any, Any]:
    """Block indices of x, A, B and y, given column tile, item and scalars."""

    def tile(scalars: Scalars, item: Any) -> Any:
        return _tile(scalars, item, rows)

    def slot(scalars: Scalars, item: Any) -> Any:
        return scalars.block_slots[scalars.item_blocks[item]]

    def shrinking(n: Any, item: Any, scalars: Scalars) -> Any:
        # x and A are read with the first column tile; after it they stay where they are.
        return jnp.where(n == 0, item, scalars.num_items[0] - 1)

    def x_map(n: Any, item: Any, *refs: Any) -> tuple[Any, ...]:
        scalars = Scalars(*refs)
        return tile(scalars, shrinking(n, item, scalars)), 0

    def a_map(n: Any, item: Any, *refs: Any) -> tuple[Any, ...]:
        scalars = Scalars(*refs)
        item = shrinking(n, item, scalars)
        return slot(scalars, item), 0, scalars.item_chunks[item], 0

    def b_map(n: Any, item: Any, *refs: Any) -> tuple[Any, ...]:
        scalars = Scalars(*refs)
        return slot(scalars, item), scalars.item_chunks[item], n

    def y_map(n: Any, item: Any, *refs: Any) -> tuple[Any, ...]:
        return tile(Scalars(*refs), item), n

    return x_map, a_map, b_map, y_map


def _kernel(*refs: Any, splits: tuple[int, ...], chunks: int) -> None:
    """One item of one column tile: ``x A^T`` of the item's chunk, times B, into the tile's sum."""
    scalars = Scalars(*refs[: len(Scalars._fields)])
    x, a, b, y, out, hidden, total = refs[len(Scalars._fields) :]
    members, rank_chunk, d_in = a.shape
    rows, columns = y.shape
    n, item = pl.program_id(0), pl.program_id(1)
    last = scalars.num_items[0] - 1

    block, chunk = scalars.item_blocks[item], scalars.item_chunks[item]
    tile, start = _tile(scalars, item, rows), scalars.block_starts[block]
    used = scalars.ranks[scalars.block_slots[block]] - chunk * rank_chunk
    token = tile * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    # Selecting with these, never multiplying, keeps NaN out of the result, and -0 in it.
    mine = (token >= start) & (token < start + scalars.block_counts[block])

    def below_rank(values: jax.Array, axis: int) -> jax.Array:
        return jnp.where(lax.broadcasted_iota(jnp.int32, values.shape, axis) < used, values, 0)

    place = tile * chunks + chunk if hidden.shape[0] > 1 else 0

    @pl.when((item == 0) | (_tile(scalars, jnp.maximum(item - 1, 0), rows) != tile))
    def _open() -> None:
        total[...] = y[...].astype(jnp.float32)

    @pl.when(n == 0)
    def _shrink() -> None:
        product = _dot(x[...], a[...].reshape(members * rank_chunk, d_in), contract=(1, 1))
        # Slots that share the tile share the place, each its own rows.
        hidden[place] = jnp.where(mine, product.astype(hidden.dtype), hidden[place])

    def expand(member: int, left: int, right: int) -> None:
        member_rows = slice(member * rank_chunk, (member + 1) * rank_chunk)
        narrow = below_rank(hidden[place, :, member_rows], 1)
        delta = _dot(narrow, below_rank(b[:, left:right], 0), contract=(1, 0))
        before = total[:, left:right]
        total[:, left:right] = jnp.where(mine, before + delta, before)

    edges = [0, *itertools.accumulate(splits)]
    for member, (left, right) in enumerate(itertools.pairwise(edges)):
        if columns == edges[-1]:
            expand(member, left, right)
        else:
            inside = (n * columns >= left) & (n * columns < right)
            pl.when(inside)(functools.partial(expand, member, 0, columns))

    @pl.when((item == last) | (_tile(scalars, jnp.minimum(item + 1, last), rows) != tile))
    def _close() -> None:
        out[...] = total[...].astype(out.dtype)


def _dot(left: jax.Array, right: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    return lax.dot_general(
        left,
        right,
        dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        # Said in either case, because the process may have set another default.
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def choose_block_tokens(num_tokens: int) -> int:
    """Tokens of a block: at most eight tiles a step until blocks reach 128 tokens.

    An item works on all rows of its tile, its own or not, so decode, with a token or two an
    adapter, wants small tiles; long runs want few, because each may fetch its adapter again.
    """
    return min(128, max(SUBLANES, num_tokens // 8 // SUBLANES * SUBLANES))


DENSE_TOKENS = range(64, 257)
DENSE_ROWS = 128


def dense_pays(num_tokens: int, num_slots: int, rank: int) -> bool:
    """Whether two matmuls over all slots take less time than the kernel, on paper.

    An item of the kernel costs about 0.35 us beside its bytes, and there are as many as blocks, in
    each group of each layer. With slots * rank of 128 all slots of an 8B model are 0.67 GB a step,
    0.18 to 0.82 ms on a 7x to a v5e, and the kernel's items are 0.36 to 0.67 ms at 64 tokens. A
    smaller step has few items; a larger one waits for arithmetic, of which dense does more.
    """
    return num_tokens in DENSE_TOKENS and num_slots * rank <= DENSE_ROWS


def lora_matmul_by_size(
    y: Float[Array, "T d_out"],
    x: Float[Array, "T d_in"],
    a: Float[Array, "S Mr d_in"],
    b: Float[Array, "S r d_out"],
    batch: LoraBatch,
    *,
    splits: tuple[int, ...],
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "T d_out"]:
    """:func:`lora_matmul`, or what is faster for these shapes; ``interpret`` is for the kernel."""
    if dense_pays(x.shape[0], b.shape[0], b.shape[1]):
        return dense.lora_matmul(y, x, a, b, batch, splits=splits)
    return lora_matmul(y, x, a, b, batch, splits=splits, interpret=interpret)


IMPLEMENTATION = Implementation(
    name="mosaic_tpu", function=lora_matmul_by_size, block_tokens=choose_block_tokens, aligned=True
)
