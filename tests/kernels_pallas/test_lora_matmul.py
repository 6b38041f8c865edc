"""The one suite that every implementation of the LoRA op passes."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.lora_linear.op import ending
from kernels_pallas.lora_matmul.op import Implementation, plan
from tests.kernels_pallas.lora_problem import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Problem,
    Runs,
    Shape,
    assert_as_good,
    assert_exact,
    between_layers,
    bits,
    gated,
    make,
)

# Module and dtype. Elsewhere than on a TPU its kernel runs in interpret mode.
IMPLEMENTATIONS = [
    pytest.param("reference", FLOAT32, id="reference-float32"),
    pytest.param("reference", BFLOAT16, id="reference-bfloat16"),
    pytest.param("dense", FLOAT32, id="dense-float32"),
    pytest.param("dense", BFLOAT16, id="dense-bfloat16"),
    pytest.param("tpu", FLOAT32, id="tpu-float32"),
    pytest.param("tpu", BFLOAT16, id="tpu-bfloat16"),
    pytest.param("gpu", BFLOAT16, id="gpu-bfloat16", marks=pytest.mark.gpu),
    pytest.param("gpu", FLOAT16, id="gpu-float16", marks=pytest.mark.gpu),
]
GATED = [param for param in IMPLEMENTATIONS if param.values[0] in ("reference", "gpu")]
"""As the model computes what a gate makes of the op: in one where the implementation can."""
every_implementation = pytest.mark.parametrize(("name", "dtype"), IMPLEMENTATIONS)

QKV = Shape(num_tokens=64, num_slots=8, rank=64, d_in=256, splits=(256, 64, 64))
GATE_UP = Shape(num_tokens=64, num_slots=64, rank=16, d_in=128, splits=(192, 192))
ODD_RANKS = {0: 1, 1: 8, 2: 13, 3: 16, 4: 64, 5: 33, 7: 5}

CASES: dict[str, tuple[Shape, Runs, dict[int, int]]] = {
    "one token": (
        Shape(num_tokens=1, num_slots=1, rank=8, d_in=64, splits=(128,)),
        ((0, 1),),
        {0: 8},
    ),
    "a dozen tokens": (
        Shape(num_tokens=12, num_slots=4, rank=16, d_in=192, splits=(192, 64, 64)),
        ((2, 3), (-1, 2), (0, 5)),
        {0: 13, 1: 16, 2: 1},
    ),
    "a rank for each slot": (
        QKV,
        ((4, 7), (-1, 9), (0, 1), (1, 2), (2, 30), (3, 1), (5, 9)),
        ODD_RANKS,
    ),
    "no adapter": (QKV, ((-1, 64),), ODD_RANKS),
    "padding only": (QKV, (), ODD_RANKS),
    "one adapter in every row": (QKV, ((4, 64),), ODD_RANKS),
    "an empty slot is named": (QKV, ((4, 10), (6, 3), (2, 4)), ODD_RANKS),
    "an adapter for each token": (
        GATE_UP,
        tuple((slot, 1) for slot in np.random.default_rng(1).permutation(64).tolist()),
        {slot: 1 + slot % 16 for slot in range(64)},
    ),
    "skewed": (
        Shape(num_tokens=256, num_slots=128, rank=24, d_in=128, splits=(128,)),
        ((127, 1), (64, 3), (-1, 1), (3, 201), *((s, 1) for s in range(10, 30))),
        {slot: 1 + slot % 24 for slot in range(128)},
    ),
    "a bank that is too large to multiply with": (
        Shape(num_tokens=48, num_slots=128, rank=40, d_in=64, splits=(64, 128)),
        ((127, 1), (64, 13), (-1, 1), (3, 20), *((s, 1) for s in range(10, 20))),
        {slot: 1 + slot % 40 for slot in range(128)},
    ),
    "long runs": (
        Shape(num_tokens=512, num_slots=4, rank=64, d_in=128, splits=(128, 128)),
        ((3, 130), (1, 300), (0, 70)),
        {0: 64, 1: 20, 3: 8},
    ),
    "a long prefill": (
        Shape(num_tokens=4096, num_slots=128, rank=16, d_in=128, splits=(128, 64, 64)),
        ((100, 2000), *((s, 10) for s in range(100)), (-1, 500)),
        dict.fromkeys(range(128), 16),
    ),
}

GATED_CASES: dict[str, tuple[Shape, Runs, dict[int, int]]] = {
    "one token": (
        Shape(num_tokens=1, num_slots=1, rank=8, d_in=64, splits=(64, 64)),
        ((0, 1),),
        {0: 8},
    ),
    "an adapter for each token": CASES["an adapter for each token"],
    "no adapter": (GATE_UP, ((-1, 60),), {2: 3}),
    "some without": (
        dataclasses.replace(GATE_UP, num_tokens=300, num_slots=8),
        ((-1, 37), (7, 1), (3, 90), (-1, 5), (0, 33), (1, 2)),
        {0: 16, 1: 1, 3: 13, 7: 8},
    ),
    "an empty slot is named": (GATE_UP, ((4, 10), (6, 3), (2, 4)), {4: 16, 2: 7}),
    "a rank for each slot": (
        dataclasses.replace(QKV, num_tokens=128, splits=(256, 256)),
        ((4, 17), (-1, 9), (0, 1), (1, 2), (2, 70), (3, 1), (5, 9), (7, 1)),
        ODD_RANKS,
    ),
    "long runs": CASES["long runs"],
    "a long prefill": (
        Shape(num_tokens=4096, num_slots=128, rank=16, d_in=128, splits=(128, 128)),
        ((100, 2000), *((s, 10) for s in range(100)), (-1, 500)),
        dict.fromkeys(range(128), 16),
    ),
    "as wide as a model's": (
        Shape(num_tokens=512, num_slots=8, rank=16, d_in=1024, splits=(3584, 3584)),
        ((-1, 3), (5, 200), (1, 250), (2, 7)),
        {1: 16, 2: 9, 5: 16},
    ),
}


def implementation(name: str) -> Implementation:
    module = importlib.import_module(f"kernels_pallas.lora_matmul.{name}")
    assert isinstance(module.IMPLEMENTATION, Implementation)
    return module.IMPLEMENTATION


@functools.cache
def compiled(name: str, splits: tuple[int, ...]) -> Callable[..., jax.Array]:
    options = {"interpret": True} if name == "tpu" and jax.default_backend() != "tpu" else {}
    return jax.jit(functools.partial(implementation(name).function, splits=splits, **options))


@functools.cache
def compiled_with_gate(name: str, splits: tuple[int, ...]) -> Callable[..., jax.Array]:
    chosen = implementation(name)

    def in_parts(*arguments: Any) -> jax.Array:
        return ending(chosen.function(*arguments, splits=splits), gated=True)

    if chosen.gated is None:
        return jax.jit(in_parts)
    return jax.jit(functools.partial(chosen.gated, splits=splits))


def run(name: str, problem: Problem, *, gate: bool = False, stacked: bool = False) -> np.ndarray:
    """``stacked``: the arrays are those of three layers."""
    chosen = implementation(name)
    batch = chosen.plan(problem.token_slots, problem.ranks)
    function = (compiled_with_gate if gate else compiled)(name, problem.shape.splits)
    a, b = problem.a, problem.b
    if stacked:
        a, b, batch = between_layers(a), between_layers(b), batch.of_layer(1, 3)
    return np.asarray(function(problem.y, problem.x, a, b, batch))


@every_implementation
@pytest.mark.parametrize("case", CASES)
def test_matches_the_formula(name: str, dtype: np.dtype, case: str) -> None:
    problem = make(*CASES[case], dtype)
    assert_exact(run(name, problem), problem)


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "gate"])
@pytest.mark.parametrize(("name", "dtype"), GATED)
def test_slots_of_a_layer_among_others(name: str, dtype: np.dtype, gate: bool) -> None:
    problem = make(*GATED_CASES["some without" if gate else "a rank for each slot"], dtype)
    assert implementation(name).stacked
    stacked = run(name, problem, gate=gate, stacked=True)
    np.testing.assert_array_equal(bits(stacked), bits(run(name, problem, gate=gate)))


@every_implementation
def test_a_row_does_not_depend_on_its_neighbours(name: str, dtype: np.dtype) -> None:
    crowd = make(QKV, ((4, 7), (-1, 9), (0, 1), (2, 40)), ODD_RANKS, dtype)
    alone = make(QKV, ((-1, 5), (4, 7)), ODD_RANKS, dtype)
    for field in ("x", "y"):
        getattr(alone, field)[5:12] = getattr(crowd, field)[:7]
    alone.a[4], alone.b[4] = crowd.a[4], crowd.b[4]
    np.testing.assert_array_equal(run(name, alone)[5:12], run(name, crowd)[:7])


@every_implementation
@settings(max_examples=20)
@given(data=st.data())
def test_any_mix(name: str, dtype: np.dtype, data: st.DataObject) -> None:
    slots = data.draw(st.permutations([-1, *range(QKV.num_slots)]), label="slots")
    counts = data.draw(
        st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 16, 20, 33]), max_size=len(slots)),
        label="counts",
    )
    runs, room = [], QKV.num_tokens
    for slot, count in zip(slots, counts, strict=False):
        runs.append((slot, min(count, room)))
        room -= min(count, room)
    ranks = data.draw(
        st.dictionaries(
            st.integers(0, QKV.num_slots - 1), st.sampled_from([1, 8, 13, 16, 17, 48, 64])
        ),
        label="ranks",
    )
    problem = make(QKV, tuple(runs), ranks, dtype, seed=data.draw(st.integers(0, 99)))
    assert_exact(run(name, problem), problem)


@every_implementation
def test_shapes_that_do_not_fit_are_refused(name: str, dtype: np.dtype) -> None:
    problem = make(*CASES["one adapter in every row"], dtype)
    batch = plan(problem.token_slots, problem.ranks, block_tokens=8, aligned=True)
    fewer = plan(problem.token_slots[:8], problem.ranks, block_tokens=8, aligned=True)
    function = implementation(name).function
    y, x, a, b = map(jax.numpy.asarray, (problem.y, problem.x, problem.a, problem.b))
    with pytest.raises(ValueError, match="splits"):
        function(y, x, a, b, batch, splits=(256, 64))
    with pytest.raises(ValueError, match="members"):
        function(y, x, a[:, :64], b, batch, splits=QKV.splits)
    with pytest.raises(ValueError, match="same tokens"):
        function(y, x, a, b, fewer, splits=QKV.splits)


def assert_gated(result: np.ndarray, problem: Problem) -> None:
    expected = gated(problem.expected())
    assert result.shape == expected.shape
    if result.dtype == FLOAT32:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
        return
    assert_as_good(result, gated(problem.rounded()), expected)


@pytest.mark.parametrize(("name", "dtype"), GATED)
@pytest.mark.parametrize("case", GATED_CASES)
def test_a_gate_matches_the_formula(name: str, dtype: np.dtype, case: str) -> None:
    problem = make(*GATED_CASES[case], dtype)
    assert_gated(run(name, problem, gate=True), problem)


@pytest.mark.parametrize(("name", "dtype"), GATED)
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_gates_that_are_almost_open_or_shut(name: str, dtype: np.dtype, scale: float) -> None:
    problem = make(*GATED_CASES["some without"], dtype)
    problem.y[:] = (problem.y.astype(np.float32) * scale).astype(dtype)
    assert_gated(run(name, problem, gate=True), problem)


@pytest.mark.parametrize(("name", "dtype"), GATED)
@settings(max_examples=20)
@given(data=st.data())
def test_a_gate_and_any_mix(name: str, dtype: np.dtype, data: st.DataObject) -> None:
    shape = dataclasses.replace(GATE_UP, num_tokens=512, num_slots=6, rank=32, splits=(128, 128))
    sizes = st.sampled_from([0, 1, 2, 7, 31, 32, 33, 64, 90])
    runs, room = [], shape.num_tokens
    for slot in data.draw(st.permutations(range(shape.num_slots)), label="slots"):
        for served, count in ((-1, data.draw(sizes)), (slot, data.draw(sizes))):
            runs.append((served, min(count, room)))
            room -= min(count, room)
    ranks = data.draw(st.dictionaries(st.integers(0, 5), st.sampled_from([1, 16, 17, 32])))
    problem = make(shape, tuple(runs), ranks, dtype, seed=data.draw(st.integers(0, 99)))
    assert_gated(run(name, problem, gate=True), problem)
