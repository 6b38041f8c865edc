"""Times implementations of the LoRA op: microseconds a call and percent of the memory floor.

    python -m benchmarks.kernel_lora_matmul --implementations gpu dense --out result.json
    python -m benchmarks.kernel_lora_matmul --gate --implementations gpu --mixes prefill-2048
    python -m benchmarks.kernel_lora_matmul --tune

One program chains many calls, each with another bank and other slots, so that no adapter is found
in a cache; y is updated in place and x read again, as in a model's step. Nothing is subtracted
from the time. The floor is the bytes that must move (the active adapters' A and B up to their
ranks, x once, y in and out) over ``--bandwidth``. With ``--gate`` it is gate and up with what
follows them, ``silu(gate) * up``: by XLA after the op, and by the op's kernel where it can. With
``--tune`` the Hopper kernel's configurations are tried instead, for steps with prompts, without
a gate and for gate and up with it, and the best written (benchmarks/tuner.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import statistics
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import tuner
from benchmarks.record import save
from benchmarks.timing import QUICKLY, arrays, microseconds, worst
from kernels_pallas.lora_linear.op import ending
from kernels_pallas.lora_matmul import dense, gpu, gpu_config
from kernels_pallas.lora_matmul.gpu_config import Case, Config, block_tokens_of, check_config
from kernels_pallas.lora_matmul.op import Implementation, LoraBatch, max_blocks, max_cover

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
    "prefill-512": Mix(512, 8, 8),
    "prefill-512-of-64": Mix(512, 64, 8),
    "prefill-2048": Mix(2048, 8, 8),
    "prefill-2048-of-64": Mix(2048, 64, 8),
    "prefill-2048-identical": Mix(2048, 8, 1),
    "prefill-8192": Mix(8192, 8, 8),
}

TUNED = ("prefill-2048", "prefill-2048-of-64", "prefill-512", "prefill-512-of-64", "decode-128")
"""In the order in which they are tuned: steps with prompts, the engine's largest first."""

ROTATED_BYTES = 160_000_000
"""Adapters read before one is read again: several times the L2 of any GPU served."""


def implementation(name: str) -> Implementation:
    """A module of kernels_pallas.lora_matmul."""
    return importlib.import_module(f"kernels_pallas.lora_matmul.{name}").IMPLEMENTATION


def floor_bytes(group: Group, mix: Mix, itemsize: int = 2, *, gate: bool = False) -> int:
    """Fewest bytes one call can move."""
    d_in, splits = group
    # What comes out is as wide as what goes in, or half of it.
    y_columns = sum(splits) * 3 // 2 if gate else sum(splits) * 2
    adapter = mix.rank * (len(splits) * d_in + sum(splits))
    step = mix.tokens * (d_in + y_columns)
    return (mix.active * adapter + step) * itemsize


def batches(chosen: Implementation, mix: Mix) -> list[LoraBatch]:
    """Steps of the same mix that name disjoint slots, on the device."""
    ranks = np.full(mix.slots, mix.rank, np.int32)
    steps = []
    for first in range(0, mix.slots - mix.active + 1, mix.active):
        token_slots = np.sort(np.arange(mix.tokens) % mix.active + first).astype(np.int32)
        steps.append(chosen.plan(token_slots, ranks))
    return [jax.device_put(step) for step in steps]


class Problem:
    """Arrays for one group and mix, and the programs that are timed on them."""

    def __init__(self, chosen: Implementation, group: Group, mix: Mix) -> None:
        d_in, self.splits = group
        d_out, members = sum(self.splits), len(self.splits)
        self.steps = batches(chosen, mix)
        bank_bytes = 2 * mix.slots * mix.rank * (members * d_in + d_out)
        # No call repeats another's bank and slots: XLA would compute both at once.
        least = 64 if mix.tokens <= 256 else 8
        num_banks = max(-(-ROTATED_BYTES // bank_bytes), -(-least // len(self.steps)))
        num_banks = min(num_banks, 256 // len(self.steps))
        self.calls = num_banks * len(self.steps)
        self.y, self.x = (
            arrays(1, (mix.tokens, d_out), 1.0)[0],
            arrays(1, (mix.tokens, d_in), 1.0)[0],
        )
        a = arrays(num_banks, (mix.slots, members * mix.rank, d_in), d_in**-0.5)
        # Adapters change as much as the weights compute: no mistake is too small to see.
        b = arrays(num_banks, (mix.slots, mix.rank, d_out), mix.rank**-0.5)
        self.banks = list(zip(a, b, strict=True))

    def compile(self, function: Callable[..., jax.Array]) -> Any:
        """:attr:`calls` calls of an implementation, one after the other; its y is donated.

        Raises ValueError if what one call adds is wrong.
        """
        one = jax.jit(functools.partial(function, splits=self.splits))

        @functools.partial(jax.jit, donate_argnums=0)
        def program(y: jax.Array, x: jax.Array, banks: Any, steps: Any) -> jax.Array:
            for i in range(self.calls):
                bank = banks[i % len(banks)]
                y = one(y, x, *bank, steps[i // len(banks) % len(steps)])
            return y

        arguments = self.y, self.x, *self.banks[0], self.steps[0]
        error = worst(one(*arguments), _expected(*arguments, splits=self.splits))
        if error > 1:
            raise ValueError(f"wrong: {error:.3g} times what rounding may add up to")
        return program.lower(self.y, self.x, self.banks, self.steps).compile()

    def compile_gated(self, chosen: Implementation, *, fused: bool, **options: Any) -> Any:
        """As :meth:`compile`, but every call is followed by the gate, by XLA or in the same kernel;
        what the gates yield is returned, too."""
        function = chosen.gated if fused else chosen.function
        assert function is not None
        function = functools.partial(function, splits=self.splits, **options)

        def one(y: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
            if fused:
                return y, function(y, *rest)
            y = function(y, *rest)
            return y, _gated(y)

        @functools.partial(jax.jit, donate_argnums=0)
        def program(y: jax.Array, x: jax.Array, banks: Any, steps: Any) -> Any:
            outs = []
            for i in range(self.calls):
                bank = banks[i % len(banks)]
                y, out = one(y, x, *bank, steps[i // len(banks) % len(steps)])
                # The next call changes y in place: not before it was read here.
                y, out = lax.optimization_barrier((y, out))
                outs.append(out)
            return y, outs

        arguments = self.y, self.x, *self.banks[0], self.steps[0]
        expected = _expected(*arguments, splits=self.splits)
        error = worst(jax.jit(one)(*arguments)[1], _gated(expected))
        if error > 1:
            raise ValueError(f"wrong: {error:.3g} times what rounding may add up to")
        return program.lower(self.y, self.x, self.banks, self.steps).compile()

    def microseconds(self, program: Any, *, repeats: int, seconds: float) -> list[float]:
        """Of a call, ``repeats`` times, each over about ``seconds`` of back-to-back calls."""
        y = jnp.copy(self.y)

        def step() -> Any:
            nonlocal y
            result = program(y, self.x, self.banks, self.steps)
            y, *_ = result if isinstance(result, tuple) else (result,)
            return result

        return microseconds(step, calls=self.calls, repeats=repeats, seconds=seconds)


@functools.partial(jax.jit, static_argnames="splits", compiler_options=QUICKLY)
def _expected(
    y: jax.Array,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    batch: LoraBatch,
    *,
    splits: tuple[int, ...],
) -> jax.Array:
    return dense.lora_matmul(y.astype(jnp.float32), x, a, b, batch, splits=splits)


_gated = jax.jit(functools.partial(ending, gated=True))


class Subject:
    """The Hopper kernel in one group and mix, with a gate or without, for the tuner."""

    def __init__(
        self, group: Group, mix: Mix, *, repeats: int, seconds: float, gate: bool = False
    ) -> None:
        self.kernel = gpu_config.KERNELS[gate]
        self._gate = gate
        block_tokens = block_tokens_of(mix.tokens)
        most = max_cover if gate else max_blocks
        self.case = Case(
            d_in=group[0],
            splits=group[1],
            rank=mix.rank,
            block_tokens=block_tokens,
            blocks=most(mix.tokens, mix.slots, block_tokens),
        )
        self._group, self._mix = group, mix
        self._repeats, self._seconds = repeats, seconds
        self._lock = threading.Lock()

    def first(self) -> Config:
        """The heuristic's choice."""
        return gpu_config.heuristic(**vars(self.case), gated=self._gate)

    def neighbours(self, config: Config) -> list[Config]:
        """What to try next."""
        return gpu_config.neighbours(config, self.case, gated=self._gate)

    @functools.cached_property
    def _problem(self) -> Problem:
        return Problem(gpu.IMPLEMENTATION, self._group, self._mix)

    def prepare(self, config: Config) -> Callable[[], tuner.Times]:
        """Compiles and compares; what is returned takes the times."""
        check_config(config, self.case, gated=self._gate)
        with self._lock:  # not every thread makes the arrays
            problem = self._problem
        if self._gate:
            program = problem.compile_gated(gpu.IMPLEMENTATION, fused=True, config=config)
        else:
            program = problem.compile(functools.partial(gpu.lora_matmul, config=config))

        def times() -> tuner.Times:
            label = f"{self._mix.active} of {self._mix.slots}"
            taken = problem.microseconds(program, repeats=self._repeats, seconds=self._seconds)
            return {label: taken}

        return times


def results(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each model, group, mix and implementation asked for."""
    for model in arguments.models:
        for group_name, group in MODELS[model].items():
            if arguments.gate and group_name != "gate_up":
                continue
            for mix_name in arguments.mixes:
                mix = MIXES[mix_name]
                floor = floor_bytes(group, mix, gate=arguments.gate) / arguments.bandwidth * 1e6
                for name in arguments.implementations:
                    chosen = implementation(name)
                    problem = Problem(chosen, group, mix)
                    for variant, compiled in _variants(problem, chosen, gate=arguments.gate):
                        raw = problem.microseconds(
                            compiled(), repeats=arguments.repeats, seconds=arguments.seconds
                        )
                        time_us = statistics.median(raw)
                        yield {
                            "model": model,
                            "group": group_name,
                            "mix": mix_name,
                            **dataclasses.asdict(mix),
                            "implementation": variant,
                            "microseconds": time_us,
                            "raw_microseconds": raw,
                            "floor_microseconds": floor,
                            "percent_of_floor": 100 * floor / time_us,
                        }


def _variants(
    problem: Problem, chosen: Implementation, *, gate: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed of an implementation: its name, and what compiles it."""
    if not gate:
        yield chosen.name, functools.partial(problem.compile, chosen.function)
        return
    compiled = functools.partial(problem.compile_gated, chosen)
    yield f"{chosen.name}, XLA's gate", functools.partial(compiled, fused=False)
    if chosen.gated is not None:
        yield f"{chosen.name} with gate", functools.partial(compiled, fused=True)


def main() -> None:
    """Prints a line a measurement, and writes all with the raw times where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", nargs="+", default=["gpu", "dense"])
    parser.add_argument("--models", nargs="+", default=["llama-8b"], choices=MODELS)
    parser.add_argument(
        "--mixes", nargs="+", choices=MIXES, help=f"all, or to tune {', '.join(TUNED)}"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="of each repeat")
    parser.add_argument(
        "--bandwidth", type=float, default=4.46e12, help="bytes a second that memory can be read at"
    )
    parser.add_argument("--gate", action="store_true", help="gate and up, gated")
    tuner.add_arguments(parser)
    parser.add_argument("--out", help="a JSON file")
    arguments = parser.parse_args()
    if arguments.tune:
        batches_of_cases = [
            [
                Subject(
                    group,
                    MIXES[mix],
                    repeats=arguments.repeats,
                    seconds=arguments.seconds,
                    gate=gate,
                )
                for gate in ((True,) if arguments.gate else (False, True))
                for model in arguments.models
                for name, group in MODELS[model].items()
                if name == "gate_up" or not gate
            ]
            for mix in arguments.mixes or TUNED
        ]
        tuner.tune(batches_of_cases, arguments)
        return
    arguments.mixes = arguments.mixes or list(MIXES)
    records = []
    for record in results(arguments):
        records.append(record)
        raw = record["raw_microseconds"]
        print(
            f"{record['model']:12s} {record['group']:8s} {record['mix']:22s} "
            f"{record['implementation']:22s} {record['microseconds']:8.2f} us "
            f"({min(raw):.2f} .. {max(raw):.2f})  floor {record['floor_microseconds']:7.2f} us  "
            f"{record['percent_of_floor']:5.1f}%",
            flush=True,
        )
    save(arguments.out, "kernel_lora_matmul", records)


if __name__ == "__main__":
    main()
