"""A linear with its adapters, residual or gate, in one kernel, and what that replaces."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlora.models.layers import Linear
from jaxlora.models.lora import Group, LayerLora, linear_with_lora
from kernels_pallas import gpu_counter
from kernels_pallas.lora_linear import gpu, gpu_config, gpu_kernel
from kernels_pallas.lora_linear.gpu_config import SIZES, heuristic, problem
from kernels_pallas.lora_matmul import gpu as gpu_lora_matmul
from kernels_pallas.lora_matmul import reference
from kernels_pallas.lora_matmul.op import LoraBatch, max_blocks
from kernels_pallas.slot_write.op import Pair
from tests.kernels_pallas.lora_problem import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Problem,
    Runs,
    Shape,
    assert_as_good,
    between_layers,
    gated,
    make,
)
from tests.kernels_pallas.test_lora_matmul_gpu_lowering import GROUPS

ENDINGS = ("plain", "residual", "gated")

QKV = Shape(num_tokens=64, num_slots=8, rank=16, d_in=512, splits=(256, 64, 64))
O = Shape(num_tokens=64, num_slots=8, rank=16, d_in=512, splits=(256,))  # noqa: E741
GATE_UP = Shape(num_tokens=64, num_slots=64, rank=16, d_in=256, splits=(192, 192))
WIDE_RANKS = Shape(num_tokens=16, num_slots=8, rank=64, d_in=1024, splits=(256,))
# Enough tiles of 128 rows of W for the kernel to take twice as many at once; in most of the others
# it does not.
PROMPTS = Shape(num_tokens=600, num_slots=8, rank=16, d_in=512, splits=(2048, 1024, 512))
PROMPTS_GATE = Shape(num_tokens=528, num_slots=64, rank=16, d_in=256, splits=(384, 384))
PROMPTS_RANKS = Shape(num_tokens=1096, num_slots=8, rank=64, d_in=1024, splits=(512,))
RANKS = {0: 1, 1: 8, 2: 13, 3: 16, 4: 16, 5: 3, 7: 5}

CASES: dict[str, tuple[Shape, Runs, dict[int, int], str]] = {
    "no adapter": (QKV, ((-1, 60),), RANKS, "plain"),
    "a mix, some without": (
        QKV,
        ((4, 7), (-1, 9), (0, 1), (1, 2), (2, 30), (3, 1), (5, 9)),
        RANKS,
        "plain",
    ),
    "one adapter in every row": (QKV, ((4, 64),), RANKS, "plain"),
    "a cluster and a residual": (O, ((1, 13), (0, 1), (3, 40)), RANKS, "residual"),
    "few tokens": (
        dataclasses.replace(O, num_tokens=8),
        ((2, 3), (-1, 2), (3, 1)),
        RANKS,
        "residual",
    ),
    "a row alone": (dataclasses.replace(QKV, num_tokens=1), ((2, 1),), RANKS, "plain"),
    "a row alone, a residual": (
        dataclasses.replace(O, num_tokens=1),
        ((3, 1),),
        RANKS,
        "residual",
    ),
    "a row alone, parts of ranks": (
        dataclasses.replace(WIDE_RANKS, num_tokens=1),
        ((3, 1),),
        {3: 17},
        "residual",
    ),
    "a row alone, a gate": (
        dataclasses.replace(GATE_UP, num_tokens=1),
        ((50, 1),),
        {50: 9},
        "gated",
    ),
    "many tokens": (
        dataclasses.replace(O, num_tokens=128),
        ((2, 33), (-1, 2), (3, 64), (5, 20)),
        RANKS,
        "residual",
    ),
    "parts of ranks": (
        WIDE_RANKS,
        ((2, 3), (-1, 2), (3, 1), (4, 5)),
        {2: 64, 3: 17, 4: 1, 5: 40},
        "residual",
    ),
    "a gate": (GATE_UP, ((50, 9), (1, 1), (2, 30), (-1, 3)), {50: 16, 1: 4, 2: 9}, "gated"),
    "a gate, an adapter for each token": (
        GATE_UP,
        tuple((slot, 1) for slot in np.random.default_rng(1).permutation(64).tolist()),
        {slot: 1 + slot % 16 for slot in range(64)},
        "gated",
    ),
    "a gate, many tokens": (
        dataclasses.replace(GATE_UP, num_tokens=128),
        ((50, 90), (1, 1), (2, 30)),
        {50: 16, 1: 4, 2: 9},
        "gated",
    ),
    "prompts": (
        PROMPTS,
        ((4, 200), (-1, 90), (0, 1), (1, 2), (2, 130), (3, 1), (5, 111)),
        RANKS,
        "plain",
    ),
    "prompts without an adapter": (PROMPTS, ((-1, 600),), RANKS, "plain"),
    "prompts, one adapter": (PROMPTS, ((4, 600),), RANKS, "plain"),
    "prompts, a residual": (
        dataclasses.replace(PROMPTS, num_tokens=1024, splits=(512,)),
        ((1, 300), (-1, 100), (0, 400), (3, 224)),
        RANKS,
        "residual",
    ),
    "prompts, large tiles and a residual": (
        dataclasses.replace(PROMPTS, splits=(4096,)),
        ((1, 300), (-1, 100), (0, 160), (3, 40)),
        RANKS,
        "residual",
    ),
    "prompts, small pieces": (
        dataclasses.replace(PROMPTS, num_slots=64, splits=(384, 128, 256)),
        tuple((slot, (3, 24, 1, 17, 2, 32, 1, 1)[slot % 8]) for slot in range(50)),
        {slot: 1 + slot % 16 for slot in range(64)},
        "plain",
    ),
    "prompts, large pieces between small ones of parts of ranks": (
        dataclasses.replace(PROMPTS_RANKS, num_slots=64),
        tuple((63 - slot, (90, 1, 2, 1, 1)[slot % 5]) for slot in range(50)),
        {slot: 1 + slot for slot in range(64)},
        "residual",
    ),
    "prompts, parts of ranks": (
        PROMPTS_RANKS,
        ((2, 300), (-1, 2), (3, 100), (4, 500), (5, 90)),
        {2: 64, 3: 17, 4: 1, 5: 40},
        "residual",
    ),
    "prompts, a gate": (
        PROMPTS_GATE,
        ((50, 90), (1, 1), (-1, 50), (2, 300)),
        {50: 16, 1: 4, 2: 9},
        "gated",
    ),
    "prompts, members of several parts of ranks": (
        dataclasses.replace(PROMPTS, rank=48),
        ((4, 200), (-1, 90), (2, 310)),
        {4: 48, 2: 20},
        "plain",
    ),
    "prompts, a gate, parts of ranks": (
        dataclasses.replace(PROMPTS_GATE, d_in=1024, rank=32),
        ((50, 290), (-1, 50), (2, 188)),
        {50: 32, 2: 9},
        "gated",
    ),
    # More thread blocks of the shrink than multiprocessors, which two of them share.
    "prompts, more pieces than multiprocessors": (
        dataclasses.replace(PROMPTS, num_tokens=2048, splits=(256, 128, 128)),
        ((4, 300), (-1, 90), (0, 1), (1, 500), (2, 130), (3, 63), (5, 200), (7, 764)),
        RANKS,
        "plain",
    ),
    "prompts, a gate, an adapter for each of many tokens": (
        PROMPTS_GATE,
        ((-1, 70), *((slot, 1 + (slot == 63) * 390) for slot in range(64))),
        {slot: 1 + slot % 16 for slot in range(64)},
        "gated",
    ),
}

IMPLEMENTATIONS = [
    pytest.param("parts", FLOAT32, id="parts-float32"),
    pytest.param("parts", BFLOAT16, id="parts-bfloat16"),
    pytest.param("gpu", BFLOAT16, id="gpu-bfloat16", marks=pytest.mark.gpu),
    pytest.param("gpu", FLOAT16, id="gpu-float16", marks=pytest.mark.gpu),
]


def in_parts(
    x: jax.Array,
    weight: jax.Array,
    *,
    splits: tuple[int, ...],
    a: jax.Array,
    b: jax.Array,
    batch: LoraBatch,
    residual: jax.Array | None,
    gated: bool,
) -> jax.Array:
    """What the model does where there is no kernel for all of it."""
    linear = Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nnx.Param(weight)
    members = tuple("qkv"[: len(splits)])
    group = Group("o", members, weight.shape[1], splits, None, None, gated=gated)
    lora = LayerLora({"o": Pair(a, b)}, batch, reference.lora_matmul)
    return linear_with_lora(linear, group, x, lora, residual=residual)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem of the LoRA op with base weights, and what is done with the result."""

    lora: Problem
    weight: np.ndarray
    residual: np.ndarray | None
    gated: bool
    num_tokens: int
    """Those that are not padding."""

    def expected(self) -> np.ndarray:
        x, weight = self.lora.x.astype(np.float64), self.weight.astype(np.float64)
        z = dataclasses.replace(self.lora, y=x @ weight.T).expected()
        return self._end(z)

    def rounded(self) -> np.ndarray:
        """As a plain 16-bit model computes it: every result rounded."""
        dtype = self.weight.dtype
        y = (self.lora.x.astype(np.float32) @ self.weight.astype(np.float32).T).astype(dtype)
        return self._end(dataclasses.replace(self.lora, y=y).rounded())

    def _end(self, z: np.ndarray) -> np.ndarray:
        if self.gated:
            z = gated(z)
        return z if self.residual is None else z + self.residual.astype(z.dtype)


def case_of(name: str, dtype: np.dtype) -> Case:
    shape, runs, ranks, ending = CASES[name]
    lora = make(shape, runs, ranks, dtype)
    random = np.random.default_rng(3)
    num_tokens = sum(count for _, count in runs)
    # Tokens without an adapter are computed too; only padding may hold anything.
    without = lora.token_slots[:num_tokens] < 0
    lora.x[:num_tokens][without] = random.standard_normal((without.sum(), shape.d_in)).astype(dtype)
    # A bank is padded with zeros up to a multiple of 16 ranks.
    for slot, rank in ranks.items():
        to = -(-rank // 16) * 16
        for m in range(len(shape.splits)):
            lora.a[slot, m * shape.rank + rank : m * shape.rank + to] = 0
        lora.b[slot, rank:to] = 0
    d_out = sum(shape.splits)
    weight = random.standard_normal((d_out, shape.d_in)) * shape.d_in**-0.5
    residual = None
    if ending == "residual":
        residual = random.standard_normal((shape.num_tokens, d_out)).astype(dtype)
    return Case(lora, weight.astype(dtype), residual, ending == "gated", num_tokens)


@functools.cache
def compiled(name: str, splits: tuple[int, ...], gated: bool) -> Callable[..., jax.Array]:
    function = gpu.lora_linear if name == "gpu" else in_parts
    return jax.jit(functools.partial(function, splits=splits, gated=gated))


def run(name: str, case: Case, *, stacked: bool = False) -> np.ndarray:
    """``stacked``: the adapters' arrays are those of three layers."""
    lora = case.lora
    blocks = gpu_lora_matmul.IMPLEMENTATION if name == "gpu" else reference.IMPLEMENTATION
    batch = blocks.plan(lora.token_slots, lora.ranks)
    function = compiled(name, lora.shape.splits, case.gated)
    a, b = lora.a, lora.b
    if stacked:
        a, b, batch = between_layers(a), between_layers(b), batch.of_layer(1, 3)
    out = function(lora.x, case.weight, a=a, b=b, batch=batch, residual=case.residual)
    return np.asarray(out)[: case.num_tokens]


@pytest.mark.parametrize(("name", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_formula(name: str, dtype: np.dtype, case: str) -> None:
    problem = case_of(case, dtype)
    expected = problem.expected()[: problem.num_tokens]
    result = run(name, problem)
    assert result.shape == expected.shape
    if dtype == FLOAT32:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
        return
    assert_as_good(result, problem.rounded()[: problem.num_tokens], expected)


@pytest.mark.parametrize(("name", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case",
    [
        "a mix, some without",
        "parts of ranks",
        "a gate",
        "prompts, parts of ranks",
        "prompts, a gate",
    ],
)
def test_slots_of_a_layer_among_others(name: str, dtype: np.dtype, case: str) -> None:
    problem = case_of(case, dtype)
    np.testing.assert_array_equal(run(name, problem, stacked=True), run(name, problem))


@pytest.mark.parametrize(("name", "dtype"), IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_neighbours(name: str, dtype: np.dtype) -> None:
    crowd = case_of("a mix, some without", dtype)
    alone = dataclasses.replace(case_of("one adapter in every row", dtype), weight=crowd.weight)
    alone.lora.token_slots[:] = -1
    alone.lora.token_slots[5:12] = 4
    alone.lora.x[5:12] = crowd.lora.x[:7]
    alone.lora.a[4], alone.lora.b[4] = crowd.lora.a[4], crowd.lora.b[4]
    np.testing.assert_array_equal(run(name, alone)[5:12], run(name, crowd)[:7])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["a gate, an adapter for each token", "parts of ranks"])
def test_few_stages_are_enough(case: str) -> None:
    """Two, or one more than there are steps together: the sums are the same; in a cluster, whose
    thread blocks have other steps then, about the same."""
    shape, _, _, ending = CASES[case]
    arguments = arguments_of(case)
    batch = arguments["batch"]
    config = heuristic(
        shape.num_tokens,
        shape.d_in,
        shape.splits,
        gated=ending == "gated",
        rank=shape.rank,
        blocks=batch.block_slots.shape[0],
        block_tokens=batch.block_tokens,
    )
    pipelines = [(1, config.stages, 1), (1, 2, 1), (1, 3, 2), (2, 3, 2)]
    first, *others, clustered = (
        jax.jit(
            functools.partial(
                gpu.lora_linear,
                splits=shape.splits,
                gated=ending == "gated",
                config=dataclasses.replace(
                    config, cluster=cluster, stages=stages, together=together
                ),
            )
        )(**arguments)
        for cluster, stages, together in pipelines
    )
    count = case_of(case, BFLOAT16).num_tokens
    expected = np.asarray(first)[:count]
    for other in others:
        np.testing.assert_array_equal(np.asarray(other)[:count], expected)
    expected = expected.astype(np.float32)
    error = np.abs(np.asarray(clustered)[:count].astype(np.float32) - expected)
    assert error.max() <= 2**-7 * np.abs(expected).max()


def one_after_another(names: tuple[str, ...], count: Callable[[], Any]) -> Callable[..., Any]:
    """A program that runs cases with one counter each, or one for all; its results are theirs and
    what the counter is at the end."""

    def program(cases: list[dict[str, Any]]) -> tuple[list[jax.Array], Any]:
        counter, out = count(), []
        for name, arguments in zip(names, cases, strict=True):
            shape, _, _, ending = CASES[name]
            shared = None
            if counter is not None:
                shared = gpu.share(arguments["batch"])._replace(counter=counter)
            out.append(
                gpu.lora_linear(
                    splits=shape.splits, gated=ending == "gated", shared=shared, **arguments
                )
            )
        return out, counter if counter is None else jax.freeze(counter)

    return program


def arguments_of(name: str) -> dict[str, Any]:
    case = case_of(name, BFLOAT16)
    lora = case.lora
    return {
        "x": lora.x,
        "weight": case.weight,
        "a": lora.a,
        "b": lora.b,
        "batch": gpu_lora_matmul.IMPLEMENTATION.plan(lora.token_slots, lora.ranks),
        "residual": case.residual,
    }


SEQUENCE = (
    "a mix, some without",
    "no adapter",
    "a cluster and a residual",
    "a row alone",
    "a gate",
    "prompts, a residual",
    "prompts, a gate",
)


def test_calls_with_one_counter_have_one_array_of_zeros() -> None:
    cases = [arguments_of(name) for name in SEQUENCE[:3]]
    zeros = [
        jax.jit(one_after_another(SEQUENCE[:3], count))
        .trace(cases)
        .lower(lowering_platforms=("cuda",))
        .as_text()
        .count("stablehlo.broadcast_in_dim")
        for count in (gpu_counter.new, lambda: None)
    ]
    # Those that are no counters are the places of the slots, which are the same in both.
    assert zeros[1] - zeros[0] == 2


@pytest.mark.gpu
def test_a_counter_is_left_as_it_was_found() -> None:
    cases = [arguments_of(name) for name in SEQUENCE] * 3
    alone, _ = jax.jit(one_after_another(SEQUENCE * 3, lambda: None))(cases)
    together, counter = jax.jit(one_after_another(SEQUENCE * 3, gpu_counter.new))(cases)
    for mine, expected, arguments in zip(together, alone, cases, strict=True):
        tokens = np.flatnonzero(arguments["batch"].token_slots >= 0)
        np.testing.assert_array_equal(np.asarray(mine)[tokens], np.asarray(expected)[tokens])
    np.testing.assert_array_equal(counter, [0])


def lowered(
    d_in: int,
    splits: tuple[int, ...],
    ending: str,
    *,
    tokens: int,
    slots: int = 8,
    rank: int = 16,
    dtype: Any = jnp.bfloat16,
    function: Callable[..., jax.Array] = gpu.lora_linear,
) -> str:
    d_out = sum(splits)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    arguments: dict[str, Any] = {}
    if ending == "residual":
        arguments["residual"] = array(tokens, d_out)
    if slots:
        arguments |= {
            "a": array(slots, len(splits) * rank, d_in),
            "b": array(slots, rank, d_out),
            "batch": gpu_lora_matmul.IMPLEMENTATION.plan(
                np.sort(np.arange(tokens) % slots).astype(np.int32),
                np.full(slots, rank, np.int32),
            ),
        }
    function = functools.partial(function, splits=splits, gated=ending == "gated")
    traced = jax.jit(function).trace(array(tokens, d_in), array(d_out, d_in), **arguments)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def ending_of(group: str) -> str:
    name = group.rsplit("-", 1)[1]
    return {"gate_up": "gated", "qkv": "plain"}.get(name, "residual")


@pytest.mark.parametrize(("tokens", "slots"), [(1, 8), (8, 8), (64, 0), (128, 64)])
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_lowers_for_cuda(group: str, tokens: int, slots: int) -> None:
    text = lowered(*GROUPS[group], ending_of(group), tokens=tokens, slots=slots)
    assert "@mosaic_gpu" in text


@pytest.mark.parametrize(("tokens", "slots"), [(1, 8), (8, 0), (16, 0), (32, 0)])
@pytest.mark.parametrize("group", [name for name in GROUPS if name.startswith("llama")])
def test_no_two_thread_blocks_share_a_multiprocessor(
    monkeypatch: pytest.MonkeyPatch, group: str, tokens: int, slots: int
) -> None:
    used = []

    def run_scoped(body: Any, *refs: Any, **scratch: Any) -> Any:
        leaves = jax.tree.leaves(scratch) if "collective_axes" in scratch else []
        buffers = [
            ref.inner_aval for ref in leaves if getattr(ref, "memory_space", 0) == plgpu.SMEM
        ]
        if buffers:
            used.append(sum(array.size * array.dtype.itemsize for array in buffers))
        return pl.run_scoped(body, *refs, **scratch)

    monkeypatch.setattr(
        gpu_kernel, "pl", types.SimpleNamespace(**vars(pl) | {"run_scoped": run_scoped})
    )
    lowered(*GROUPS[group], ending_of(group), tokens=tokens, slots=slots)
    # CUDA's for compute capability 9.0: what a multiprocessor has, and takes for each thread block.
    (each,) = set(used)
    assert 228 * 1024 // 2 - 1024 < each <= 227 * 1024


@pytest.mark.parametrize(("tokens", "slots", "rank"), [(1024, 0, 0), (2048, 8, 16), (8192, 64, 64)])
@pytest.mark.parametrize("group", [name for name in GROUPS if name.startswith("llama")])
def test_prompts_lower_for_cuda(group: str, tokens: int, slots: int, rank: int) -> None:
    text = lowered(*GROUPS[group], ending_of(group), tokens=tokens, slots=slots, rank=rank)
    kernels = {"prompt_linear", *["prompt_shrink"] * bool(slots)}
    assert text.count("@mosaic_gpu") == len(kernels)


def spread(tpcs: int, gpcs: int, most: int = 9) -> Iterator[tuple[int, ...]]:
    """Every way to have so many TPCs (of two multiprocessors) in so many GPCs, largest first."""
    if gpcs == 0:
        yield from [()] * (tpcs == 0)
        return
    for first in range(min(most, tpcs), -(-tpcs // gpcs) - 1, -1):
        yield from ((first, *rest) for rest in spread(tpcs - first, gpcs - 1, first))


@functools.cache
def clusters_at_once(size: int) -> int:
    """How many clusters of thread blocks of a multiprocessor each an H100 or H200 surely runs at
    once, whichever 66 of its chip's 72 TPCs work: each lies within one of the 8 GPCs."""
    return min(sum(2 * tpcs // size for tpcs in gpcs) for gpcs in spread(66, 8))


HIDDEN = {"qwen3-0.6b": 1024, "llama-3.2-1b": 2048, "unusual": 2112}
MORE_GROUPS = GROUPS | {f"{name}-o": (size, (size,)) for name, size in HIDDEN.items()}


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("group", MORE_GROUPS)
def test_all_thread_blocks_run_at_once(group: str, tokens: int) -> None:
    d_in, splits = MORE_GROUPS[group]
    gated = ending_of(group) == "gated"
    config = heuristic(
        tokens,
        d_in,
        splits,
        gated=gated,
        rank=16,
        blocks=max_blocks(tokens, 64, 8),
        block_tokens=8,
    )
    tile = 64 * config.consumers * (1 if gated else config.parts)
    # They wait for each other.
    clusters = sum(splits) // (2 if gated else 1) // tile
    assert clusters <= clusters_at_once(config.cluster)


@pytest.mark.parametrize("group", MORE_GROUPS)
def test_no_step_of_an_engine_that_starts_is_without_a_configuration(group: str) -> None:
    d_in, splits = MORE_GROUPS[group]
    gated = ending_of(group) == "gated"
    for rank, slots in itertools.product((16, 48, 64, 128, 256), (1, 8, 12, 64)):
        if problem(d_in, splits, gated=gated, rank=rank, slots=slots) is not None:
            assert rank > 64
            continue
        for tokens in SIZES:
            block_tokens = gpu_lora_matmul.IMPLEMENTATION.block_tokens(tokens)
            case = gpu_config.Case(
                tokens=tokens,
                d_in=d_in,
                splits=splits,
                gated=gated,
                rank=rank,
                blocks=max_blocks(tokens, slots, block_tokens),
                block_tokens=block_tokens,
            )
            config = heuristic(**vars(case))
            gpu_config.check_config(config, case)
            # The thread blocks of a cluster add up the sums of as many tokens each, in whole tiles.
            computed = max(8, tokens)
            share = max(8, computed // config.cluster)
            assert computed % share == 0
            assert computed // share <= config.cluster


@pytest.mark.parametrize(
    ("d_in", "splits", "said"),
    [(100, (128,), "d_in 100"), (128, (96,), "96"), (128, (128 * 4096,), "multiple of 64")],
)
def test_what_no_step_can_be_served_is_told(d_in: int, splits: tuple[int, ...], said: str) -> None:
    message = problem(d_in, splits, gated=False, rank=16, slots=8)
    assert message is not None
    assert said in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tokens": 12}, "12 tokens"),
        ({"tokens": 24}, "24 tokens"),
        ({"tokens": 100}, "100 tokens"),
        ({"tokens": 512, "d_in": 192}, r"d_in 192 must be a multiple of 128"),
        ({"tokens": 8, "dtype": jnp.float32}, "float32"),
        ({"tokens": 8, "ending": "gated"}, "gate"),
        ({"tokens": 8, "d_in": 96}, "d_in 96"),
        ({"tokens": 8, "rank": 8}, "rank capacity 8"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lowered(**({"d_in": 128, "splits": (128,), "ending": "plain"} | options))


def test_a_configuration_that_would_wait_for_ever_is_refused() -> None:
    config = heuristic(64, 512, (256,), gated=False, rank=16, blocks=16, block_tokens=8)
    function = functools.partial(
        gpu.lora_linear, config=dataclasses.replace(config, stages=1, cluster=1)
    )
    with pytest.raises(ValueError, match="needs 2 stages"):
        lowered(512, (256,), "plain", tokens=64, function=function)
