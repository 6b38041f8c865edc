"""Paged attention's Mosaic GPU kernel on the suite's oracle, in the shapes that it serves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from kernels_pallas.paged_attention import gpu
from kernels_pallas.paged_attention.gpu_plan import Config
from tests.kernels_pallas.paged_problem import (
    BFLOAT16,
    Problem,
    Rows,
    Shape,
    assert_exact,
    bits,
    make,
)

pytestmark = pytest.mark.gpu

FLOAT16 = np.dtype(np.float16)
EDGES = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 609)
MODELS = {
    "llama-8b": {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16},
    "a quarter of llama-8b": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 16},
    "smollm2-135m": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "page_size": 16},
    "no groups": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "page_size": 32},
    "one key head": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 128, "page_size": 8},
    "groups of 7": {"num_heads": 14, "num_kv_heads": 2, "head_dim": 128, "page_size": 64},
    "wide pages": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 128},
}
MIXES: dict[str, Rows] = {
    "one prompt": ((100, 100),),
    "prompts on the edges of blocks": tuple((n, n) for n in (63, 64, 65, 15, 16, 17, 1)),
    "chunks with earlier context": ((20, 150), (5, 33), (100, 300)),
    "a mixture": ((1, 40), (12, 12), (1, 129), (90, 130), (1, 1), (0, 9), (1, 609)),
    "nothing at all": (),
}


@functools.cache
def op(scale: float, config: Config | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    function = functools.partial(gpu.paged_attention, scale=scale, config=config)
    return jax.jit(function, donate_argnums=3)


def run(problem: Problem, config: Config | None = None) -> tuple[np.ndarray, np.ndarray]:
    function = op(problem.shape.scale, config)
    out, pages = function(problem.q, problem.k, problem.v, problem.pages, problem.batch)
    return np.asarray(out), np.asarray(pages)


def shape(model: str, *, num_tokens: int, num_rows: int, decode: bool) -> Shape:
    sizes = MODELS[model]
    pages_per_row = -(-700 // sizes["page_size"])
    return Shape(
        num_tokens=num_tokens,
        num_rows=num_rows,
        pages_per_row=pages_per_row,
        num_pages=num_rows * pages_per_row + 3,
        decode=decode,
        **sizes,
    )


def decode(model: str, num_rows: int, contexts: tuple[int, ...], dtype: np.dtype) -> Problem:
    step = shape(model, num_tokens=num_rows, num_rows=num_rows, decode=True)
    return make(step, tuple((1, n) for n in contexts), dtype)


def decode_of_any_length(
    model: str, num_rows: int, contexts: tuple[int, ...], dtype: np.dtype
) -> Problem:
    """Of up to 8192 keys, in a pool that has just these."""
    page_size = MODELS[model]["page_size"]
    step = Shape(
        num_tokens=num_rows,
        num_rows=num_rows,
        pages_per_row=-(-8192 // page_size),
        num_pages=sum(-(-n // page_size) for n in contexts) + 3,
        decode=True,
        **MODELS[model],
    )
    return make(step, tuple((1, n) for n in contexts), dtype)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_decode(model: str, dtype: np.dtype) -> None:
    problem = decode(model, 16, EDGES, dtype)
    assert_exact(*run(problem), problem)


@pytest.mark.parametrize("model", ["llama-8b", "smollm2-135m"])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 33, 80])
def test_decode_of_any_number_of_rows(model: str, num_rows: int) -> None:
    contexts = tuple(1 + (37 * i + 608) % 609 for i in range(num_rows))
    problem = decode(model, num_rows, contexts, BFLOAT16)
    assert_exact(*run(problem), problem)


@pytest.mark.parametrize("more", [1, 5, 17, 64])
@pytest.mark.parametrize(("tile", "stages"), [(64, 2), (64, 3), (128, 2)])
def test_every_configuration(more: int, tile: int, stages: int) -> None:
    problem = decode("llama-8b", 16, EDGES, BFLOAT16)
    config = Config(more=more, tile=tile, stages=stages)
    out, pages = run(problem, config)
    assert_exact(out, pages, problem)
    for _ in range(3):
        np.testing.assert_array_equal(bits(run(problem, config)[0]), bits(out))


@pytest.mark.parametrize("model", MODELS)
def test_long_contexts_among_short_ones(model: str) -> None:
    """Many parts of few rows, in each of the calls that share a plan and its counters."""
    contexts = (3000, 65, 1, 8190, 17, 640, *(30 + i for i in range(26)))
    problem = decode_of_any_length(model, 32, contexts, BFLOAT16)
    step = problem.shape

    @functools.partial(jax.jit, donate_argnums=3)
    def three_times(q: Any, k: Any, v: Any, pages: Any, batch: Any) -> tuple[Any, Any]:
        shared, q = gpu.share(batch, q, num_heads=step.num_heads, num_kv_heads=step.num_kv_heads)
        batch = dataclasses.replace(batch, shared=shared)
        outs = []
        for _ in range(3):
            out, pages = gpu.paged_attention(q, k, v, pages, batch, scale=step.scale)
            outs.append(out)
        return outs, pages

    outs, pages = three_times(problem.q, problem.k, problem.v, problem.pages, problem.batch)
    assert_exact(np.asarray(outs[0]), np.asarray(pages), problem)
    for out in outs[1:]:
        np.testing.assert_array_equal(bits(np.asarray(out)), bits(np.asarray(outs[0])))


def test_decode_without_a_row() -> None:
    problem = decode("llama-8b", 4, (), BFLOAT16)
    assert_exact(*run(problem), problem)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("model", MODELS)
def test_chunks(model: str, mix: str) -> None:
    problem = make(shape(model, num_tokens=256, num_rows=8, decode=False), MIXES[mix], BFLOAT16)
    assert_exact(*run(problem), problem)


@pytest.mark.parametrize("more", [4, 16])
@pytest.mark.parametrize("model", MODELS)
def test_parts_of_a_context_that_a_query_does_not_see(model: str, more: int) -> None:
    rows = ((60, 90), (1, 70), (2, 65), (30, 600))
    problem = make(shape(model, num_tokens=100, num_rows=4, decode=False), rows, BFLOAT16)
    assert_exact(*run(problem, Config(more=more)), problem)
