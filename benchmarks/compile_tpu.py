"""Compiles the LoRA kernel for TPUs on a machine that has none, at the shapes of an 8B model.

    python -m benchmarks.compile_tpu [--chip v5e] [--tokens 8] [--rank 16]

Needs libtpu. One line a program: time to compile, tile of y, memory beside arguments and result.
Nothing runs, so nothing is said about speed.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels_pallas.lora_matmul import tpu
from kernels_pallas.lora_matmul.op import plan

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""The smallest topology of each chip."""


class Group(NamedTuple):
    """Linears that share an input."""

    d_in: int
    splits: tuple[int, ...]


GROUPS = {
    "qkv": Group(4096, (4096, 1024, 1024)),
    "o": Group(4096, (4096,)),
    "gate_up": Group(4096, (14336, 14336)),
    "down": Group(14336, (4096,)),
}
"""Llama 3 8B."""
TOKENS = (8, 128, 2048)
RANKS = (8, 16, 64)
NUM_SLOTS = 64


@functools.cache
def device(chip: str) -> jax.Device:
    """A device to compile for, not to run on."""
    # libtpu would ask a metadata server about the machine, and refuse a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return topology.devices[0]


def compile_lora_matmul(chip: str, group: Group, num_tokens: int, rank: int) -> jax.stages.Compiled:
    """The op in bfloat16, y donated, for a bank of :data:`NUM_SLOTS` slots of this rank."""
    sharding = SingleDeviceSharding(device(chip))

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    batch = plan(
        np.zeros(num_tokens, np.int32),
        np.full(NUM_SLOTS, rank, np.int32),
        block_tokens=tpu.IMPLEMENTATION.block_tokens(num_tokens),
        aligned=tpu.IMPLEMENTATION.aligned,
    )
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), batch
    )
    d_out, members = sum(group.splits), len(group.splits)
    function = jax.jit(functools.partial(tpu.lora_matmul, splits=group.splits), donate_argnames="y")
    return function.lower(
        y=array(num_tokens, d_out),
        x=array(num_tokens, group.d_in),
        a=array(NUM_SLOTS, members * rank, group.d_in),
        b=array(NUM_SLOTS, rank, d_out),
        batch=batch,
    ).compile()


def main() -> None:
    """Compiles the chosen part of the matrix, by default all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=TOPOLOGIES, action="append")
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--rank", type=int, action="append")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {NUM_SLOTS} slots, bfloat16")
    print("chip group    tokens rank  columns  seconds  extra KiB")
    for chip in args.chip or TOPOLOGIES:
        for name, group in GROUPS.items():
            for num_tokens in args.tokens or TOKENS:
                for rank in args.rank or RANKS:
                    start = time.perf_counter()
                    compiled = compile_lora_matmul(chip, group, num_tokens, rank)
                    seconds = time.perf_counter() - start
                    config = tpu.choose_config(
                        num_tokens,
                        tpu.IMPLEMENTATION.block_tokens(num_tokens),
                        group.d_in,
                        group.splits,
                        rank,
                        jnp.bfloat16,
                    )
                    extra = compiled.memory_analysis().temp_size_in_bytes / 1024
                    print(
                        f"{chip:4} {name:8} {num_tokens:6} {rank:4} {config.columns:8} "
                        f"{seconds:8.2f} {extra:10.0f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
