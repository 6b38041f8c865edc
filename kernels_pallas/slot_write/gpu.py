"""The op on NVIDIA Hopper, in one kernel.

An adapter of rank 16 is 84 MB at the 8B shape, read once and written once, which takes the memory
40 us; as hundreds of small kernels it was 1.5 ms. A thread block takes some two thousand elements
of the buffer, which lie as they lay in the file: those of A go as they are to where they go, those
of B element by element, as B is transposed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector
from jaxtyping import Array, Float, Int32

from kernels_pallas.slot_write.op import ABSENT, TILE, Implementation, Pair, padded

_THREADS = 128
_ALIGNMENT = 8
"""Bytes that a thread loads at once."""
_MOST = 2048
"""Elements of a piece, which a warpgroup loads before it stores them."""


def problem(d_in: int, splits: Sequence[int], dtype: Any) -> str | None:
    """What keeps a group of linears from being written by the kernel, if anything does."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it writes bfloat16 and float16, not {jnp.dtype(dtype)}"
    # Then eight ranks, the fewest a buffer has, are as many elements as the threads load at once.
    if math.gcd(d_in, *splits) % 64:
        return f"widths of {d_in} and {tuple(splits)} are not multiples of 64"
    return None


def write_slot(
    pairs: Sequence[Pair],
    buffer: Float[Array, " size"],
    places: Int32[Array, "L members 2"],
    scales: Float[Array, "L members"],
    slot: Int32[Array, ""],
    *,
    splits: Sequence[tuple[int, ...]],
    rank: int,
) -> list[Pair]:
    """The op (:mod:`.op`) in bfloat16 or float16, from a buffer of either or float32. Places are
    multiples of 8 bytes, ``rank`` is 8 or a multiple of 16, and :func:`problem` has nothing to say
    of the widths."""
    if rank != TILE // 2 and rank % TILE:
        raise ValueError(f"rank {rank} must be {TILE // 2} or a multiple of {TILE}")
    # A row a slot: the index of an element of all is more than 32 bits have.
    refs = [
        jax.new_ref(array.reshape(array.shape[0] * array.shape[1], -1))
        for pair in pairs
        for array in pair
    ]
    kernel = _build(pairs, splits, rank, buffer.dtype)
    kernel(*refs, buffer, places, scales, slot.reshape(1))
    written = iter([jax.freeze(ref) for ref in refs])
    return [
        Pair(next(written).reshape(pair.a.shape), next(written).reshape(pair.b.shape))
        for pair in pairs
    ]


def _build(pairs: Sequence[Pair], splits: Sequence[tuple[int, ...]], rank: int, source: Any) -> Any:
    """Builds the kernel for pairs of these shapes: (a, b, ... as Refs, a row a slot; buffer,
    places, scales, slot) -> nothing."""
    num_layers, num_slots = pairs[0].a.shape[:2]
    dtype = pairs[0].a.dtype
    # d_in, capacity, d_out
    dims = [(pair.a.shape[3], *pair.b.shape[2:]) for pair in pairs]
    filled, vec = padded(rank), _ALIGNMENT // jnp.dtype(source).itemsize
    # What each thread block writes: whole pieces of one matrix.
    a_pieces = [_piece(rank * d_in) for d_in, _, _ in dims]
    b_pieces = [[_piece(rank * width) for width in widths] for widths in splits]
    counts = []
    for (d_in, _, _), widths, piece, pieces in zip(dims, splits, a_pieces, b_pieces, strict=True):
        counts.append(len(widths) * filled * d_in // piece)
        counts += [rank * width // p for width, p in zip(widths, pieces, strict=True)]
    edges = list(itertools.accumulate(counts, initial=0))

    def kernel(*refs):
        *arrays, buffer, places, scales, slot = refs
        layer, block = lax.axis_index("layer"), lax.axis_index("block")
        row = layer * num_slots + slot[0]

        def load(place, at, size):
            """Elements of a matrix from ``at`` on; zeros if there is no such matrix."""
            is_there = place != ABSENT
            start = jnp.where(is_there, place + at, 0)
            return jnp.where(is_there, buffer[pl.ds(start, size)], 0)

        def write_a(a, group, first_member, index):
            d_in, capacity, _ = dims[group]
            piece = a_pieces[group]
            each = filled * d_in // piece
            member, at = index // each, index % each * piece
            place = places[layer, first_member + member, 0]
            if filled > rank:
                # Above the adapter's own ranks are zeros.
                place = jnp.where(at < rank * d_in, place, ABSENT)
            part = load(place, at, piece).astype(dtype)
            a[row, pl.ds(member * capacity * d_in + at, piece)] = part

        def write_b(b, group, member, number, index):
            piece = b_pieces[group][member]
            at, column = index * piece, sum(splits[group][:member])
            part = load(places[layer, number, 1], at, piece).astype(jnp.float32)
            part = (part * scales[layer, number]).astype(dtype)
            _scatter(b, part, row, at, column, vec=vec, rank=rank, d_out=dims[group][2])

        edge, first_member = iter(itertools.pairwise(edges)), 0
        for group, widths in enumerate(splits):
            a, b = arrays[2 * group : 2 * group + 2]
            begin, end = next(edge)
            pl.when((block >= begin) & (block < end))(
                functools.partial(write_a, a, group, first_member, block - begin)
            )
            for member in range(len(widths)):
                begin, end = next(edge)
                pl.when((block >= begin) & (block < end))(
                    functools.partial(
                        write_b, b, group, member, first_member + member, block - begin
                    )
                )
            first_member += len(widths)

    return pl.kernel(
        kernel,
        mesh=plgpu.Mesh(grid=(num_layers, edges[-1]), grid_names=("layer", "block")),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="write_slot",
    )


def _piece(count: int) -> int:
    """Elements of each piece of so many, a multiple of what the threads load at once."""
    return math.gcd(count, _MOST)


def _scatter(
    b: Any, part: Any, row: Any, at: Any, column: int, *, vec: int, rank: int, d_out: int
) -> None:
    """Stores a piece of a member's B ``[width, rank]``, from its element ``at`` on, transposed:
    element (c, r) goes to ``b[row, r * d_out + column + c]``."""
    scalar = plgpu.Layout.WG_SPLAT
    strided = plgpu.Layout.WG_STRIDED(part.shape, vec_size=vec)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), strided, scalar, scalar))
    def scatter(_, b, part, row, at):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        const = functools.partial(mgpu_utils.c, ty=i32)
        (row,), (at,) = row.registers.flat, at.registers.flat
        row = arith.index_castui(index, row)
        thread = arith.remui(mgpu_utils.thread_idx(), const(_THREADS))
        first = arith.addi(at, arith.muli(thread, const(vec)))
        for n, register in enumerate(part.registers.flat):
            place = arith.addi(first, const(n * _THREADS * vec))
            c, r = arith.divui(place, const(rank)), arith.remui(place, const(rank))
            to = arith.addi(arith.muli(r, const(d_out)), c)
            for i in range(vec):
                value = vector.extract(register, [], [i])
                values = [value]
                if rank % TILE:
                    # Half a tile: each rank has one above it to be filled.
                    values.append(mgpu_utils.c(0.0, value.type))
                for j, value in enumerate(values):
                    offset = const((i + j * rank) * d_out + column)
                    memref.store(value, b, [row, arith.index_castui(index, arith.addi(to, offset))])

    scatter(b, part, row, at)


IMPLEMENTATION = Implementation(name="mosaic_gpu", function=write_slot, alignment=_ALIGNMENT)
"""The kernel on NVIDIA Hopper."""
