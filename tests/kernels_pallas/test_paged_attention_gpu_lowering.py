"""The Mosaic GPU kernel lowers for CUDA on any machine: what it computes is tested on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.paged_attention import gpu, gpu_plan
from kernels_pallas.paged_attention.op import PagedBatch

LLAMA_8B = {"heads": (32, 8), "head_dim": 128}
SMOLLM2_135M = {"heads": (9, 3), "head_dim": 64}


def lowered(
    *,
    heads: tuple[int, int],
    head_dim: int,
    num_tokens: int,
    num_rows: int,
    page_size: int = 16,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> str:
    num_heads, num_kv = heads
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = PagedBatch(
        cu_q_lens=integers((num_rows + 1,)),
        kv_lens=integers((num_rows,)),
        page_table=integers((num_rows, 4096 // page_size)),
        num_rows=integers((1,)),
        max_q_len=1 if num_tokens == num_rows else num_tokens,
    )
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in (
            (num_tokens, num_heads, head_dim),
            (num_tokens, num_kv, head_dim),
            (num_tokens, num_kv, head_dim),
            (1000, page_size, 2 * num_kv, head_dim),
        )
    ]
    function = functools.partial(gpu.paged_attention, scale=head_dim**-0.5, **options)
    traced = jax.jit(function, donate_argnums=3).trace(*arrays, batch)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("model", [LLAMA_8B, SMOLLM2_135M], ids=["llama-8b", "smollm2-135m"])
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(1, 1), (64, 64), (256, 256), (2048, 256)])
def test_every_step_lowers(model: dict[str, Any], num_tokens: int, num_rows: int) -> None:
    assert "@mosaic_gpu" in lowered(**model, num_tokens=num_tokens, num_rows=num_rows)


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size"),
    [((8, 8), 64, 8), ((8, 1), 128, 32), ((14, 2), 128, 64), ((64, 8), 128, 128)],
)
def test_any_heads_and_pages(heads: tuple[int, int], head_dim: int, page_size: int) -> None:
    for num_tokens, num_rows in ((8, 8), (128, 8)):
        assert "@mosaic_gpu" in lowered(
            heads=heads,
            head_dim=head_dim,
            page_size=page_size,
            num_tokens=num_tokens,
            num_rows=num_rows,
            dtype=jnp.float16,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 96}, "head size 96"),
        ({"page_size": 24}, "page size 24"),
        ({"dtype": jnp.float32}, "float32"),
        ({"sliding_window": 128}, "no sliding window"),
    ],
)
def test_what_it_cannot_serve_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowered(**{**LLAMA_8B, **changes}, num_tokens=4, num_rows=4)


def test_parts_of_a_context_add_up() -> None:
    """A part without keys, and rows that see no key at all, leave no trace."""
    scores = np.random.default_rng(0).standard_normal((3, 6, 4)) * 5  # [part, row, key]
    values = np.random.default_rng(1).standard_normal((3, 6, 4, 8))
    seen = np.random.default_rng(2).random((3, 6)) < 0.6
    seen[:, 2] = False
    weights = np.where(seen[..., None], np.exp2(scores), 0)
    total = weights.sum(axis=-1)
    safe = np.where(total == 0, 1, total)
    out = np.einsum("prk,prkd->prd", weights, values) / safe[..., None]
    level = np.where(total == 0, -1e30, np.log2(safe))
    partial = np.concatenate([out, np.repeat(level[..., None], 32, axis=-1)], axis=-1)
    combined = gpu_plan.combine(jnp.asarray(partial, jnp.float32), 8, jnp.float32)
    everything = np.einsum("prk,prkd->rd", weights, values)
    expected = everything / np.where(total.sum(0) == 0, 1, total.sum(0))[:, None]
    np.testing.assert_allclose(combined, expected, atol=1e-5)


def test_blocks_cover_every_token_once() -> None:
    batch = PagedBatch(
        cu_q_lens=np.array([0, 20, 20, 21, 21, 21], np.int32),
        kv_lens=np.array([50, 9, 33, 0, 0], np.int32),
        page_table=np.zeros((5, 4), np.int32),
        num_rows=np.array([3], np.int32),
        max_q_len=30,
    )
    blocks = np.asarray(gpu_plan.chunk_blocks(batch, 30, 16))
    assert blocks[blocks[:, 2] > 0].tolist() == [
        [0, 0, 16, 46],  # sees what its last token sees
        [0, 16, 4, 50],
        [2, 20, 1, 33],
        [4, 21, 9, 0],  # padding: without context
    ]
