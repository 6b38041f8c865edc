"""The one suite that every implementation of paged attention passes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.paged_attention.op import token_rows
from kernels_pallas.paged_attention.reference import NARROW, WIDE, paged_attention
from tests.kernels_pallas.paged_problem import (
    BFLOAT16,
    FLOAT32,
    Problem,
    Rows,
    Shape,
    assert_exact,
    make,
)

IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "wide": functools.partial(paged_attention, config=WIDE),
    "narrow": functools.partial(paged_attention, config=NARROW),
}
every_implementation = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("wide", FLOAT32, id="wide-float32"),
        pytest.param("wide", BFLOAT16, id="wide-bfloat16"),
        pytest.param("narrow", FLOAT32, id="narrow-float32"),
    ],
)
both_configs = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("wide", BFLOAT16, id="wide-bfloat16"),
        pytest.param("narrow", FLOAT32, id="narrow-float32"),
    ],
)

DECODE = Shape(num_tokens=8, num_rows=8, decode=True, pages_per_row=280, num_pages=640)
MIXED = Shape(num_tokens=72, num_rows=6, pages_per_row=160, num_pages=400)
EDGES = (1, 4, 5, NARROW.span, NARROW.span + 1, WIDE.span, WIDE.span + 1, 2 * WIDE.span + 40)
BLOCK_EDGES = (NARROW.query_block, NARROW.query_block + 1, WIDE.query_block + 1, 1, 31)

CASES: dict[str, tuple[Shape, Rows]] = {
    "decode": (DECODE, ((1, 7), (1, 1), (1, 20))),
    "decode on the edges of pages and spans": (DECODE, tuple((1, n) for n in EDGES)),
    "decode without a row": (DECODE, ()),
    "one prompt": (MIXED, ((37, 37),)),
    "prompts on the edges of query blocks": (
        Shape(num_tokens=100, num_rows=5, pages_per_row=20, num_pages=100),
        tuple((n, n) for n in BLOCK_EDGES),
    ),
    "one-token prompts": (MIXED, ((1, 1),) * 6),
    "chunks with earlier context": (MIXED, ((20, WIDE.span + 22), (5, 33), (40, 300))),
    "a mixture": (MIXED, ((1, 40), (12, 12), (1, WIDE.span + 1), (9, 30), (1, 1))),
    "rows with nothing new": (MIXED, ((0, 0), (3, 3), (0, 9), (0, 0), (2, 5), (0, 30))),
    "every place taken": (MIXED, ((12, 12), (12, 64), (1, 64), (30, 33), (1, 2), (16, 30))),
    "nothing at all": (MIXED, ()),
}


@functools.cache
def op(name: str, scale: float, window: int | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return jax.jit(functools.partial(IMPLEMENTATIONS[name], scale=scale, sliding_window=window))


def check(name: str, problem: Problem) -> None:
    function = op(name, problem.shape.scale, problem.shape.sliding_window)
    out, pages = function(problem.q, problem.k, problem.v, problem.pages, problem.batch)
    assert_exact(np.asarray(out), np.asarray(pages), problem)


@every_implementation
@pytest.mark.parametrize("case", CASES)
def test_every_token_attends_to_its_own_context(name: str, dtype: np.dtype, case: str) -> None:
    check(name, make(*CASES[case], dtype))


@both_configs
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size"),
    [((4, 4), 64, 16), ((9, 3), 64, 16), ((8, 1), 16, 16), ((2, 2), 128, 4)],
    ids=str,
)
def test_any_heads_and_pages(
    name: str, dtype: np.dtype, heads: tuple[int, int], head_dim: int, page_size: int
) -> None:
    shape = Shape(
        num_tokens=24,
        num_rows=4,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        pages_per_row=544 // page_size,
        num_pages=704 // page_size,
    )
    check(name, make(shape, ((1, WIDE.span + 5), (13, 13), (6, 40)), dtype))


@both_configs
@pytest.mark.parametrize("window", [7, WIDE.span + 3])
def test_a_sliding_window_keeps_the_last_keys(name: str, dtype: np.dtype, window: int) -> None:
    shape = dataclasses.replace(MIXED, sliding_window=window)
    check(name, make(shape, ((40, 300), (1, WIDE.span + 5), (9, 9), (20, 30)), dtype))


@both_configs
def test_a_sliding_window_of_one_is_the_token_itself(name: str, dtype: np.dtype) -> None:
    problem = make(
        dataclasses.replace(DECODE, sliding_window=1), tuple((1, n) for n in EDGES), dtype
    )
    check(name, problem)


row = st.tuples(st.integers(0, 14), st.integers(0, 40)).map(lambda n: (n[0], sum(n)))


@given(rows=st.lists(row, max_size=5).map(tuple), seed=st.integers(0, 1 << 16))
@settings(max_examples=60)
def test_any_layout_of_rows(rows: Rows, seed: int) -> None:
    check("narrow", make(MIXED, rows, FLOAT32, seed))


@given(contexts=st.lists(st.integers(1, 320), max_size=8), seed=st.integers(0, 1 << 16))
@settings(max_examples=30)
def test_any_contexts_in_a_decode_step(contexts: list[int], seed: int) -> None:
    check("narrow", make(DECODE, tuple((1, n) for n in contexts), FLOAT32, seed))


def test_a_decode_step_is_a_mixture_of_single_tokens() -> None:
    """The promise of one token a row changes the program, not the result."""
    problem = make(DECODE, ((1, 7), (1, 1), (1, 200)), FLOAT32)
    as_mixture = dataclasses.replace(problem.batch, max_q_len=8)
    for batch in (problem.batch, as_mixture):
        tokens, positions, valid = token_rows(batch, 8)
        assert tokens[:3].tolist() == [0, 1, 2]
        assert positions.tolist() == [6, 0, 199, 0, 0, 0, 0, 0]
        assert valid.tolist() == [True] * 3 + [False] * 5
    check("narrow", dataclasses.replace(problem, batch=as_mixture))
