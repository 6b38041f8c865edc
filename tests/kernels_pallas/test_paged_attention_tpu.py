"""Paged attention on TPUs, on the suite's oracle, by way of what can run without one.

The library's kernel has no interpret mode: its place is taken by the library's own reference, which
says what the kernel is to compute from the same arguments. The writes run in interpret mode.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as library

from kernels_pallas.paged_attention import tpu
from tests.kernels_pallas.paged_problem import (
    BFLOAT16,
    FLOAT32,
    Problem,
    Rows,
    Shape,
    assert_exact,
    bits,
    make,
)

INTERPRET = pltpu.InterpretParams()
MIXED = Shape(num_tokens=72, num_rows=6, page_size=16, pages_per_row=20, num_pages=80)
DECODE = Shape(num_tokens=8, num_rows=8, page_size=16, pages_per_row=4, num_pages=40, decode=True)
SMOLLM2 = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
CASES: dict[str, tuple[Shape, Rows]] = {
    "decode": (DECODE, tuple((1, n) for n in (1, 15, 16, 17, 64))),
    "a mixture": (MIXED, ((1, 40), (12, 12), (1, 129), (9, 30), (1, 1))),
    "every place taken": (MIXED, ((12, 12), (12, 64), (1, 64), (30, 33), (1, 2), (16, 30))),
    "smollm2": (dataclasses.replace(MIXED, **SMOLLM2), ((20, 150), (5, 33), (40, 300))),
    "heads of 128": (
        dataclasses.replace(MIXED, num_heads=8, num_kv_heads=8, head_dim=128),
        ((31, 31), (1, 70)),
    ),
    "one key head": (dataclasses.replace(MIXED, num_heads=7, num_kv_heads=1), ((3, 31), (40, 40))),
    "a window": (dataclasses.replace(MIXED, sliding_window=7), ((3, 31), (40, 40), (1, 300))),
}


class Calls:
    """Stands in for the library's kernel, and knows what it was asked."""

    def __init__(self) -> None:
        self.options: list[dict[str, Any]] = []

    def __call__(self, q: jax.Array, pages: jax.Array, *batch: jax.Array, **options: Any) -> Any:
        self.options.append(options)
        library.static_validate_inputs(q, pages, *batch, **options)
        library.dynamic_validate_inputs(q, pages, *batch, **options)
        heads = q.shape[1], pages.shape[2]
        library.get_min_heads_per_blk(*heads, jnp.bfloat16, jnp.bfloat16)
        assert q.shape[2] % 128 == 0
        asked = {name: options[name] for name in ("sm_scale", "sliding_window")}
        out = library.ref_ragged_paged_attention(q, pages, *batch, **asked)
        # The kernel leaves the outputs of padding as it finds them.
        return jnp.full(q.shape, jnp.nan, q.dtype).at[: len(out)].set(out)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(tpu, "ragged_paged_attention", calls)
    return calls


def padded_pool(problem: Problem) -> np.ndarray:
    """The problem's pool in the kernel's layout, with zeros for padding as the engine's has."""
    shape = problem.shape
    wide = tpu.pool_shape(shape.num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
    pool = np.zeros(wide, problem.pages.dtype)
    _, _, kv2, head_dim = problem.pages.shape
    pool[:, :, :kv2, :head_dim] = problem.pages
    return pool


def run(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, pool, and the pool without padding."""
    q, k, v, pool = map(jnp.asarray, (problem.q, problem.k, problem.v, padded_pool(problem)))
    out, pool = tpu.paged_attention(
        q,
        k,
        v,
        pool,
        jax.tree.map(jnp.asarray, problem.batch),
        scale=problem.shape.scale,
        sliding_window=problem.shape.sliding_window,
        interpret=INTERPRET,
    )
    _, _, kv2, head_dim = problem.pages.shape
    return np.asarray(out), np.asarray(pool), np.asarray(pool)[:, :, :kv2, :head_dim]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(case, FLOAT32, id=f"{case}-float32") for case in CASES),
        pytest.param("smollm2", BFLOAT16, id="smollm2-bfloat16"),
    ],
)
def test_every_token_attends_to_its_own_context(calls: Calls, case: str, dtype: np.dtype) -> None:
    shape, rows = CASES[case]
    problem = make(shape, rows, dtype)
    if shape.sliding_window is not None:
        # The kernel adds to the scores of keys outside the window; the engine has finite ones.
        finite = np.where(np.isnan(problem.pages), problem.pages.dtype.type(0), problem.pages)
        problem = dataclasses.replace(problem, pages=finite)
    out, pool, pages = run(problem)
    assert_exact(out, np.ascontiguousarray(pages), problem)
    # Padding stays zero: it is a factor of every score.
    _, _, kv2, head_dim = problem.pages.shape
    assert not pool[:, :, kv2:].any()
    assert not pool[..., head_dim:].any()
    (options,) = calls.options
    assert options["num_queries_per_block"] == min(32, shape.num_tokens)
    assert options["vmem_limit_bytes"] == tpu.VMEM_LIMIT


@pytest.mark.parametrize(
    ("page_size", "pages_per_row", "pages"),
    [(16, 256, 16), (16, 3, 3), (64, 256, 4), (128, 32, 4), (256, 16, 4), (256, 1, 1)],
)
def test_blocks_of_keys(page_size: int, pages_per_row: int, pages: int) -> None:
    assert tpu.pages_per_block(page_size, pages_per_row) == pages


def test_more_tokens_than_copies_under_way() -> None:
    problem = make(MIXED, ((12, 12), (12, 64), (1, 64), (30, 33), (1, 2)), BFLOAT16)
    assert sum(count for count, _ in problem.rows) > 3 * tpu._COPIES_IN_FLIGHT
    batch = jax.tree.map(jnp.asarray, problem.batch)
    k, v, pool = map(jnp.asarray, (problem.k, problem.v, padded_pool(problem)))
    pages = np.asarray(tpu.write_kv(k, v, pool, batch, interpret=INTERPRET))
    _, _, kv2, head_dim = problem.pages.shape
    written = np.ascontiguousarray(pages[:, :, :kv2, :head_dim])
    np.testing.assert_array_equal(bits(written), bits(problem.expected_pages()))


def test_a_pool_without_padding_is_refused() -> None:
    problem = make(MIXED, ((3, 3),), FLOAT32)
    q, k, v, pool = map(jnp.asarray, (problem.q, problem.k, problem.v, problem.pages))
    with pytest.raises(ValueError, match=r"\(80, 16, 4, 16\) must be \(80, 16, 4, 128\)"):
        tpu.paged_attention(q, k, v, pool, problem.batch, scale=1.0)


def test_a_page_table_too_large_for_scalar_memory_is_refused() -> None:
    tpu.check_page_table(256, 512)
    with pytest.raises(ValueError, match="raise block_size, or lower max_model_len or max_num"):
        tpu.check_page_table(256, 8192)


@pytest.mark.parametrize(
    ("heads", "head_dim", "shape"),
    [
        (3, 64, (5, 16, 8, 128)),
        (1, 128, (5, 16, 2, 128)),
        (8, 80, (5, 16, 16, 128)),
        (5, 256, (5, 16, 16, 256)),
        (9, 100, (5, 16, 32, 128)),
    ],
)
def test_pools_are_padded(heads: int, head_dim: int, shape: tuple[int, ...]) -> None:
    assert tpu.pool_shape(5, 16, heads, head_dim) == shape
