"""Compiles for TPUs on a machine that has none: the LoRA kernel, and the engine's own programs.

    python -m benchmarks.compile_tpu kernels [--chip v5e] [--tokens 8] [--rank 16]
    python -m benchmarks.compile_tpu programs [--chip v5e] [--devices 4] [--slots 8] [--extras]
        [--out x.json]
    python -m benchmarks.compile_tpu summary x.json ...

Needs libtpu. One line a program: time to compile, memory, and with ``--out`` all of it as JSON,
written after each program; what the file has at this commit is not compiled again. ``summary`` (and
``programs`` at its end) says which engine fits. Nothing runs, so nothing is said about speed.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.record import load, save, table
from benchmarks.tpu_programs import SIZES, Engine, Target, summary
from benchmarks.tpu_topologies import CHIPS, compile_for, devices
from kernels_pallas.lora_matmul import tpu, tpu_config


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

TARGETS = (
    *(Target(shape="smollm2-135m", chip=chip, num_devices=1, slots=8) for chip in CHIPS),
    *(
        Target(shape="llama-3.1-8b", chip=chip, num_devices=count, slots=slots)
        for chip in CHIPS
        for count in (1, 4)
        for slots in (8, 64)
    ),
    *(
        Target(shape=shape, chip=chip, num_devices=count, slots=8, extras=True)
        for shape, count in (("smollm2-135m", 1), ("llama-3.1-8b", 4))
        for chip in CHIPS
    ),
)
"""What is to be served; 8B on one v5e is here because it does not fit."""


def compile_lora_matmul(
    chip: str, group: Group, num_tokens: int, rank: int, num_slots: int = NUM_SLOTS
) -> jax.stages.Compiled:
    """The op in bfloat16, y donated, for a bank of this rank."""
    sharding = SingleDeviceSharding(devices(chip)[0])

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    batch = tpu.IMPLEMENTATION.plan(
        np.zeros(num_tokens, np.int32), np.full(num_slots, rank, np.int32)
    )
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), batch
    )
    d_out, members = sum(group.splits), len(group.splits)
    function = functools.partial(tpu.IMPLEMENTATION.function, splits=group.splits)
    lowered = jax.jit(function, donate_argnames="y").lower(
        y=array(num_tokens, d_out),
        x=array(num_tokens, group.d_in),
        a=array(num_slots, members * rank, group.d_in),
        b=array(num_slots, rank, d_out),
        batch=batch,
    )
    return compile_for(lowered)


def kernels(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The LoRA kernel over the groups of an 8B model."""
    rows = []
    for chip in args.chip or CHIPS:
        for name, group in GROUPS.items():
            for num_tokens in args.tokens or TOKENS:
                for rank in args.rank or RANKS:
                    start = time.perf_counter()
                    compiled = compile_lora_matmul(chip, group, num_tokens, rank)
                    seconds = time.perf_counter() - start
                    config = tpu_config.choose_config(
                        num_tokens,
                        tpu.IMPLEMENTATION.block_tokens(num_tokens),
                        group.d_in,
                        group.splits,
                        rank,
                        jnp.bfloat16,
                    )
                    row = {"chip": chip, "group": name, "tokens": num_tokens, "rank": rank}
                    memory = compiled.memory_analysis()
                    assert memory is not None
                    extra = memory.temp_size_in_bytes / 1024
                    row |= {"columns": config.columns, "compile s": seconds, "extra KiB": extra}
                    rows.append(row)
                    print(row, flush=True)
    return rows


def programs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The largest of the engine's programs of each kind, for every target."""
    rows = load(args.out)
    done = {(*(row[key] for key in SIZES), row["program"]) for row in rows}
    seen = set()
    for target in TARGETS:
        asked = (
            (args.shape, target.shape),
            (args.chip, target.chip),
            (args.slots, target.slots),
            (args.devices, target.num_devices),
            (args.extras, target.extras),
        )
        if not all(one is None or value in one for one, value in asked):
            continue
        sizes = (target.shape, target.chip, target.num_devices)
        kinds = [
            kind
            for kind, program in target.largest.items()
            if not (sizes in seen and kind in target.WITHOUT_SLOTS)
            and (*sizes, target.slots, target.extras, program) not in done
            and (args.kind is None or kind in args.kind)
        ]
        seen.add(sizes)
        engine = Engine(target) if kinds else None
        for kind in kinds:
            assert engine is not None
            rows.append(engine.report(kind))
            print(rows[-1], flush=True)
            save(args.out, "compile_tpu programs", rows)
    return rows


def main() -> None:
    """Compiles the chosen part of a matrix, by default all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("kernels", "programs", "summary"))
    parser.add_argument("files", nargs="*", help="summary: what programs wrote")
    parser.add_argument("--chip", choices=CHIPS, action="append")
    parser.add_argument("--tokens", type=int, action="append", help="kernels")
    parser.add_argument("--rank", type=int, action="append", help="kernels")
    parser.add_argument("--shape", action="append", help="programs")
    parser.add_argument("--devices", type=int, action="append", help="programs")
    parser.add_argument("--slots", type=int, action="append", help="programs")
    parser.add_argument(
        "--extras", action="append_const", const=True, help="programs: of lora_extras alone"
    )
    parser.add_argument("--kind", action="append", help="programs: decode, mixed lora, norms ...")
    parser.add_argument("--out", help="write the results to this JSON file, and go on from it")
    args = parser.parse_args()
    if args.what == "kernels":
        rows = kernels(args)
        print(table(rows))
        save(args.out, "compile_tpu kernels", rows)
        return
    if args.what == "programs":
        rows = programs(args)
        print(table(rows))
    else:
        records = [json.loads(Path(file).read_text()) for file in args.files]
        rows = [row for record in records for row in record["results"]]
    print(table(summary(rows)))


if __name__ == "__main__":
    main()
