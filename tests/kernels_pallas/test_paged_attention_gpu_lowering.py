"""The Mosaic GPU kernel lowers for CUDA on any machine: what it computes is tested on a GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
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
    is_shared: bool = False,
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

    def function(q: Any, k: Any, v: Any, pages: Any, batch: PagedBatch) -> Any:
        if is_shared:
            shared, q = gpu.share(batch, q, num_heads=num_heads, num_kv_heads=num_kv)
            batch = dataclasses.replace(batch, shared=shared)
        return gpu.paged_attention(q, k, v, pages, batch, scale=head_dim**-0.5, **options)

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


def test_what_is_shared_with_the_plan_is_there_no_sooner() -> None:
    """Attention reads the plan before the kernel in front of it has ended, so nothing that leads to
    that one may begin without it, whatever XLA knows of the plan's numbers."""

    def after_the_plan(kv_lens: Any, x: Any) -> Any:
        batch = PagedBatch(
            cu_q_lens=jnp.arange(9, dtype=jnp.int32),
            kv_lens=kv_lens,
            page_table=jnp.zeros((8, 4), jnp.int32),
            num_rows=jnp.full(1, 8, jnp.int32),
            max_q_len=1,
        )
        return gpu.share(batch, x, num_heads=8, num_kv_heads=2)[1]

    kv_lens, x = jnp.arange(8, dtype=jnp.int32), jnp.arange(8)
    program = jax.jit(after_the_plan).lower(kv_lens, x).compile()
    np.testing.assert_array_equal(program(kv_lens, x), x)
    hlo = program.as_text()
    assert hlo is not None
    assert "reduce" in hlo.split("ENTRY")[1]


def test_a_plan_for_another_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not for Config\(more=3"):
        lowered(
            **LLAMA_8B, num_tokens=8, num_rows=8, config=gpu_plan.Config(more=3), is_shared=True
        )


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


@pytest.mark.parametrize("more", [1, 3, 17])
@hypothesis.given(
    # Few numbers of blocks, because each is compiled for.
    contexts=st.sampled_from([1, 2, 5, 12, 20]).flatmap(
        lambda count: st.lists(
            st.integers(0, 700) | st.integers(0, 40000), min_size=count, max_size=count
        )
    )
)
def test_parts_cover_every_context_once(more: int, contexts: list[int]) -> None:
    config = gpu_plan.Config(more=more)
    number = len(contexts)
    count = np.array([i % 5 for i in range(number)])
    blocks = np.stack([np.arange(number), 16 * np.arange(number), count, contexts], axis=1)
    cut = jax.jit(gpu_plan.cut, static_argnums=1)
    parts = np.asarray(cut(jnp.asarray(blocks, jnp.int32), config))
    assert parts.shape == (number + more, 7)
    mine = [parts[parts[:, 0] == i] for i in range(1, number)]
    mine.append(parts[(parts[:, 0] == 0) & (parts[:, 6] + parts[:, 5] > 0)])
    slots: list[int] = []
    for of_block in mine:
        row, number_of = of_block[0, 0], len(of_block)
        assert (of_block[:, :4] == blocks[row]).all()
        assert of_block[:, 4].tolist() == list(range(number_of))
        assert (of_block[:, 5] == number_of).all()
        assert len(set(of_block[:, 6].tolist())) == 1
        if number_of > 1:
            slots += range(of_block[0, 6], of_block[0, 6] + number_of)
    assert sum(len(of_block) for of_block in mine) == (parts[:, 5] > 0).sum()
    # Each has a slot of its own.
    assert len(set(slots)) == len(slots)
    assert all(slot < config.slots for slot in slots)
    # The longest first, none of which is longer than its share.
    needed = parts[parts[:, 5] > 0]
    tiles = np.where(needed[:, 2] > 0, -(-needed[:, 3] // config.tile), 0)
    longest = -(-tiles // needed[:, 5])
    assert (np.diff(longest) <= 0).all()
    total = sum(-(-end // config.tile) for end, of in zip(contexts, count, strict=True) if of)
    assert longest.max() <= max(2, -(-total // more))
    assert not parts[len(needed) :, 2].any()
