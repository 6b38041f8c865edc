"""The op as one Mosaic TPU kernel.

The grid is (column tile of y, tile of tokens), tokens innermost, over those tiles only that have
tokens with an adapter. A tile's work is a list of *items*: one block of tokens and the rank rows of
its adapter, up to 64 of them. A and B stay in device memory; the kernel copies what its items need
into a ring of buffers, some items ahead and across tiles, so that copies do not wait for
arithmetic. The lists lie in scalar memory and the loops end where they do: a slot without tokens,
rows above the true rank and a padding block are never visited, so never fetched. Copies are of as
many rank rows as a vector register holds, 16 in bfloat16 and 8 in float32.

Decode. A tile is 8 tokens and all columns of y. Items of 64 rank rows in all, as four adapters of
rank 16, are multiplied together: their A's lie one below the other and make one matmul, ``x A^T``
of a token is kept where the rank rows are its own adapter's, and their B's make one matmul of four
times the depth. So the matrix unit does not start anew for each adapter, and the sum of y is read
and written once for four. What that saves, counted in the compiler's schedule, is in
benchmarks/NOTES.md. An item that is alone of its group in a tile is multiplied alone.

Prefill. 128 tokens need 1.5 kB a column (y coming and going, two buffers each, and a float32 sum),
44 MB for gate and up of an 8B model, more than VMEM. So the columns are cut, and ``x A^T``,
computed with the first column tile, stays in VMEM for the others: ``T * r`` numbers in whole lanes,
2 MB for 2048 tokens at rank 64. A second kernel would write it to HBM and read it back. Items are
multiplied one by one there.

Either way x and y move once, A and B once for a run of tokens: more often only where an adapter of
several items spans several tiles.

Unmeasured on hardware: results are checked in interpret mode, and the compiler accepts the kernel
for v5e, v5p, v6e and 7x. The two cores that v5p shows as one device would need the tiles split
between them; one core does the work.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul import dense
from kernels_pallas.lora_matmul.op import Implementation, LoraBatch, check
from kernels_pallas.lora_matmul.tpu_config import (
    LANES,
    SUBLANES,
    Config,
    choose_block_tokens,
    choose_config,
    dense_pays,
)
from kernels_pallas.lora_matmul.tpu_plan import Work, list_work

VMEM_LIMIT = 40 * 2**20
"""Bytes the compiler may use, values between the buffers included."""


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
    rank_chunk, columns = config.rank_chunk, config.columns
    item_rank = config.chunks * rank_chunk
    column_tiles, parts = d_out // columns, pl.cdiv(rank, item_rank)
    # A single column tile uses x A^T at once; several need those of all tiles and parts.
    kept = pl.cdiv(num_tokens, rows) * parts if column_tiles > 1 else 1

    work = list_work(batch, rank, item_rank, rows)

    def x_map(n: Any, t: Any, *refs: Any) -> tuple[Any, ...]:
        work = Work(*refs)
        # Read with the first column tile; after it x stays where it is.
        return work.tiles[jnp.where(n == 0, t, work.num_tiles[0] - 1)], 0

    def y_map(n: Any, t: Any, *refs: Any) -> tuple[Any, ...]:
        return Work(*refs).tiles[t], n

    y_spec = pl.BlockSpec((rows, columns), y_map)
    # Said, lest XLA bring a small bank to VMEM as a whole.
    bank = pl.BlockSpec(memory_space=pltpu.HBM)
    active = min(num_slots, num_tokens)
    return pl.pallas_call(
        functools.partial(_kernel, splits=splits, config=config, parts=parts),
        name="lora_matmul",
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(work),
            grid=(column_tiles, work.num_tiles[0]),
            in_specs=[pl.BlockSpec((rows, d_in), x_map), y_spec, bank, bank],
            out_specs=y_spec,
            scratch_shapes=[
                pltpu.VMEM((config.depth, members, config.items * item_rank, d_in), x.dtype),
                pltpu.VMEM((config.depth, config.items * item_rank, columns), x.dtype),
                pltpu.VMEM((kept, rows, members * item_rank), x.dtype),
                pltpu.VMEM((rows, columns), jnp.float32),
                pltpu.SemaphoreType.DMA((config.depth,)),
            ],
        ),
        input_output_aliases={len(work) + 1: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
            # Slots are checked on the host; checking a copy takes longer than starting it.
            disable_bounds_checks=True,
        ),
        # The most a step can need; how much it does need is known only at run time.
        cost_estimate=pl.CostEstimate(
            flops=2 * num_tokens * rank * (members * d_in + d_out),
            transcendentals=0,
            bytes_accessed=(x.size + active * rank * (members * d_in + d_out)) * x.dtype.itemsize
            + 2 * y.size * y.dtype.itemsize,
        ),
        interpret=interpret,
    )(
        *work,
        x,
        y,
        a.reshape(num_slots, members, rank // rank_chunk, rank_chunk, d_in),
        b.reshape(num_slots, rank // rank_chunk, rank_chunk, d_out),
    )


def _kernel(*refs: Any, splits: tuple[int, ...], config: Config, parts: int) -> None:
    """All items of one tile of y: ``x A^T`` of each group of items, times B, into the tile's sum.

    A and B come group by group, each group into its place of a ring, some groups ahead of their
    use and whatever tile that is in.
    """
    work = Work(*refs[: len(Work._fields)])
    x, y, a_bank, b_bank, out, a_ring, b_ring, hidden, total, arrived = refs[len(Work._fields) :]
    rank_chunk, columns, depth, size = config.rank_chunk, config.columns, config.depth, config.items
    item_rank = config.chunks * rank_chunk
    members, d_in, rows = len(splits), x.shape[1], x.shape[0]
    edges = [0, *itertools.accumulate(splits)]
    column_tiles = edges[-1] // columns
    n, t = pl.program_id(0), pl.program_id(1)
    num_fetches = work.num_fetches[0]
    log_size = size.bit_length() - 1
    num_groups = (num_fetches + size - 1) >> log_size
    ahead = jnp.minimum(num_groups, depth - 1)

    def place_of(n: Any, group: Any) -> Any:
        return (n * num_groups + group) & (depth - 1)

    def for_each_copy(n: Any, group: Any, act: Any) -> None:
        """Of a group's chunks below the true rank: of B, and of A with the first column tile."""
        place = place_of(n, group)
        for i, c in itertools.product(range(size), range(config.chunks)):
            fetch = group * size + i
            slot, chunk = work.fetch_slots[fetch], work.fetch_parts[fetch] * config.chunks + c
            at = pl.ds(i * item_rank + c * rank_chunk, rank_chunk)
            b_chunk = b_bank.at[slot, chunk]
            if column_tiles > 1:
                b_chunk = b_chunk.at[:, pl.ds(pl.multiple_of(n * columns, LANES), columns)]
            of_a = pltpu.make_async_copy(
                a_bank.at[slot, :, chunk], a_ring.at[place, :, at], arrived.at[place]
            )
            of_b = pltpu.make_async_copy(b_chunk, b_ring.at[place, at], arrived.at[place])
            needed = c * rank_chunk < work.fetch_ranks[fetch]
            pl.when(needed & (n == 0))(functools.partial(act, of_a))
            pl.when(needed)(functools.partial(act, of_b))

    def start(n: Any, group: Any) -> None:
        for_each_copy(n, group, lambda copy: copy.start())

    @pl.when((n == 0) & (t == 0))
    def _fill() -> None:
        lax.fori_loop(0, ahead, lambda group, _: start(0, group), None)

    def bring(group: Any) -> None:
        """Waits for a group, and starts one into the place of the group before it."""
        wraps = group + ahead >= num_groups
        later_n = n + wraps.astype(jnp.int32)

        @pl.when(later_n < column_tiles)
        def _start() -> None:
            start(later_n, group + ahead - jnp.where(wraps, num_groups, 0))

        for_each_copy(n, group, lambda copy: copy.wait())

    first, end = work.tile_items[t], work.tile_items[t + 1]
    first_fetch = work.item_fetches[first]
    end_fetch = first_fetch + end - first
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)

    def multiply(place: Any, fetch: Any, count: int) -> jax.Array:
        """Adds the items of ``count`` fetches, those that are this tile's; returns their rows."""
        width = count * item_rank
        at = pl.ds(pl.multiple_of((fetch & (size - 1)) * item_rank, item_rank), width)
        # Which of the items' rank rows, in the columns of x A^T and the rows of B.
        column = lax.broadcasted_iota(jnp.int32, (rows, members * width), 1) & (width - 1)
        rank_row = lax.broadcasted_iota(jnp.int32, (width, 1), 0)
        # Selecting with these, never multiplying, keeps NaN out of the result.
        served, kept, read = row < 0, column < 0, rank_row < 0
        for i in range(count):
            inside = (fetch + i >= first_fetch) & (fetch + i < end_fetch)
            nth = jnp.where(inside, fetch + i - first_fetch, 0)
            used = jnp.where(inside, jnp.minimum(work.fetch_ranks[first_fetch + nth], item_rank), 0)
            low, high = i * item_rank, i * item_rank + used
            item = first + nth
            mine = (row >= work.item_starts[item]) & (row < work.item_ends[item]) & inside
            served |= mine
            kept |= mine & (column >= low) & (column < high)
            read |= (rank_row >= low) & (rank_row < high)

        def shrink() -> jax.Array:
            product = _dot(x[...], a_ring[place, :, at].reshape(-1, d_in), contract=(1, 1))
            return jnp.where(kept, product, 0).astype(x.dtype)

        if column_tiles == 1:
            narrow = shrink()
        else:
            where = work.tiles[t] * parts + work.fetch_parts[fetch]

            @pl.when(n == 0)
            def _keep() -> None:
                # Slots that share the tile share this place, each its own rows.
                hidden[where] = jnp.where(served, shrink(), hidden[where])

            narrow = jnp.where(served, hidden[where], 0)

        def expand(member: int, left: int, right: int) -> None:
            of_member = narrow[:, member * width : (member + 1) * width]
            of_b = jnp.where(read, b_ring[place, at, left:right], 0)
            total[:, left:right] += _dot(of_member, of_b, contract=(1, 0))

        for member, (left, right) in enumerate(itertools.pairwise(edges)):
            if column_tiles == 1:
                expand(member, left, right)
            else:
                inside = (n * columns >= left) & (n * columns < right)
                pl.when(inside)(functools.partial(expand, member, 0, columns))
        return served.astype(jnp.int32)

    def add(group: Any, served: jax.Array) -> jax.Array:
        low = jnp.maximum(first_fetch, group * size)
        high = jnp.minimum(end_fetch, (group + 1) * size)
        item = first + low - first_fetch
        fresh = (item == 0) | (work.item_fetches[jnp.maximum(item - 1, 0)] != low)
        pl.when(fresh & (low == group * size))(lambda: bring(group))
        place = place_of(n, group)
        if size == 1:
            return served | multiply(place, low, 1)
        return served | lax.cond(
            high - low == 1,
            lambda: multiply(place, low, 1),
            lambda: multiply(place, group * size, size),
        )

    total[...] = y[...].astype(jnp.float32)
    groups = first_fetch >> log_size, (end_fetch + size - 1) >> log_size
    served = lax.fori_loop(*groups, add, jnp.zeros((rows, 1), jnp.int32))
    # Rows without an adapter go back bit for bit.
    out[...] = jnp.where(served > 0, total[...].astype(out.dtype), y[...])


def _dot(left: jax.Array, right: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    return lax.dot_general(
        left,
        right,
        dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        # Said in either case, because the process may have set another default.
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


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
    name="mosaic_tpu",
    function=lora_matmul_by_size,
    block_tokens=choose_block_tokens,
    aligned=True,
    # To multiply with all of a layer's slots XLA would copy them from among the others.
    stacked=False,
)
