"""Times implementations of the LoRA op: microseconds a call and percent of the memory floor.

    python -m benchmarks.kernel_lora_matmul --implementations gpu dense --out result.json

One program chains many calls, each with another bank and other slots, so that no adapter is found
in a cache; y is updated in place and x read again, as in a model's step. Nothing is subtracted
from the time. The floor is the bytes that must move (the active adapters' A and B up to their
ranks, x once, y in and out) over ``--bandwidth``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.record import save
from benchmarks.timing import normal, repeated
from kernels_pallas.lora_matmul.op import Implementation, LoraBatch, plan

Group = tuple[int, tuple[int, ...]]
"""d_in and the output widths of the members."""

MODELS: dict[str, dict[str, Group]] = {
    "llama-8b": {
        "qkv": (4096, (4096, 1024, 1024)),
        "o": (4096, (4096,)),
        "gate_up": (4096, (14336, 14336)),
        "down": (14336, (4096,)),
    },
    "smollm2-135m": {
        "qkv": (576, (576, 192, 192)),
        "o": (576, (576,)),
        "gate_up": (576, (1536, 1536)),
        "down": (1536, (576,)),
    },
}


@dataclasses.dataclass(frozen=True)
class Mix:
    """A step: so many tokens, spread evenly over ``active`` of ``slots`` adapters of one rank."""

    tokens: int
    slots: int
    active: int
    rank: int = 16


MIXES: dict[str, Mix] = {
    "decode-1": Mix(1, 8, 1),
    "decode-16": Mix(16, 8, 8),
    "decode-64": Mix(64, 8, 8),
    "decode-128": Mix(128, 8, 8),
    "decode-64-of-64": Mix(64, 64, 8),
    "decode-64-distinct": Mix(64, 64, 64),
    "decode-128-distinct": Mix(128, 64, 64),
    "decode-256-identical": Mix(256, 8, 1),
    "decode-64-rank64": Mix(64, 8, 8, 64),
    "prefill-2048": Mix(2048, 8, 8),
    "prefill-2048-identical": Mix(2048, 8, 1),
    "prefill-8192": Mix(8192, 8, 8),
}

ROTATED_BYTES = 160_000_000
"""Adapters read before one is read again: several times the L2 of any GPU served."""


def implementation(name: str) -> Implementation:
    """A module of kernels_pallas.lora_matmul."""
    return importlib.import_module(f"kernels_pallas.lora_matmul.{name}").IMPLEMENTATION


def floor_bytes(group: Group, mix: Mix, itemsize: int = 2) -> int:
    """Fewest bytes one call can move."""
    d_in, splits = group
    adapter = mix.rank * (len(splits) * d_in + sum(splits))
    step = mix.tokens * (d_in + 2 * sum(splits))
    return (mix.active * adapter + step) * itemsize


def batches(chosen: Implementation, mix: Mix) -> list[LoraBatch]:
    """Steps of the same mix that name disjoint slots, on the device."""
    ranks = np.full(mix.slots, mix.rank, np.int32)
    steps = []
    for first in range(0, mix.slots - mix.active + 1, mix.active):
        token_slots = np.sort(np.arange(mix.tokens) % mix.active + first).astype(np.int32)
        steps.append(
            plan(
                token_slots,
                ranks,
                block_tokens=chosen.block_tokens(mix.tokens),
                aligned=chosen.aligned,
            )
        )
    return [jax.device_put(step) for step in steps]


def measure(
    function: Callable[..., jax.Array],
    chosen: Implementation,
    group: Group,
    mix: Mix,
    *,
    repeats: int,
    seconds: float,
) -> list[float]:
    """Microseconds a call, ``repeats`` times, each over about ``seconds`` of back-to-back calls."""
    d_in, splits = group
    d_out, members = sum(splits), len(splits)
    steps = batches(chosen, mix)
    bank_bytes = 2 * mix.slots * mix.rank * (members * d_in + d_out)
    # No call repeats another's bank and slots: XLA would compute both at once.
    least = 64 if mix.tokens <= 256 else 8
    num_banks = max(-(-ROTATED_BYTES // bank_bytes), -(-least // len(steps)))
    calls = min(256, num_banks * len(steps))

    keys = iter(jax.random.split(jax.random.key(0), 2 * num_banks + 2))
    y = normal((mix.tokens, d_out), 1.0, next(keys))
    x = normal((mix.tokens, d_in), 1.0, next(keys))
    banks = [
        (
            normal((mix.slots, members * mix.rank, d_in), d_in**-0.5, next(keys)),
            normal((mix.slots, mix.rank, d_out), 0.01, next(keys)),
        )
        for _ in range(num_banks)
    ]
    one = jax.jit(functools.partial(function, splits=splits))

    @functools.partial(jax.jit, donate_argnums=0)
    def program(y: jax.Array, x: jax.Array, banks: Any, steps: Any) -> jax.Array:
        for i in range(calls):
            bank = banks[i % num_banks]
            y = one(y, x, *bank, steps[i // num_banks % len(steps)])
        return y

    def step() -> jax.Array:
        nonlocal y
        y = program(y, x, banks, steps)
        return y

    taken = repeated(step, repeats=repeats, seconds=seconds)
    return [time / calls * 1e6 for time in taken]


def results(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each model, group, mix and implementation asked for."""
    for model in arguments.models:
        for group_name, group in MODELS[model].items():
            for mix_name in arguments.mixes:
                mix = MIXES[mix_name]
                floor = floor_bytes(group, mix) / arguments.bandwidth * 1e6
                for name in arguments.implementations:
                    chosen = implementation(name)
                    raw = measure(
                        chosen.function,
                        chosen,
                        group,
                        mix,
                        repeats=arguments.repeats,
                        seconds=arguments.seconds,
                    )
                    time_us = statistics.median(raw)
                    yield {
                        "model": model,
                        "group": group_name,
                        "mix": mix_name,
                        **dataclasses.asdict(mix),
                        "implementation": chosen.name,
                        "microseconds": time_us,
                        "raw_microseconds": raw,
                        "floor_microseconds": floor,
                        "percent_of_floor": 100 * floor / time_us,
                    }


def main() -> None:
    """Prints a line a measurement, and writes all with the raw times where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", nargs="+", default=["gpu", "dense"])
    parser.add_argument("--models", nargs="+", default=["llama-8b"], choices=MODELS)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="of each repeat")
    parser.add_argument(
        "--bandwidth", type=float, default=4.46e12, help="bytes a second that memory can be read at"
    )
    parser.add_argument("--out", help="a JSON file")
    arguments = parser.parse_args()
    records = []
    for record in results(arguments):
        records.append(record)
        raw = record["raw_microseconds"]
        print(
            f"{record['model']:12s} {record['group']:8s} {record['mix']:22s} "
            f"{record['implementation']:10s} {record['microseconds']:8.2f} us "
            f"({min(raw):.2f} .. {max(raw):.2f})  floor {record['floor_microseconds']:7.2f} us  "
            f"{record['percent_of_floor']:5.1f}%",
            flush=True,
        )
    save(arguments.out, "kernel_lora_matmul", records)


if __name__ == "__main__":
    main()
