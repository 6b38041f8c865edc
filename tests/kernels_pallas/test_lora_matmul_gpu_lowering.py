"""The Mosaic GPU kernel lowers for CUDA on any machine: what it computes is tested on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.lora_matmul import gpu
from kernels_pallas.lora_matmul.gpu_config import Config

LLAMA_8B = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
SMOLLM2_135M = {
    "qkv": (576, (576, 192, 192)),
    "o": (576, (576,)),
    "gate_up": (576, (1536, 1536)),
    "down": (1536, (576,)),
}
GROUPS = {
    f"{model}-{name}": group
    for model, groups in (("llama-8b", LLAMA_8B), ("smollm2-135m", SMOLLM2_135M))
    for name, group in groups.items()
}


EIGHT = Config(cluster=8, groups=1, warpgroups=1, tile_k=64, stages_k=2, tile_n=64, stages_n=2)


def lowered(
    d_in: int,
    splits: tuple[int, ...],
    *,
    tokens: int,
    rank: int = 16,
    slots: int = 8,
    dtype: jnp.dtype = jnp.bfloat16,
    function: Callable[..., jax.Array] = gpu.lora_matmul,
    **options: Config,
) -> str:
    """For the second of two layers in one array."""
    token_slots = np.sort(np.arange(tokens) % slots).astype(np.int32)
    batch = gpu.IMPLEMENTATION.plan(token_slots, np.full(slots, rank, np.int32)).of_layer(1, 2)
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in (
            (tokens, sum(splits)),
            (tokens, d_in),
            (2 * slots, len(splits) * rank, d_in),
            (2 * slots, rank, sum(splits)),
        )
    ]
    jitted = jax.jit(functools.partial(function, splits=splits, **options))
    return jitted.trace(*arrays, batch).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tokens", [1, 8, 64, 2048])
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_lowers(group: str, tokens: int) -> None:
    assert "@mosaic_gpu" in lowered(*GROUPS[group], tokens=tokens)


@pytest.mark.parametrize(
    ("tokens", "rank"), [(1, 8), (64, 16), (256, 64), (2048, 16), (2048, 128), (8192, 24)]
)
@pytest.mark.parametrize("group", ["llama-8b-gate_up", "smollm2-135m-gate_up"])
def test_gates_lower(group: str, tokens: int, rank: int) -> None:
    text = lowered(*GROUPS[group], tokens=tokens, rank=rank, function=gpu.gated_lora_matmul)
    assert "@mosaic_gpu" in text
    assert f"-> (tensor<{tokens}x{GROUPS[group][1][0]}xbf16>" in text


def test_a_gate_is_between_two_members_of_equal_width() -> None:
    with pytest.raises(ValueError, match="two members of equal width"):
        lowered(*GROUPS["llama-8b-qkv"], tokens=256, function=gpu.gated_lora_matmul)


@pytest.mark.parametrize("rank", [8, 24, 64])
@pytest.mark.parametrize("tokens", [12, 4096])
def test_every_rank_lowers(rank: int, tokens: int) -> None:
    assert "@mosaic_gpu" in lowered(*GROUPS["llama-8b-qkv"], tokens=tokens, rank=rank, slots=12)


def test_y_is_updated_in_place() -> None:
    text = lowered(*GROUPS["smollm2-135m-qkv"], tokens=8)
    assert "output_operand_alias<output_tuple_indices = [], operand_index = 0" in text


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        ((100, (128,)), {}, "d_in 100"),
        ((128, (128, 96)), {}, "96"),
        ((128, (128,)), {"rank": 12}, "rank capacity 12"),
        ((128, (128,) * 3), {"rank": 128}, "128"),
        ((128, (128,)), {"dtype": jnp.float32}, "float32"),
        ((64, (128,)), {"config": EIGHT}, "at least 512"),
    ],
)
def test_what_it_cannot_serve_is_refused(
    group: tuple[int, tuple[int, ...]], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lowered(*group, tokens=8, **options)
