"""Times a step's linears with their adapters: one kernel, and XLA's way.

    python -m benchmarks.kernel_lora_linear --tokens 8 64 --out result.json
    python -m benchmarks.kernel_lora_linear --tokens 2048 --slots 0 8 --seconds 0.05
    python -m benchmarks.kernel_lora_linear --tune

Microseconds a call and percent of the memory floor, for the four linears of a layer with what
follows them (o and down: the residual is added, gate_up: the gate is applied). *fused* is the
kernel, *xla* what runs where there is none: product, LoRA kernel, residual or gate.

One program chains many calls over more weights than a cache holds. Nothing is subtracted from the
time. The floor is the bytes that must move (weights, the active adapters, x, the residual, y) over
the memory's bandwidth; the rate is that of the base product. With ``--tune`` the configurations of
the decode kernel are tried instead, and the best written to ``kernels_pallas/tuned`` or ``--out``
(benchmarks/tuner.py). NVIDIA Hopper only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import tuner
from benchmarks.kernel_lora_matmul import MODELS
from benchmarks.record import save
from benchmarks.timing import QUICKLY, arrays, microseconds, worst
from jaxlora.models.layers import matmul
from kernels_pallas.lora_linear import gpu, gpu_config
from kernels_pallas.lora_linear.gpu_config import SIZES, Case, Config, check_config
from kernels_pallas.lora_linear.op import ending
from kernels_pallas.lora_matmul import dense
from kernels_pallas.lora_matmul import gpu as gpu_lora_matmul
from kernels_pallas.lora_matmul.gpu_config import block_tokens_of
from kernels_pallas.lora_matmul.op import LoraBatch, max_blocks

MIXES = ((0, 0), (8, 1), (8, 8), (64, 8), (64, 64))
"""Slots of the bank and adapters active, whose turn it is token by token."""
TUNED = (
    *((64, 8), (64, 0), (8, 8), (8, 0), (16, 8), (16, 0), (128, 8), (128, 0), (64, 64)),
    *((128, 64), (32, 8), (32, 0), (16, 64), (8, 64), (32, 64), (1, 8)),
)
"""Tokens and slots, in the order in which they are tuned: the most served first. A step of one
token is the same in a bank of any size, and without adapters XLA's."""
BANDWIDTHS = {"NVIDIA H100 80GB HBM3": 3.06e12, "NVIDIA H200": 4.46e12}
"""Bytes a second that a card's memory was measured to be read at."""
CALLS = 24
"""Of a program: long enough that dispatching one is hidden behind the one before."""
ROTATED_BYTES = 320_000_000
"""Weights read before one is read again, but for small models: several times any GPU's L2."""
OPTIONS: dict[str, str | bool] = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
"""To the device the calls of a program without adapters do not depend on one another."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A linear in steps of so many tokens, with a bank of so many slots (0: without one)."""

    model: str
    linear: str
    tokens: int
    slots: int
    rank: int = 16

    @property
    def case(self) -> Case:
        """What the kernel's configuration is chosen for."""
        d_in, splits = MODELS[self.model][self.linear]
        block_tokens = block_tokens_of(self.tokens) if self.slots else 0
        return Case(
            tokens=self.tokens,
            d_in=d_in,
            splits=splits,
            gated=self.linear == "gate_up",
            rank=self.rank if self.slots else 0,
            blocks=max_blocks(self.tokens, self.slots, block_tokens) if self.slots else 0,
            block_tokens=block_tokens,
        )

    @property
    def has_residual(self) -> bool:
        """Whether one is added."""
        return self.linear in ("o", "down")

    def actives(self) -> list[int]:
        """Numbers of adapters that are active in a step."""
        actives = [n for slots, n in MIXES if slots == self.slots and n <= self.tokens]
        return actives or [self.tokens]

    def floor_bytes(self, active: int, itemsize: int = 2) -> int:
        """Fewest bytes one call can move."""
        case = self.case
        d_out = sum(case.splits)
        columns = d_out // (2 if case.gated else 1) * (2 if self.has_residual else 1)
        adapters = active * case.rank * (len(case.splits) * case.d_in + d_out)
        return (case.d_in * d_out + adapters + case.tokens * (case.d_in + columns)) * itemsize

    @property
    def flops(self) -> int:
        """Floating-point operations of the base product."""
        return 2 * self.tokens * self.case.d_in * sum(self.case.splits)

    def arguments(self, active: int) -> list[Any]:
        """Of a program: xs, residual, weights, banks and batch; those of other mixes share arrays.

        Adapters change what is computed as much as the weights do: no mistake is too small to see.
        """
        case = self.case
        shape = sum(case.splits), case.d_in
        num_weights = min(CALLS, max(2, math.ceil(ROTATED_BYTES / (2 * math.prod(shape)))))
        weights = arrays(num_weights, shape, case.d_in**-0.5)
        xs = arrays(-(-CALLS // num_weights), (case.tokens, case.d_in), 1.0)
        residual = arrays(1, (case.tokens, shape[0]), 1.0)[0] if self.has_residual else None
        banks: Any = [(None, None)]
        batch = None
        if self.slots:
            a_shape = self.slots, len(case.splits) * case.rank, case.d_in
            b_shape = self.slots, case.rank, shape[0]
            a = arrays(num_weights, a_shape, case.d_in**-0.5)
            banks = list(zip(a, arrays(num_weights, b_shape, case.rank**-0.5), strict=True))
            batch = _batch(case.tokens, self.slots, active, case.rank)
        return [xs, residual, weights, banks, batch]

    def program(self, function: Callable[..., jax.Array]) -> Any:
        """:data:`CALLS` calls of an implementation, compiled, that return all their results."""
        case = self.case
        one = jax.jit(functools.partial(function, splits=case.splits, gated=case.gated))

        def program(
            xs: list[jax.Array], residual: Any, weights: list[jax.Array], banks: Any, batch: Any
        ) -> list[jax.Array]:
            ys: list[jax.Array] = []
            shared = None if batch is None else gpu.share(batch)
            for i in range(CALLS):
                x, weight = xs[i // len(weights)], weights[i % len(weights)]
                a, b = banks[i % len(banks)]
                if ys:
                    # One after the other, as in a model: XLA merges products that share their x.
                    x, _ = lax.optimization_barrier((x, ys[-1]))
                adapters = {"a": a, "b": b, "batch": batch, "shared": shared}
                ys.append(one(x, weight, residual=residual, **adapters))
                # As in a model's step, where there is one.
                residual = None if residual is None else ys[-1]
            return ys

        arguments = self.arguments(max(self.actives()))
        return jax.jit(program).lower(*arguments).compile(compiler_options=OPTIONS)

    def check(self, program: Any) -> None:
        """Raises ValueError if a program's first or last result is not right, in any mix."""
        case = self.case
        for active in self.actives():
            arguments = self.arguments(active)
            xs, residual, weights, banks, batch = arguments
            ys = program(*arguments)
            for i in (0, CALLS - 1):
                error = _worst(
                    ys[i],
                    xs[i // len(weights)],
                    weights[i % len(weights)],
                    ys[i - 1] if i and residual is not None else residual,
                    *banks[i % len(banks)],
                    batch,
                    splits=case.splits,
                    gated=case.gated,
                )
                if error > 1:
                    raise ValueError(f"wrong with {active} active, call {i}: {error:.3g} times")

    def microseconds(
        self, program: Any, active: int, *, repeats: int, seconds: float
    ) -> list[float]:
        """Of a call, as often as asked for."""
        step = functools.partial(program, *self.arguments(active))
        return microseconds(step, calls=CALLS, repeats=repeats, seconds=seconds)


@functools.cache
def _batch(tokens: int, slots: int, active: int, rank: int) -> LoraBatch:
    token_slots = np.sort(np.arange(tokens) % active * (slots // active)).astype(np.int32)
    ranks = np.full(slots, rank, np.int32)
    return jax.device_put(gpu_lora_matmul.IMPLEMENTATION.plan(token_slots, ranks))


def in_parts(
    x: jax.Array,
    weight: jax.Array,
    *,
    splits: tuple[int, ...],
    a: jax.Array | None,
    b: jax.Array | None,
    batch: LoraBatch | None,
    residual: jax.Array | None,
    gated: bool,
    shared: Any = None,
) -> jax.Array:
    """What the model does where there is no kernel for all of it."""
    y = matmul(x, weight)
    if a is not None:
        assert b is not None
        assert batch is not None
        if gated and x.shape[0] > SIZES[-1]:
            return gpu_lora_matmul.gated_lora_matmul(y, x, a, b, batch, splits=splits)
        y = gpu_lora_matmul.lora_matmul(y, x, a, b, batch, splits=splits)
    return ending(y, residual, gated=gated)


@functools.partial(jax.jit, static_argnames=("splits", "gated"), compiler_options=QUICKLY)
def _worst(
    y: jax.Array,
    x: jax.Array,
    weight: jax.Array,
    residual: jax.Array | None,
    a: jax.Array | None,
    b: jax.Array | None,
    batch: LoraBatch | None,
    *,
    splits: tuple[int, ...],
    gated: bool,
) -> jax.Array:
    """The error of a result (:func:`benchmarks.timing.worst`)."""
    expected = matmul(x, weight, jnp.dtype(jnp.float32))
    if a is not None and b is not None and batch is not None:
        expected = dense.lora_matmul(expected, x, a, b, batch, splits=splits)
    expected = ending(expected, residual, gated=gated)
    return worst(y, expected)


@dataclasses.dataclass(frozen=True)
class Subject:
    """The kernel in one workload, for the tuner."""

    workload: Workload
    repeats: int
    seconds: float
    kernel: str = "lora_linear"
    _checking: threading.Lock = dataclasses.field(default_factory=threading.Lock, compare=False)
    """So that not every thread compiles the comparison."""

    @property
    def case(self) -> Case:
        """The workload's."""
        return self.workload.case

    def first(self) -> Config:
        """The heuristic's choice."""
        return gpu_config.heuristic(**vars(self.case))

    def neighbours(self, config: Config) -> list[Config]:
        """What to try next."""
        return gpu_config.neighbours(config, self.case)

    def prepare(self, config: Config) -> Callable[[], tuner.Times]:
        """Compiles and compares; what is returned takes the times."""
        check_config(config, self.case)
        workload = self.workload
        program = workload.program(functools.partial(gpu.lora_linear, config=config))
        arguments = workload.arguments(max(workload.actives()))
        with tuner.must_end(f"{config} in {workload}"):
            jax.block_until_ready(program(*arguments))
        with self._checking:
            workload.check(program)

        def times() -> tuner.Times:
            return {
                f"{active} of {workload.slots}": workload.microseconds(
                    program, active, repeats=self.repeats, seconds=self.seconds
                )
                for active in workload.actives()
            }

        return times


def _workloads(arguments: argparse.Namespace, steps: Iterable[tuple[int, int]]) -> list[Workload]:
    return [
        Workload(arguments.model, linear, tokens, slots, arguments.rank)
        for tokens, slots in steps
        for linear in MODELS[arguments.model]
    ]


def _make_arrays(workloads: list[Workload]) -> None:
    """Once, before threads ask for them."""
    for workload in workloads:
        for active in workload.actives():
            workload.arguments(active)


def results(arguments: argparse.Namespace, bandwidth: float) -> Iterator[dict[str, Any]]:
    """One record for each linear, mix and implementation asked for."""
    workloads = _workloads(arguments, itertools.product(arguments.tokens, arguments.slots))
    _make_arrays(workloads)
    functions = {"fused": gpu.lora_linear, "xla": in_parts}
    programs: dict[tuple[str, Workload], Any] = {}
    if "fused" in arguments.implementations:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            fused = pool.map(lambda workload: workload.program(gpu.lora_linear), workloads)
            programs = {("fused", w): p for w, p in zip(workloads, fused, strict=True)}
    for workload, name in itertools.product(workloads, arguments.implementations):
        # XLA's one by one: it chooses its products by timing them.
        program = programs.get((name, workload)) or workload.program(functions[name])
        workload.check(program)
        for active in workload.actives():
            raw = workload.microseconds(
                program, active, repeats=arguments.repeats, seconds=arguments.seconds
            )
            time_us = statistics.median(raw)
            floor = workload.floor_bytes(active) / bandwidth * 1e6
            yield {
                **dataclasses.asdict(workload),
                "active": active,
                "implementation": name,
                "microseconds": time_us,
                "raw_microseconds": raw,
                "floor_microseconds": floor,
                "percent_of_floor": 100 * floor / time_us,
                "teraflops": workload.flops / time_us / 1e6,
            }


def main() -> None:
    """Prints a line a measurement, and writes all with the raw times where ``--out`` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="llama-8b", choices=MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--slots", type=int, nargs="+", default=[0, 8, 64], choices=(0, 8, 64))
    parser.add_argument("--rank", type=int, default=16, help="of the bank and its adapters")
    parser.add_argument(
        "--implementations", nargs="+", default=["fused", "xla"], choices=("fused", "xla")
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.008, help="of each repeat")
    parser.add_argument(
        "--bandwidth", type=float, help="bytes a second of the memory, if it is not a known card's"
    )
    tuner.add_arguments(parser)
    parser.add_argument("--out", help="a JSON file")
    arguments = parser.parse_args()
    if arguments.tune:
        batches = [
            [
                Subject(workload, arguments.repeats, arguments.seconds)
                for workload in _workloads(arguments, [step])
            ]
            for step in TUNED
            if step[0] in arguments.tokens and step[1] in arguments.slots
        ]
        _make_arrays([subject.workload for batch in batches for subject in batch])
        tuner.tune(batches, arguments)
        return
    device_kind = jax.devices()[0].device_kind
    bandwidth = arguments.bandwidth or BANDWIDTHS.get(device_kind)
    if bandwidth is None:
        parser.error(f'the bandwidth of "{device_kind}" is not known: give it as --bandwidth')
    records = []
    for record in results(arguments, bandwidth):
        records.append(record)
        raw = record["raw_microseconds"]
        print(
            f"{record['linear']:8s} {record['tokens']:4d} tokens, {record['active']:2d} of "
            f"{record['slots']:2d} {record['implementation']:6s} {record['microseconds']:8.2f} us "
            f"({min(raw):.2f} .. {max(raw):.2f})  floor {record['floor_microseconds']:7.2f} us  "
            f"{record['percent_of_floor']:5.1f}%  {record['teraflops']:4.0f} TFLOP/s",
            flush=True,
        )
    save(arguments.out, "kernel_lora_linear", records)


if __name__ == "__main__":
    main()
