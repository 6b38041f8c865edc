"""Times and takes apart one compiled step of the engine's own, without an engine around it.

    python -m benchmarks.step --slots 8 --rows 1 64 128 --adapters 0 8 --profile
    python -m benchmarks.step --slots 8 --rows --prompts 2048 --adapters 0 8 --profile
    python -m benchmarks.step --slots 64 --rows --prompts 2048 --beside 120 --adapters 0 8 64

A decode step of each number of rows, every row with ``--context`` tokens, and a step of each number
of ``--prompts`` tokens, in prompts of 512 among ``--beside`` rows that decode, with each number of
adapters (0: the program without LoRA): milliseconds over back-to-back steps, what compiling took,
and with ``--profile`` where the device's time goes, by kernel. GPU only.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import save, table
from benchmarks.trace import traced
from benchmarks.workloads import SHAPES
from jaxlora.adapters.bank import AdapterBank
from jaxlora.config import ModelConfig
from jaxlora.engine.batch import ForwardInputs
from jaxlora.engine.lowering import lower
from jaxlora.engine.runner import Runner
from jaxlora.models.cache import make_cache
from jaxlora.models.lora import MODULES, groups
from jaxlora.models.weights import dummy_weights
from jaxlora.parallel import Devices
from kernels_pallas.dispatch import (
    choose_lora_linear,
    choose_lora_matmul,
    choose_paged_attention,
    kind_of,
)
from kernels_pallas.paged_attention.op import PagedBatch

DTYPE = jnp.dtype(jnp.bfloat16)
PAGE_SIZE = 16
PROMPT_LEN = 512


def make_runner(shape: str, *, slots: int, rows: int, context: int, rank: int = 16) -> Runner:
    """A runner with random weights and a random adapter in every slot."""
    config = ModelConfig.from_hf(SHAPES[shape])
    devices = Devices.first(1)
    device = jax.devices()[0]
    kind = kind_of(device)
    kernel, _ = choose_lora_matmul(kind, DTYPE, device_kind=device.device_kind)
    bank = AdapterBank(
        config,
        devices,
        kernel=kernel,
        num_slots=slots,
        max_rank=rank,
        dtype=DTYPE,
        modules=MODULES,
    )
    bank.ranks[:] = rank

    @jax.jit
    def normal(key: jax.Array, like: jax.Array) -> jax.Array:
        return (jax.random.normal(key, like.shape) * 0.01).astype(like.dtype)

    keys = itertools.count()
    bank.arrays = jax.tree.map(lambda array: normal(jax.random.key(next(keys)), array), bank.arrays)
    attention, _ = choose_paged_attention(
        kind,
        DTYPE,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE_SIZE,
        sliding_window=None,
    )
    linear, _ = choose_lora_linear(
        kind,
        DTYPE,
        shapes=[(g.d_in, g.splits, g.gated) for g in groups(config)],
        num_slots=slots,
        rank=rank,
        device_kind=device.device_kind,
    )
    pages_per_row = -(-context // PAGE_SIZE)
    return Runner(
        config,
        dummy_weights(config, DTYPE, devices, 0),
        make_cache(
            config,
            attention,
            devices,
            num_pages=rows * pages_per_row,
            page_size=PAGE_SIZE,
            dtype=DTYPE,
        ),
        devices=devices,
        bank=bank,
        attention=attention,
        linear=linear,
        max_num_seqs=rows,
        max_num_batched_tokens=max(rows, 2048),
        pages_per_row=pages_per_row,
    )


def decode_inputs(rows: int, context: int) -> ForwardInputs:
    """A step in which every row has this much context."""
    return _inputs(np.ones(rows, int), np.full(rows, context), rows, context, max_q_len=1)


def prompt_inputs(
    num_tokens: int, rows: int, context: int, beside: int = 0
) -> tuple[ForwardInputs, np.ndarray]:
    """Prompts of 512 tokens, the last one cut off, among ``beside`` rows that decode; whatever rows
    a step may have more are left empty. With it where each token's row is among the adapters, from
    0 to 1."""
    prompts = np.full(-(-(num_tokens - beside) // PROMPT_LEN), PROMPT_LEN)
    prompts[-1] -= prompts.sum() + beside - num_tokens
    decoding = np.ones(beside, prompts.dtype)
    lens = np.concatenate([prompts, decoding])
    kv_lens = np.concatenate([prompts, decoding * context])
    places = np.concatenate([np.arange(len(part)) / len(part) for part in (prompts, decoding)])
    order = np.argsort(places, kind="stable")
    inputs = _inputs(lens[order], kv_lens[order], rows, context, max_q_len=num_tokens)
    return inputs, np.repeat(places[order], lens[order])


def _inputs(
    lens: np.ndarray, kv_lens: np.ndarray, rows: int, context: int, *, max_q_len: int
) -> ForwardInputs:
    """A step's first rows have so many tokens and so much context, their pages dealt at random."""
    pages_per_row, empty = -(-context // PAGE_SIZE), rows - len(lens)
    random = np.random.default_rng(0)
    pages = random.permutation(rows * pages_per_row).astype(np.int32)
    paged = PagedBatch(
        cu_q_lens=np.pad(np.append(0, np.cumsum(lens)), (0, empty), "edge").astype(np.int32),  # type: ignore[arg-type]
        kv_lens=np.pad(kv_lens, (0, empty)).astype(np.int32),  # type: ignore[arg-type]
        page_table=pages.reshape(rows, -1),  # type: ignore[arg-type]
        num_rows=np.asarray([len(lens)], np.int32),  # type: ignore[arg-type]
        max_q_len=max_q_len,
    )
    return ForwardInputs(
        token_ids=random.integers(1, 500, lens.sum()).astype(np.int32),
        table_rows=np.arange(rows, dtype=np.int32),  # type: ignore[arg-type]
        paged=paged,
    )


class Step:
    """One compiled program and its arguments; what it overwrites is replaced."""

    def __init__(
        self,
        runner: Runner,
        kind: str,
        adapters: int,
        inputs: ForwardInputs,
        places: np.ndarray | None = None,
    ) -> None:
        num_tokens = len(inputs.token_ids)
        program = runner.programs()[f"{kind} {'lora ' * bool(adapters)}{num_tokens}"]
        began = time.perf_counter()
        lowered = lower(program, runner.devices)
        self.lower_seconds = time.perf_counter() - began
        self._program = lowered.compile(dict(program.options))
        self.compile_seconds = time.perf_counter() - began - self.lower_seconds
        weights, self._cache, self._table, *_ = program.arguments
        rest: list[Any] = [inputs]
        if adapters:
            if places is None:
                # Tokens spread evenly over the first slots.
                places = np.arange(num_tokens) / num_tokens
            slots = (places * adapters).astype(np.int32)
            rest += runner.lora_arguments(inputs, slots)
        self._weights, self._rest = weights, jax.device_put(rest)

    def run(self, times: int) -> float:
        """Seconds for so many steps."""
        began = time.perf_counter()
        for _ in range(times):
            tokens, self._table, self._cache, *_ = self._program(
                self._weights, self._cache, self._table, *self._rest
            )
        jax.block_until_ready(tokens)
        return time.perf_counter() - began


def kernels(step: Step, steps: int = 10) -> tuple[float, list[dict[str, Any]]]:
    """Microseconds of a step in which the device is idle, and what each kernel takes of one."""
    with traced() as trace:
        step.run(steps)
    busy, begin = 0.0, trace.kernels[0].start_ns
    end = begin
    counts: collections.Counter[str] = collections.Counter()
    times: dict[str, float] = collections.defaultdict(float)
    for kernel in trace.kernels:
        busy += max(0.0, kernel.start_ns + kernel.duration_ns - max(kernel.start_ns, end))
        end = max(end, kernel.start_ns + kernel.duration_ns)
        counts[kernel.name] += 1
        times[kernel.name] += kernel.duration_ns
    idle = (end - begin - busy) / steps / 1e3
    rows = [
        {"kernel": name, "calls": counts[name] / steps, "us a step": total / steps / 1e3}
        for name, total in sorted(times.items(), key=lambda item: -item[1])
    ]
    return idle, rows


def main() -> None:
    """Prints a table, kernel by kernel if asked for, and writes JSON where ``--out`` says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 64, 128])
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="tokens of a step")
    parser.add_argument(
        "--beside", type=int, default=0, help="rows that decode in each of these steps"
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--context", type=int, default=609)
    parser.add_argument("--profile", action="store_true", help="time by kernel")
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    context = max(args.context, PROMPT_LEN) if args.prompts else args.context
    runner = make_runner(
        args.shape,
        slots=args.slots,
        rows=max([*args.rows, 64, args.beside + -(-max([0, *args.prompts]) // PROMPT_LEN)]),
        context=context,
    )
    if not set(args.rows) <= set(runner.row_buckets):
        parser.error(f"--rows {args.rows}: steps are compiled for {runner.row_buckets} rows")
    if not set(args.prompts) <= set(runner.token_buckets):
        parser.error(f"--prompts {args.prompts}: steps have {runner.token_buckets} tokens")
    if not args.beside and any(tokens % PROMPT_LEN for tokens in args.prompts):
        parser.error(f"--prompts {args.prompts}: give multiples of a prompt's {PROMPT_LEN} tokens")
    steps: list[tuple[str, ForwardInputs, np.ndarray | None]] = []
    steps += [("decode", decode_inputs(rows, context), None) for rows in args.rows]
    for tokens in args.prompts:
        inputs, ends = prompt_inputs(tokens, runner.row_buckets[-1], context, args.beside)
        steps.append(("mixed", inputs, ends if args.beside else None))
    results = []
    for kind, inputs, places in steps:
        for adapters in args.adapters:
            step = Step(runner, kind, adapters, inputs, places)
            step.run(3)
            times = [step.run(30) / 30 * 1e3 for _ in range(3)]
            result: dict[str, Any] = {
                "step": kind,
                "tokens": len(inputs.token_ids),
                "beside": args.beside if kind == "mixed" else 0,
                "adapters": adapters,
                "ms": min(times),
                "slowest": max(times),
                "lower s": step.lower_seconds,
                "compile s": step.compile_seconds,
            }
            print(result, flush=True)
            if args.profile:
                result["idle us"], result["kernels"] = kernels(step)
                print(f"idle {result['idle us']:.0f} us")
                print(table(result["kernels"][:12]), flush=True)
            results.append(result)
            # The next program takes over what this one was given.
            runner._cache, runner._table = step._cache, step._table
    save(args.out, "step", results)


if __name__ == "__main__":
    main()
