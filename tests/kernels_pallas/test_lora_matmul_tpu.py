"""What is particular to the TPU kernel: which tiles it moves, and how it cuts its operands."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.compile_tpu import GROUPS
from kernels_pallas.lora_matmul import tpu
from kernels_pallas.lora_matmul.op import LoraBatch, plan
from tests.kernels_pallas.lora_problem import (
    BFLOAT16,
    FLOAT32,
    Problem,
    Runs,
    Shape,
    assert_exact,
    make,
)

QKV = Shape(num_tokens=64, num_slots=16, rank=64, d_in=128, splits=(256, 128, 128))
RUNS: Runs = ((9, 20), (-1, 7), (2, 1), (0, 3), (11, 12))
"""Blocks of 8 tokens: three of slot 9, one of 2, one of 0 in the same tile, three of 11."""
RANKS = {0: 1, 2: 16, 3: 64, 9: 17, 11: 64}
CUT = tpu.Config(rank_chunk=16, columns=128)
Tile = tuple[int, ...]


def aligned_plan(problem: Problem) -> LoraBatch:
    return plan(
        problem.token_slots,
        problem.ranks,
        block_tokens=tpu.IMPLEMENTATION.block_tokens(problem.shape.num_tokens),
        aligned=True,
    )


def run(problem: Problem, **options: Any) -> np.ndarray:
    arrays = map(jnp.asarray, (problem.y, problem.x, problem.a, problem.b))
    function = functools.partial(tpu.lora_matmul, splits=problem.shape.splits, **options)
    return np.asarray(function(*arrays, aligned_plan(problem)))


def fetched(
    monkeypatch: pytest.MonkeyPatch, problem: Problem, config: tpu.Config | None = None
) -> dict[str, list[Tile]]:
    """The tiles of every operand that the pipeline moves, in order, for the grid as it is run.

    The rule is the pipeline's own: a tile is moved when the block index is not that of the step
    before.
    """
    calls: list[tuple[pltpu.PrefetchScalarGridSpec, tuple[Any, ...]]] = []
    pallas_call = pl.pallas_call

    def spy(kernel: Any, *, grid_spec: pltpu.PrefetchScalarGridSpec, **options: Any) -> Any:
        function = pallas_call(kernel, grid_spec=grid_spec, **options)

        def call(*args: Any) -> Any:
            calls.append((grid_spec, args))
            return function(*args)

        return call

    monkeypatch.setattr(pl, "pallas_call", spy)
    assert_exact(run(problem, config=config, interpret=True), problem)
    monkeypatch.undo()
    [(spec, args)] = calls
    scalars = [np.asarray(arg) for arg in args[: spec.num_scalar_prefetch]]
    steps = list(itertools.product(*(range(int(size)) for size in spec.grid)))
    tiles = {}
    for name, block in zip("xaby", spec.in_specs, strict=True):
        visited = [tuple(int(i) for i in block.index_map(*step, *scalars)) for step in steps]
        tiles[name] = [tile for tile, _ in itertools.groupby(visited)]
    return tiles


def test_only_tiles_below_the_true_ranks_of_active_slots_are_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = fetched(monkeypatch, make(QKV, RUNS, RANKS, BFLOAT16))
    # Rank 17 is two chunks of 16 rows, fetched for each of slot 9's three tiles.
    nine = [(9, 0), (9, 1)] * 3
    eleven = [(11, 0), (11, 1), (11, 2), (11, 3)] * 3
    chunks = [*nine, (2, 0), (0, 0), *eleven]
    assert tiles["a"] == [(slot, 0, chunk, 0) for slot, chunk in chunks]
    assert tiles["b"] == [(slot, chunk, 0) for slot, chunk in chunks]
    assert tiles["x"] == tiles["y"] == [(tile, 0) for tile in range(6)]


def test_columns_that_do_not_fit_at_once_move_everything_but_a_and_x_once_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make(QKV, RUNS, RANKS, BFLOAT16)
    whole, cut = fetched(monkeypatch, problem), fetched(monkeypatch, problem, CUT)
    assert cut["a"] == whole["a"]
    assert cut["x"] == whole["x"]
    assert cut["y"] == [(tile, n) for n in range(4) for tile, _ in whole["y"]]
    assert cut["b"] == [(slot, chunk, n) for n in range(4) for slot, chunk, _ in whole["b"]]


def test_an_adapter_of_one_chunk_is_fetched_once_whatever_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = fetched(monkeypatch, make(QKV, ((2, 60),), RANKS, BFLOAT16))
    assert tiles["a"] == [(2, 0, 0, 0)]
    assert tiles["b"] == [(2, 0, 0)]
    assert len(tiles["x"]) == len(tiles["y"]) == 8


def test_a_batch_without_adapters_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # The pipeline has no empty grid. The engine runs its base program for such a batch.
    tiles = fetched(monkeypatch, make(QKV, ((-1, 40),), RANKS, BFLOAT16))
    assert {name: len(moved) for name, moved in tiles.items()} == {"x": 1, "a": 1, "b": 1, "y": 1}


@pytest.mark.parametrize("num_slots", [2, 128])
@pytest.mark.parametrize("rank", [16, 64])
def test_cost_does_not_follow_the_capacity(
    monkeypatch: pytest.MonkeyPatch, num_slots: int, rank: int
) -> None:
    shape = Shape(num_tokens=8, num_slots=num_slots, rank=rank, d_in=128, splits=(128,))
    tiles = fetched(monkeypatch, make(shape, ((1, 3), (0, 2)), {0: 8, 1: 16}, BFLOAT16))
    assert {name: len(moved) for name, moved in tiles.items()} == {"x": 1, "a": 2, "b": 2, "y": 1}


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_cut_columns_give_the_same_result(dtype: np.dtype) -> None:
    problem = make(QKV, RUNS, RANKS, dtype)
    config = tpu.Config(rank_chunk=8 if dtype == FLOAT32 else 16, columns=128)
    result = run(problem, config=config, interpret=True)
    assert_exact(result, problem)
    np.testing.assert_array_equal(result, run(problem, interpret=True))


@pytest.mark.parametrize("config", [None, CUT], ids=["whole rows", "cut"])
def test_holds_under_the_simulated_pipeline(config: tpu.Config | None) -> None:
    # Buffers, copies and semaphores as on a TPU, all memory NaN until it is written.
    shape = Shape(num_tokens=16, num_slots=4, rank=32, d_in=128, splits=(128, 128))
    problem = make(shape, ((3, 9), (0, 2), (-1, 1), (1, 3)), {0: 32, 1: 5, 3: 17}, BFLOAT16)
    assert_exact(run(problem, config=config, interpret=pltpu.InterpretParams()), problem)


def test_blocks_grow_with_the_step() -> None:
    sizes = {tokens: tpu.IMPLEMENTATION.block_tokens(tokens) for tokens in (1, 8, 64, 256, 4096)}
    assert sizes == {1: 8, 8: 8, 64: 8, 256: 32, 4096: 128}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("num_tokens", [1, 64, 256])
def test_whole_rows_while_they_fit(name: str, num_tokens: int) -> None:
    group, block_tokens = GROUPS[name], tpu.IMPLEMENTATION.block_tokens(num_tokens)
    config = tpu.choose_config(num_tokens, block_tokens, group.d_in, group.splits, 64, jnp.bfloat16)
    assert config == tpu.Config(rank_chunk=16, columns=sum(group.splits))


def test_long_steps_cut_the_columns_inside_members() -> None:
    group = GROUPS["gate_up"]
    config = tpu.choose_config(2048, 128, group.d_in, group.splits, 64, jnp.bfloat16)
    assert config.columns % 128 == 0
    assert all(width % config.columns == 0 for width in group.splits)


def test_columns_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2048 tokens .* use fewer tokens"):
        tpu.choose_config(2048, 128, 4096, (30000, 100), 64, jnp.bfloat16)


def test_refuses_what_it_cannot_tile() -> None:
    problem = make(QKV, RUNS, RANKS, FLOAT32)
    y, x, a, b = map(jnp.asarray, (problem.y, problem.x, problem.a, problem.b))
    odd = plan(problem.token_slots, problem.ranks, block_tokens=12, aligned=True)
    with pytest.raises(ValueError, match="block_tokens 12 must be a multiple of 8"):
        tpu.lora_matmul(y, x, a, b, odd, splits=QKV.splits)
    with pytest.raises(ValueError, match="rank 60 must be a multiple of 8: round it up"):
        tpu.lora_matmul(y, x, a[:, : 3 * 60], b[:, :60], aligned_plan(problem), splits=QKV.splits)


def test_the_kernel_carries_its_cost() -> None:
    problem = make(QKV, RUNS, RANKS, BFLOAT16)
    arrays = map(jnp.asarray, (problem.y, problem.x, problem.a, problem.b))
    jaxpr = jax.make_jaxpr(functools.partial(tpu.lora_matmul, splits=QKV.splits, interpret=True))(
        *arrays, aligned_plan(problem)
    )
    [call] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]
    cost = call.params["cost_estimate"]
    assert cost.flops == 2 * 64 * 64 * (3 * 128 + 512)
    assert cost.bytes_accessed == 2 * (64 * 128 + 2 * 64 * 512 + 16 * 64 * (3 * 128 + 512))


@pytest.mark.parametrize(
    ("num_tokens", "num_slots", "kernel"),
    [(64, 8, False), (256, 8, False), (63, 8, True), (257, 8, True), (64, 9, True)],
)
def test_few_slots_in_a_large_decode_step_are_all_read(
    num_tokens: int, num_slots: int, kernel: bool
) -> None:
    shape = Shape(num_tokens=num_tokens, num_slots=num_slots, rank=16, d_in=128, splits=(128, 128))
    problem = make(shape, ((2, 20), (-1, 5), (0, 30)), {0: 16, 2: 3, 5: 9}, BFLOAT16)
    arrays = tuple(map(jnp.asarray, (problem.y, problem.x, problem.a, problem.b)))
    function = functools.partial(tpu.IMPLEMENTATION.function, splits=shape.splits, interpret=True)
    batch = aligned_plan(problem)
    assert ("pallas_call" in str(jax.make_jaxpr(function)(*arrays, batch))) == kernel
    if not kernel:
        assert_exact(np.asarray(jax.jit(function)(*arrays, batch)), problem)
