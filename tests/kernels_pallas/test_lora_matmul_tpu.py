"""What is particular to the TPU kernel: which tiles it moves, and how it cuts its operands."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.compile_tpu import GROUPS
from kernels_pallas.lora_matmul import tpu, tpu_config
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
CUT = tpu_config.Config(rank_chunk=16, columns=128, chunks=4, items=1, depth=2)
MANY = Shape(num_tokens=64, num_slots=40, rank=16, d_in=128, splits=(256, 128))
MANY_RUNS: Runs = (
    *((20, 3), (7, 1), (31, 1), (5, 9), (-1, 4), (1, 1), (2, 17), (3, 2)),
    *((slot, 1) for slot in range(8, 19)),
    *((-1, 2), (39, 5)),
)
"""Groups of four adapters that begin and end inside tiles of 8 tokens."""
MANY_RANKS = {slot: 1 + 7 * slot % 16 for slot in range(40)}
Tile = tuple[int, ...]


def aligned_plan(problem: Problem) -> LoraBatch:
    return plan(
        problem.token_slots,
        problem.ranks,
        block_tokens=tpu.IMPLEMENTATION.block_tokens(problem.shape.num_tokens),
        aligned=True,
    )


def run(problem: Problem, **options: Any) -> np.ndarray:
    function = functools.partial(tpu.lora_matmul, splits=problem.shape.splits, **options)
    arrays = problem.y, problem.x, problem.a, problem.b
    # As one program: one for each operation around the kernel takes longer to compile.
    return np.asarray(jax.jit(function)(*arrays, aligned_plan(problem)))


class Copy:
    """In the place of a copy to VMEM: notes slot and chunk when it is started."""

    def __init__(self, started: list[Tile], source: Any, target: Any, semaphore: Any) -> None:
        self._started = started
        self._source = source
        self._copy = make_async_copy(source, target, semaphore)

    def start(self) -> None:
        slot, *rest = self._source.transforms[0].indices
        chunk = rest[-3 if len(rest) == 4 else 0]
        jax.debug.callback(lambda *of: self._started.append(tuple(map(int, of))), slot, chunk)
        self._copy.start()

    def wait(self) -> None:
        self._copy.wait()


make_async_copy = pltpu.make_async_copy


def fetched(
    monkeypatch: pytest.MonkeyPatch, problem: Problem, config: tpu_config.Config | None = None
) -> dict[str, list[Tile]]:
    """What of every operand is moved, in order: copies of A and B as they are started, tiles of x
    and y by the pipeline's rule (when the block index is not that of the step before)."""
    calls: list[pltpu.PrefetchScalarGridSpec] = []
    given: list[np.ndarray] = []
    copies: dict[int, list[Tile]] = {5: [], 4: []}
    pallas_call = pl.pallas_call

    def spy(kernel: Any, *, grid_spec: pltpu.PrefetchScalarGridSpec, **options: Any) -> Any:
        function = pallas_call(kernel, grid_spec=grid_spec, **options)

        def call(*args: Any) -> Any:
            calls.append(grid_spec)
            told = (*grid_spec.grid, *args[: grid_spec.num_scalar_prefetch])
            jax.debug.callback(lambda *values: given.extend(map(np.asarray, values)), *told)
            return function(*args)

        return call

    def copy(source: Any, target: Any, semaphore: Any) -> Copy:
        return Copy(copies[len(source.ref.shape)], source, target, semaphore)

    monkeypatch.setattr(pl, "pallas_call", spy)
    monkeypatch.setattr(pltpu, "make_async_copy", copy)
    assert_exact(run(problem, config=config, interpret=True), problem)
    jax.effects_barrier()
    monkeypatch.undo()
    [spec] = calls
    grid, scalars = given[: len(spec.grid)], given[len(spec.grid) :]
    steps = list(itertools.product(*(range(int(size)) for size in grid)))
    tiles = {"a": copies[5], "b": copies[4]}
    for name, block in zip("xy", spec.in_specs[:2], strict=True):
        visited = [tuple(int(i) for i in block.index_map(*step, *scalars)) for step in steps]
        tiles[name] = [tile for tile, _ in itertools.groupby(visited)]
    return tiles


def test_only_chunks_below_the_true_ranks_of_active_slots_are_fetched_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = fetched(monkeypatch, make(QKV, RUNS, RANKS, BFLOAT16))
    # Rank 17 is two chunks of 16 rows.
    chunks = [(9, 0), (9, 1), (2, 0), (0, 0), (11, 0), (11, 1), (11, 2), (11, 3)]
    assert tiles["a"] == tiles["b"] == chunks
    assert tiles["x"] == tiles["y"] == [(tile, 0) for tile in range(6)]


def test_adapters_of_a_group_are_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = fetched(monkeypatch, make(MANY, MANY_RUNS, MANY_RANKS, BFLOAT16))
    assert tiles["a"] == tiles["b"] == [(slot, 0) for slot, _ in MANY_RUNS if slot >= 0]
    assert tiles["x"] == tiles["y"] == [(tile, 0) for tile in range(7)]


def test_an_adapter_of_several_items_is_fetched_once_a_tile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = Shape(num_tokens=16, num_slots=2, rank=96, d_in=128, splits=(128,))
    tiles = fetched(monkeypatch, make(shape, ((1, 12),), {1: 90}, BFLOAT16))
    assert tiles["a"] == tiles["b"] == 2 * [(1, chunk) for chunk in range(6)]


def test_columns_that_do_not_fit_at_once_move_everything_but_b_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = make(QKV, RUNS, RANKS, BFLOAT16)
    whole, cut = fetched(monkeypatch, problem), fetched(monkeypatch, problem, CUT)
    assert cut["a"] == whole["a"]
    assert cut["x"] == whole["x"]
    assert cut["y"] == [(tile, n) for n in range(4) for tile, _ in whole["y"]]
    # A quarter of the columns each time.
    assert cut["b"] == 4 * whole["b"]


def test_an_adapter_of_one_chunk_is_fetched_once_whatever_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiles = fetched(monkeypatch, make(QKV, ((2, 60),), RANKS, BFLOAT16))
    assert tiles["a"] == tiles["b"] == [(2, 0)]
    assert len(tiles["x"]) == len(tiles["y"]) == 8


def test_a_batch_without_adapters_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # The pipeline has no empty grid. The engine runs its base program for such a batch.
    tiles = fetched(monkeypatch, make(QKV, ((-1, 40),), RANKS, BFLOAT16))
    assert {name: len(moved) for name, moved in tiles.items()} == {"x": 1, "a": 0, "b": 0, "y": 1}


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
    config = dataclasses.replace(CUT, rank_chunk=8 if dtype == FLOAT32 else 16)
    result = run(problem, config=config, interpret=True)
    assert_exact(result, problem)
    np.testing.assert_array_equal(result, run(problem, interpret=True))


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize("config", [None, CUT], ids=["whole rows", "cut"])
def test_holds_under_the_simulated_pipeline(
    config: tpu_config.Config | None, mode: Literal["eager", "on_wait"]
) -> None:
    # Buffers, copies and semaphores as on a TPU, all memory NaN until it is written; a copy is made
    # when it is started, which would spoil what is still read, or not until it is waited for.
    shape = Shape(num_tokens=16, num_slots=4, rank=32, d_in=128, splits=(128, 128))
    problem = make(shape, ((3, 9), (0, 2), (-1, 1), (1, 3)), {0: 32, 1: 5, 3: 17}, BFLOAT16)
    simulated = pltpu.InterpretParams(dma_execution_mode=mode)
    assert_exact(run(problem, config=config, interpret=simulated), problem)


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
def test_a_ring_of_two_groups_holds_many(mode: Literal["eager", "on_wait"]) -> None:
    problem = make(MANY, MANY_RUNS, MANY_RANKS, BFLOAT16)
    config = tpu_config.Config(rank_chunk=16, columns=384, chunks=1, items=4, depth=2)
    simulated = pltpu.InterpretParams(dma_execution_mode=mode)
    result = run(problem, config=config, interpret=simulated)
    assert_exact(result, problem)
    np.testing.assert_array_equal(result, run(problem, interpret=True))


@settings(max_examples=20)
@given(data=st.data())
def test_any_groups(data: st.DataObject) -> None:
    slots = data.draw(st.permutations([-1, *range(MANY.num_slots)]), label="slots")
    counts = data.draw(
        st.lists(st.sampled_from([0, 1, 1, 1, 2, 7, 8, 17]), max_size=len(slots)), label="counts"
    )
    ends = np.minimum(np.cumsum([0, *counts]), MANY.num_tokens)
    runs = tuple(zip(slots, np.diff(ends).tolist(), strict=False))
    problem = make(MANY, runs, MANY_RANKS, BFLOAT16, seed=data.draw(st.integers(0, 99)))
    arrays = map(jnp.asarray, (problem.y, problem.x, problem.a, problem.b))
    assert_exact(np.asarray(interpreted(*arrays, aligned_plan(problem))), problem)


interpreted = jax.jit(functools.partial(tpu.lora_matmul, splits=MANY.splits, interpret=True))


def test_blocks_grow_with_the_step() -> None:
    sizes = {tokens: tpu.IMPLEMENTATION.block_tokens(tokens) for tokens in (1, 8, 64, 256, 4096)}
    assert sizes == {1: 8, 8: 8, 64: 8, 256: 32, 4096: 128}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("num_tokens", [1, 64, 256])
def test_whole_rows_while_they_fit(name: str, num_tokens: int) -> None:
    group, block_tokens = GROUPS[name], tpu.IMPLEMENTATION.block_tokens(num_tokens)
    config = tpu_config.choose_config(
        num_tokens, block_tokens, group.d_in, group.splits, 64, jnp.bfloat16
    )
    assert config.columns == sum(group.splits)
    assert config.rank_chunk * config.chunks * config.items == 64


def test_long_steps_cut_the_columns_inside_members() -> None:
    group = GROUPS["gate_up"]
    config = tpu_config.choose_config(2048, 128, group.d_in, group.splits, 64, jnp.bfloat16)
    assert config.columns % 128 == 0
    assert all(width % config.columns == 0 for width in group.splits)


def test_columns_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2048 tokens .* use fewer tokens"):
        tpu_config.choose_config(2048, 128, 4096, (30000, 100), 64, jnp.bfloat16)


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
