"""What surrounds a decode step's linears and attention in kernels of its own: norm, rotary
positions, writing keys and values."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.models.layers import RMSNorm, rotate
from kernels_pallas.lora_linear import gpu_norm
from kernels_pallas.paged_attention import gpu, gpu_new, gpu_rotate
from tests.kernels_pallas.paged_problem import BFLOAT16, Problem, Shape, assert_exact, bits
from tests.kernels_pallas.test_paged_attention_gpu import (
    EDGES,
    MIXES,
    MODELS,
    decode,
    decode_of_any_length,
    make,
    shape,
)

SIZES = (128, 896, 1024, 3072, 4096)
SERVED = ("llama-8b", "a quarter of llama-8b", "no groups", "groups of 7")
TURNED = [name for name, sizes in MODELS.items() if sizes["head_dim"] == gpu_new.HEAD_DIM]
"""Whose queries and keys attention turns in decode steps."""


def tables(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Of any angles."""
    half = problem.shape.head_dim // 2
    angles = np.random.default_rng(2).uniform(-4, 4, (problem.shape.num_tokens, 1, half))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def quarter_turns(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Angles that leave nothing to round."""
    half = problem.shape.head_dim // 2
    turns = np.random.default_rng(3).integers(0, 4, (problem.shape.num_tokens, 1, half))
    cos, sin = np.array([1, 0, -1, 0]), np.array([0, 1, 0, -1])
    return cos[turns].astype(np.float32), sin[turns].astype(np.float32)


def turned(x: np.ndarray, turn: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """As XLA turns queries or keys."""
    return np.asarray(rotate(jnp.asarray(x), jax.tree.map(jnp.asarray, turn)))


def joined(problem: Problem) -> np.ndarray:
    """As the linear yields them."""
    return np.concatenate([problem.q, problem.k, problem.v], axis=1)


def check_rotation(problem: Problem) -> None:
    """Queries and keys as XLA turns them, give or take a bit of float32 before they are rounded;
    values as they came; and nothing else is written."""
    turn = tables(problem)
    function = jax.jit(gpu_rotate.rotate_and_write, donate_argnums=2)
    q, pages = (
        np.asarray(out) for out in function(joined(problem), turn, problem.pages, problem.batch)
    )
    tokens = sum(count for count, _ in problem.rows)
    np.testing.assert_allclose(
        q[:tokens].astype(np.float32),
        turned(problem.q, turn)[:tokens].astype(np.float32),
        rtol=2**-7,
        atol=1e-6,
    )
    check_pages(problem, pages, turn)


def check_pages(problem: Problem, pages: np.ndarray, turn: tuple[np.ndarray, np.ndarray]) -> None:
    """New keys are turned, new values are as they came, and nothing else is written."""
    turned_k = turned(problem.k, turn)
    expected = problem.expected_pages()
    at = 0
    for row, (count, kv_len) in enumerate(problem.rows):
        for position in range(kv_len - count, kv_len):
            page, offset = divmod(position, problem.shape.page_size)
            written = pages[problem.batch.page_table[row, page], offset]
            np.testing.assert_allclose(
                written[0::2].astype(np.float32),
                turned_k[at].astype(np.float32),
                rtol=2**-7,
                atol=1e-6,
            )
            expected[problem.batch.page_table[row, page], offset, 0::2] = written[0::2]
            at += 1
    np.testing.assert_array_equal(bits(pages), bits(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("model", SERVED)
@pytest.mark.parametrize("mix", MIXES)
def test_rotation_of_prompts(model: str, mix: str) -> None:
    step = shape(model, num_tokens=512, num_rows=12, decode=False)
    check_rotation(make(step, MIXES[mix], BFLOAT16))


@pytest.mark.gpu
@pytest.mark.parametrize("model", SERVED)
@pytest.mark.parametrize("contexts", [(609,), (1, 16, 17, 609, 64, 65)])
def test_rotation_of_decode_steps(model: str, contexts: tuple[int, ...]) -> None:
    check_rotation(decode(model, 8, contexts, BFLOAT16))


def attention_of(step: Shape, calls: int) -> Any:
    """(qkv, tables, pages, batch) -> (the outputs of so many calls that share a plan, pages)."""

    @functools.partial(jax.jit, donate_argnums=2)
    def attention(qkv: Any, turn: Any, pages: Any, batch: Any) -> tuple[Any, Any]:
        sizes = {"num_heads": step.num_heads, "num_kv_heads": step.num_kv_heads}
        shared, qkv = gpu.share(batch, qkv, **sizes)
        batch = dataclasses.replace(batch, shared=shared)
        outs = []
        for _ in range(calls):
            out, pages = gpu.attention_of_qkv(qkv, turn, pages, batch, scale=step.scale)
            outs.append(out)
        return outs, pages

    return attention


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("model", sorted({*SERVED, *TURNED}))
@pytest.mark.parametrize("contexts", [EDGES, (3000, 64, 1, 8190, 17, 640, 63), ()])
def test_attention_of_what_is_not_turned_yet(
    model: str, contexts: tuple[int, ...], dtype: np.dtype
) -> None:
    problem = decode_of_any_length(model, 16, contexts, dtype)
    turn = quarter_turns(problem)
    run = attention_of(problem.shape, 3)
    outs, pages = run(joined(problem), turn, problem.pages, problem.batch)
    keys = turned(problem.k, turn)
    seen = []
    for token, (old, values) in enumerate(problem.contexts):
        seen.append((np.concatenate([old[:-1], keys[token][None].astype(np.float64)]), values))
    expected = dataclasses.replace(problem, q=turned(problem.q, turn), k=keys, contexts=tuple(seen))
    assert_exact(np.asarray(outs[0]), np.asarray(pages), expected)
    for out in outs[1:]:
        np.testing.assert_array_equal(bits(np.asarray(out)), bits(np.asarray(outs[0])))


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["llama-8b", "groups of 7"])
def test_attention_turns_keys_by_any_angle(model: str) -> None:
    problem = decode(model, 8, (1, 16, 17, 609, 64, 65), BFLOAT16)
    turn = tables(problem)
    run = attention_of(problem.shape, 1)
    _, pages = run(joined(problem), turn, problem.pages, problem.batch)
    check_pages(problem, np.asarray(pages), turn)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tokens", [1, 64, 128])
def test_norm(size: int, tokens: int) -> None:
    norm = RMSNorm(size, eps=1e-5, dtype=jnp.dtype(jnp.bfloat16))
    norm.weight[...] = jax.random.normal(jax.random.key(0), (size,), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (tokens, size), jnp.bfloat16) * 3
    y = jax.jit(functools.partial(gpu_norm.rms_norm, eps=norm.eps))(x, norm.weight[...])
    # Rounded twice, each time perhaps to a neighbour.
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(norm(x), np.float32), rtol=2**-6
    )


@pytest.mark.parametrize("size", SIZES)
def test_norm_lowers(size: int) -> None:
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((64, size), (size,)))
    traced = jax.jit(functools.partial(gpu_norm.rms_norm, eps=1e-5)).trace(x, weight)
    assert "@mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("size", [64, 576, 4160])
def test_rows_that_threads_cannot_share_are_not_served(size: int) -> None:
    assert not gpu_norm.serves(size)


@pytest.mark.parametrize("model", MODELS)
def test_rotation_lowers_where_it_is_served(model: str) -> None:
    sizes = MODELS[model]
    heads, kv, head_dim = (sizes[key] for key in ("num_heads", "num_kv_heads", "head_dim"))
    is_served = model in SERVED
    assert gpu_rotate.serves(heads, kv, head_dim) == is_served
    if not is_served:
        return
    problem = decode(model, 4, (5, 700), BFLOAT16)
    traced = jax.jit(gpu_rotate.rotate_and_write).trace(
        joined(problem), tables(problem), problem.pages, problem.batch
    )
    assert "@mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("model", TURNED)
def test_attention_of_what_is_not_turned_yet_is_one_kernel(model: str) -> None:
    problem = decode(model, 4, (5, 700), BFLOAT16)
    traced = attention_of(problem.shape, 1).trace(
        joined(problem), tables(problem), problem.pages, problem.batch
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
