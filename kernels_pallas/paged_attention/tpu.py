"""The op on TPUs: a copy kernel for the writes, then JAX's own ragged paged attention.

``jax.experimental.pallas.ops.tpu.ragged_paged_attention`` reads pages of the op's layout, decode
steps and chunks alike, under two conditions that models do not always meet: a head is a multiple
of 128 wide, and 2 * KV heads fill the 16-bit tiles of the memory. So here a page is padded:
:func:`pool_shape` is where that is said, and nobody else knows. Queries are padded alike, by
zeros, which add nothing to a score; the outputs of padded heads are dropped.

The library looks its block sizes up by the live device; here they follow a rule, so that a program
may be compiled where there is none. The rule is the middle of the library's measured table for 32
query and 8 key heads.

Unmeasured on hardware. The library's kernel does not run in interpret mode: tests put the
library's own reference in its place, compare the copy kernel in interpret mode, and compile both
for each chip.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jaxtyping import Array, Float

from kernels_pallas.paged_attention.op import Implementation, PagedBatch, token_rows

LANES = 128
SMEM_BYTES = 1 << 20
"""Scalar memory of a core, which must hold the page table."""
VMEM_LIMIT = 40 * 2**20
"""Bytes of vector memory the compiler may use for the library's kernel."""
QUERIES_PER_BLOCK = 32
_COPIES_IN_FLIGHT = 16


def pool_shape(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int, int]:
    """Heads padded to a multiple of 128, and their number to 1, 2, 4 or a multiple of 8."""
    heads = next((n for n in (1, 2, 4) if n >= num_kv_heads), -(-num_kv_heads // 8) * 8)
    return (num_pages, page_size, 2 * heads, -(-head_dim // LANES) * LANES)


def paged_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T KV D"],
    v: Float[Array, "T KV D"],
    pages: Float[Array, "P page_size KV2 Dpad"],
    batch: PagedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "T H D"], Float[Array, "P page_size KV2 Dpad"]]:
    """Writes ``k`` and ``v`` into the pool and attends (formula: :mod:`.op`).

    Every row of the batch has a token in the step, as the engine's rows have. Scores, softmax and
    sums are float32. Raises ValueError where pages are not those of :func:`pool_shape`, and where
    the page table does not fit scalar memory. ``interpret`` is for tests, and of the writes only.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, kv2, padded_dim = pages.shape
    num_kv_heads = k.shape[1]
    shape = pool_shape(num_pages, page_size, num_kv_heads, head_dim)
    if pages.shape != shape:
        raise ValueError(f"pages {pages.shape} must be {shape}, as pool_shape has it")
    check_page_table(*batch.page_table.shape)
    pages = write_kv(k, v, pages, batch, interpret=interpret)

    group = num_heads // num_kv_heads
    more_heads = (kv2 // 2 - num_kv_heads) * group
    wide = jnp.pad(q, ((0, 0), (0, more_heads), (0, padded_dim - head_dim)))
    # Whatever the process has set: at "highest" the kernel's product of two types does not compile.
    with jax.default_matmul_precision("default"):
        out = ragged_paged_attention(
            wide,
            pages,
            batch.kv_lens,
            batch.page_table,
            batch.cu_q_lens,
            batch.num_rows,
            sm_scale=scale,
            sliding_window=sliding_window,
            num_kv_pages_per_block=pages_per_block(page_size, batch.page_table.shape[1]),
            num_queries_per_block=min(QUERIES_PER_BLOCK, num_tokens),
            vmem_limit_bytes=VMEM_LIMIT,
        )
    # Nobody wrote the outputs of padding; they may be anything.
    _, _, valid = token_rows(batch, num_tokens)
    return jnp.where(valid[:, None, None], out[:, :num_heads, :head_dim], 0), pages


def pages_per_block(page_size: int, pages_per_row: int) -> int:
    """Pages that are fetched together: 256 keys, or 4 pages if that is more."""
    return min(pages_per_row, max(4, 256 // page_size))


def check_page_table(num_rows: int, pages_per_row: int) -> None:
    """Raises ValueError unless a step's page table fits scalar memory beside the rest."""
    size, limit = 4 * num_rows * pages_per_row, SMEM_BYTES * 3 // 4
    if size > limit:
        raise ValueError(
            f"a page table of {num_rows} rows and {pages_per_row} pages is {size} bytes, a TPU's "
            f"scalar memory has room for {limit}: raise block_size, or lower max_model_len or "
            "max_num_seqs"
        )


def write_kv(
    k: Float[Array, "T KV D"],
    v: Float[Array, "T KV D"],
    pages: Float[Array, "P page_size KV2 Dpad"],
    batch: PagedBatch,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "P page_size KV2 Dpad"]:
    """The pool with every new token's keys and values in place; padding writes nothing.

    One copy a token, in device memory, some of them under way at once. XLA's scatter would do them
    one after another.
    """
    num_pages, page_size, kv2, padded_dim = pages.shape
    num_tokens, num_kv_heads, head_dim = k.shape
    row, position, valid = token_rows(batch, num_tokens)
    page = batch.page_table[row, position // page_size]
    # Tokens of the step come before its padding.
    places = jnp.where(valid, page * page_size + position % page_size, 0)
    kv = jnp.stack([k, v], axis=2).reshape(num_tokens, 2 * num_kv_heads, head_dim)
    kv = jnp.pad(kv, ((0, 0), (0, kv2 - 2 * num_kv_heads), (0, padded_dim - head_dim)))
    flat = pages.reshape(num_pages * page_size, kv2, padded_dim)
    size = math.prod(kv.shape) * pages.dtype.itemsize
    flat = pl.pallas_call(
        _write_kernel,
        name="write_kv",
        out_shape=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        input_output_aliases={3: 0},
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * size),
        interpret=interpret,
    )(places, batch.cu_q_lens[batch.num_rows], kv.astype(pages.dtype), flat)
    return flat.reshape(pages.shape)


def _write_kernel(
    places: Any, num_tokens: Any, kv: Any, pages_before: Any, pages: Any, semaphore: Any
) -> None:
    """Copies each of the first tokens' rows to its place; ``pages`` is ``pages_before``."""
    del pages_before

    def copy(token: Any) -> Any:
        return pltpu.make_async_copy(kv.at[token], pages.at[places[token]], semaphore)

    def start(token: Any, _: None) -> None:
        @pl.when(token >= _COPIES_IN_FLIGHT)
        def _wait_for_one() -> None:
            # Copies are of one size: whichever ends makes room.
            copy(token - _COPIES_IN_FLIGHT).wait()

        copy(token).start()

    count = num_tokens[0]
    lax.fori_loop(0, count, start, None)
    first = jnp.maximum(count - _COPIES_IN_FLIGHT, 0)
    lax.fori_loop(first, count, lambda token, _: copy(token).wait(), None)


IMPLEMENTATION = Implementation(
    name="ragged_paged_attention", function=paged_attention, pool_shape=pool_shape
)
