"""An adapter's write into a slot: XLA's and the kernel, against the formula."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.slot_write import gpu, reference
from kernels_pallas.slot_write.op import ABSENT, Implementation, Pair, padded
from tests.kernels_pallas.lora_problem import BFLOAT16, FLOAT16, FLOAT32

SLOTS, LAYERS = 3, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """Groups as (d_in, splits), the bank's rank, an adapter's, and the matrices it has not."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    capacity: int
    rank: int
    absent: tuple[tuple[int, int, int], ...] = ()


SMALL = ((192, (128, 64, 64)), (128, (192,)), (192, (320, 320)), (320, (192,)))
LARGE = ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)))
CASES = {
    "rank as the bank's": Case(SMALL, 16, 16),
    "half a tile": Case(SMALL, 16, 8),
    "less than the bank's": Case(SMALL, 64, 16),
    "half a tile of many": Case(SMALL, 48, 8, absent=((0, 0, 0), (1, 6, 1))),
    "a high rank": Case(SMALL, 64, 64, absent=((1, 2, 1),)),
    "an odd number of tiles": Case(SMALL, 48, 48),
    "members missing in all layers": Case(
        SMALL,
        32,
        32,
        tuple((layer, m, i) for layer in range(LAYERS) for m in (0, 3) for i in (0, 1)),
    ),
    "as wide as a model": Case(LARGE, 16, 16, absent=((0, 4, 0), (0, 4, 1))),
}
IMPLEMENTATIONS = [
    pytest.param(reference.IMPLEMENTATION, FLOAT32, FLOAT32, id="xla-float32"),
    pytest.param(reference.IMPLEMENTATION, FLOAT32, BFLOAT16, id="xla-bfloat16-from-float32"),
    *(
        pytest.param(
            gpu.IMPLEMENTATION,
            source,
            dtype,
            id=f"gpu-{dtype}-from-{source}",
            marks=pytest.mark.gpu,
        )
        for source, dtype in [(BFLOAT16, BFLOAT16), (FLOAT32, BFLOAT16), (FLOAT16, FLOAT16)]
    ),
]


def bank_of(case: Case, dtype: np.dtype) -> list[Pair]:
    def full(*shape: int) -> jax.Array:
        return jnp.full((LAYERS, SLOTS, *shape), 7.0, dtype)

    return [
        Pair(full(len(splits) * case.capacity, d_in), full(case.capacity, sum(splits)))
        for d_in, splits in case.groups
    ]


def program(implementation: Implementation, case: Case) -> Any:
    splits = [splits for _, splits in case.groups]
    function = functools.partial(implementation.function, splits=splits, rank=case.rank)
    return jax.jit(function, donate_argnums=0)


def packed(case: Case, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices in any order, with NaN between and behind them, where they may lie."""
    random = np.random.default_rng(0)
    widths = [(d, w) for d, splits in case.groups for w in splits]
    sizes = {
        (layer, m, i): case.rank * pair[i]
        for layer in range(LAYERS)
        for m, pair in enumerate(widths)
        for i in range(2)
        if (layer, m, i) not in case.absent
    }
    places = np.full((LAYERS, len(widths), 2), ABSENT, np.int32)
    buffer = np.full(sum(sizes.values()) + 4 * len(sizes) + 64, np.nan, dtype)
    at = 0
    order = list(sizes)
    for n in random.permutation(len(order)):
        key = order[n]
        at += 4 * (n % 2)
        places[key] = at
        buffer[at : at + sizes[key]] = random.standard_normal(sizes[key]).astype(dtype)
        at += sizes[key]
    return buffer, places, random.uniform(0.1, 3, places.shape[:2]).astype(np.float32)


@pytest.mark.parametrize(("implementation", "source", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_a_slot_holds_what_the_formula_says_and_all_else_stays(
    implementation: Implementation, source: np.dtype, dtype: np.dtype, case: Case
) -> None:
    buffer, places, scales = packed(case, source)
    write = program(implementation, case)
    written = write(bank_of(case, dtype), buffer, places, scales, np.int32(1))
    rank, filled, first = case.rank, padded(case.rank), 0
    for (d_in, splits), pair in zip(case.groups, written, strict=True):
        a = np.full(pair.a.shape, 7.0, dtype)
        b = np.full(pair.b.shape, 7.0, dtype)
        for layer, (m, width) in itertools.product(range(LAYERS), enumerate(splits)):
            a_at, b_at = places[layer, first + m]
            rows = a[layer, 1, m * case.capacity :][:filled]
            columns = b[layer, 1, :filled, sum(splits[:m]) :][:, :width]
            rows[:], columns[:] = 0, 0
            if a_at != ABSENT:
                rows[:rank] = buffer[a_at:][: rank * d_in].reshape(rank, d_in).astype(dtype)
            if b_at != ABSENT:
                part = buffer[b_at:][: rank * width].reshape(width, rank).astype(np.float32)
                columns[:rank] = (part * scales[layer, first + m]).astype(dtype).T
        first += len(splits)
        np.testing.assert_array_equal(np.asarray(pair.a), a)
        np.testing.assert_array_equal(np.asarray(pair.b), b)


@pytest.mark.gpu
def test_nothing_is_copied() -> None:
    case = CASES["as wide as a model"]
    arguments = bank_of(case, BFLOAT16), *packed(case, BFLOAT16), np.int32(0)
    compiled = program(gpu.IMPLEMENTATION, case).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0]))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < 1024


@pytest.mark.parametrize("source", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_the_kernel_lowers_for_cuda(rank: int, source: np.dtype) -> None:
    groups = (*LARGE[:1], (4096, (4096,)), *LARGE[1:], (14336, (4096,)))
    case = Case(groups, 64, rank)
    assert all(gpu.problem(d_in, splits, BFLOAT16) is None for d_in, splits in groups)
    shapes: Any = jax.eval_shape(functools.partial(bank_of, case, BFLOAT16))
    size = LAYERS * rank * sum(len(s) * d + sum(s) for d, s in groups)
    arguments = (
        jax.ShapeDtypeStruct((size,), source),
        jax.ShapeDtypeStruct((LAYERS, 7, 2), np.int32),
        jax.ShapeDtypeStruct((LAYERS, 7), np.float32),
        jax.ShapeDtypeStruct((), np.int32),
    )
    traced = program(gpu.IMPLEMENTATION, case).trace(shapes, *arguments)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize(
    ("d_in", "dtype", "said"), [(4096, FLOAT32, "float32"), (4100, BFLOAT16, "multiples of 64")]
)
def test_what_the_kernel_does_not_write(d_in: int, dtype: np.dtype, said: str) -> None:
    found = gpu.problem(d_in, (14336, 14336), dtype)
    assert found is not None
    assert said in found


def test_a_rank_between_tiles_is_refused() -> None:
    case = Case(SMALL, 32, 24)
    arguments = bank_of(case, BFLOAT16), *packed(case, BFLOAT16), np.int32(0)
    with pytest.raises(ValueError, match="rank 24 must be 8 or a multiple of 16"):
        program(gpu.IMPLEMENTATION, case).trace(*arguments)
