"""The one suite that every implementation of paged attention passes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.paged_attention.op import token_rows
from kernels_pallas.paged_attention.reference import CONTEXT_SPAN, QUERY_BLOCK
from tests.kernels_pallas.paged_problem import (
    BFLOAT16,
    FLOAT32,
    Problem,
    Rows,
    Shape,
    assert_exact,
    make,
)

every_implementation = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("reference", FLOAT32, id="reference-float32"),
        pytest.param("reference", BFLOAT16, id="reference-bfloat16"),
    ],
)

DECODE = Shape(num_tokens=8, num_rows=8, decode=True, pages_per_row=80, num_pages=640)
MIXED = Shape(num_tokens=72, num_rows=6)
LONG = Shape(num_tokens=72, num_rows=6, pages_per_row=80, num_pages=400)
EDGES = (1, 3, 4, 5, CONTEXT_SPAN - 1, CONTEXT_SPAN, CONTEXT_SPAN + 1, 2 * CONTEXT_SPAN + 40)

CASES: dict[str, tuple[Shape, Rows]] = {
    "decode": (DECODE, ((1, 7), (1, 1), (1, 20))),
    "decode on the edges of pages and spans": (DECODE, tuple((1, n) for n in EDGES)),
    "decode without a row": (DECODE, ()),
    "one prompt": (MIXED, ((37, 37),)),
    "prompts on the edges of query blocks": (
        Shape(num_tokens=4 * QUERY_BLOCK + 3, num_rows=5, pages_per_row=20, num_pages=100),
        tuple((n, n) for n in (QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 1, QUERY_BLOCK)),
    ),
    "one-token prompts": (MIXED, ((1, 1),) * 6),
    "chunks with earlier context": (LONG, ((20, CONTEXT_SPAN + 22), (5, 33), (40, 300))),
    "a mixture": (LONG, ((1, 40), (12, 12), (1, CONTEXT_SPAN + 1), (9, 30), (1, 1))),
    "rows with nothing new": (MIXED, ((0, 0), (3, 3), (0, 9), (0, 0), (2, 5), (0, 30))),
    "every place taken": (MIXED, ((12, 12), (12, 64), (1, 64), (30, 33), (1, 2), (16, 30))),
    "nothing at all": (MIXED, ()),
}


@functools.cache
def op(name: str, scale: float, window: int | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    module = importlib.import_module(f"kernels_pallas.paged_attention.{name}")
    function: Callable[..., tuple[jax.Array, jax.Array]] = module.paged_attention
    return jax.jit(functools.partial(function, scale=scale, sliding_window=window))


def check(name: str, problem: Problem) -> None:
    function = op(name, problem.shape.scale, problem.shape.sliding_window)
    out, pages = function(problem.q, problem.k, problem.v, problem.pages, problem.batch)
    assert_exact(np.asarray(out), np.asarray(pages), problem)


@every_implementation
@pytest.mark.parametrize("case", CASES)
def test_every_token_attends_to_its_own_context(name: str, dtype: np.dtype, case: str) -> None:
    check(name, make(*CASES[case], dtype))


@every_implementation
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size"),
    [((4, 4), 64, 16), ((9, 3), 64, 16), ((8, 1), 16, 16), ((6, 2), 128, 4), ((2, 2), 128, 16)],
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
        pages_per_row=160 // page_size,
        num_pages=480 // page_size,
    )
    check(name, make(shape, ((1, CONTEXT_SPAN + 5), (13, 13), (6, 40)), dtype))


@every_implementation
@pytest.mark.parametrize("window", [1, 7, CONTEXT_SPAN + 3, 4096])
def test_a_sliding_window_keeps_the_last_keys(name: str, dtype: np.dtype, window: int) -> None:
    decode = dataclasses.replace(DECODE, sliding_window=window)
    check(name, make(decode, tuple((1, n) for n in EDGES), dtype))
    mixed = dataclasses.replace(LONG, sliding_window=window)
    check(name, make(mixed, ((40, 300), (1, CONTEXT_SPAN + 5), (9, 9), (20, 30)), dtype))


row = st.tuples(st.integers(0, 14), st.integers(0, 40)).map(lambda n: (n[0], sum(n)))


@given(rows=st.lists(row, max_size=4).map(tuple), seed=st.integers(0, 1 << 16))
@settings(max_examples=60)
def test_any_layout_of_rows(rows: Rows, seed: int) -> None:
    shape = Shape(num_tokens=56, num_rows=4)
    check("reference", make(shape, rows, FLOAT32, seed))


@given(contexts=st.lists(st.integers(1, 320), max_size=8), seed=st.integers(0, 1 << 16))
@settings(max_examples=30)
def test_any_contexts_in_a_decode_step(contexts: list[int], seed: int) -> None:
    check("reference", make(DECODE, tuple((1, n) for n in contexts), FLOAT32, seed))


def test_a_decode_step_is_a_mixture_of_single_tokens() -> None:
    """The promise of one token a row changes the program, not the result."""
    problem = make(DECODE, ((1, 7), (1, 1), (1, 200)), FLOAT32)
    as_mixture = dataclasses.replace(problem.batch, max_q_len=8)
    for batch in (problem.batch, as_mixture):
        tokens, positions, valid = token_rows(batch, 8)
        assert tokens[:3].tolist() == [0, 1, 2]
        assert positions.tolist() == [6, 0, 199, 0, 0, 0, 0, 0]
        assert valid.tolist() == [True] * 3 + [False] * 5
    check("reference", dataclasses.replace(problem, batch=as_mixture))
