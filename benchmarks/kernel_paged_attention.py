"""Times implementations of paged attention: microseconds a call, percent of the floor.

    python -m benchmarks.kernel_paged_attention --implementations gpu cudnn

One program chains the layers of a model, each with its own pool, so that no page is found in a
cache; a layer's output is the next one's query. The floor of a decode step is the bytes of keys
and values over ``--bandwidth``, that of a chunk its multiplications over ``--flops``, whichever
is larger. "cudnn" is a yardstick for prompts alone: it reads no pages and writes none.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import save, table
from benchmarks.timing import microseconds
from kernels_pallas.paged_attention.op import PagedBatch

PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """A model's attention."""

    query: int
    key: int
    size: int


MODELS = {
    "llama-8b": Heads(query=32, key=8, size=128),
    "smollm2-135m": Heads(query=9, key=3, size=64),
}

Rows = tuple[tuple[int, int], ...]
"""(new tokens, context including them) of each row."""

STEPS: dict[str, Rows] = {
    **{f"decode-{rows}": ((1, 609),) * rows for rows in (1, 4, 8, 16, 32, 64, 128, 256)},
    "decode-1-long": ((1, 8192),),
    "decode-64-skewed": ((1, 8192), (1, 4096)) + ((1, 353),) * 62,
    "decode-64-one-long": ((1, 32768),) + ((1, 609),) * 63,
    "decode-128-one-long": ((1, 32768),) + ((1, 609),) * 127,
    "decode-64-uniform": tuple((1, 100 + 16 * i) for i in range(64)),
    "chunks-4x512": ((512, 512),) * 4,
    "chunk-2048": ((2048, 2048),),
    "chunk-64-of-8192": ((64, 8192),),
    "chunk-2048-of-8192": ((2048, 8192),),
    "mixed-63+1985": ((1, 609),) * 63 + ((1985, 1985),),
}


def floor_seconds(heads: Heads, rows: Rows, bandwidth: float, flops: float) -> float:
    """Least time for the step: bytes of the contexts once, or multiplications that are seen."""
    num_bytes = sum(context for _, context in rows) * 2 * heads.key * heads.size * 2
    pairs = sum(count * context - count * (count - 1) // 2 for count, context in rows)
    return max(num_bytes / bandwidth, 4 * pairs * heads.query * heads.size / flops)


def make_batch(rows: Rows) -> tuple[PagedBatch, int]:
    """The step's description, pages dealt at random, and the size of the pool."""
    pages_of_row = [-(-context // PAGE_SIZE) for _, context in rows]
    num_pages = sum(pages_of_row)
    free = np.random.default_rng(0).permutation(num_pages)
    page_table = np.zeros((len(rows), max(pages_of_row)), np.int32)
    for row, (count, end) in enumerate(zip(pages_of_row, np.cumsum(pages_of_row), strict=True)):
        page_table[row, :count] = free[end - count : end]
    counts = [count for count, _ in rows]
    batch = PagedBatch(
        cu_q_lens=np.cumsum([0, *counts]).astype(np.int32),  # type: ignore[arg-type]
        kv_lens=np.array([context for _, context in rows], np.int32),  # type: ignore[arg-type]
        page_table=page_table,  # type: ignore[arg-type]
        num_rows=np.array([len(rows)], np.int32),  # type: ignore[arg-type]
        max_q_len=max(counts),
    )
    return jax.device_put(batch), num_pages


def cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, batch: PagedBatch, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """cuDNN's causal attention over prompts of equal length, as if they were the whole context."""
    num_rows = batch.kv_lens.shape[0]
    q_rows, k_rows, v_rows = (x.reshape(num_rows, -1, *x.shape[1:]) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q_rows, k_rows, v_rows, scale=scale, is_causal=True, implementation="cudnn"
    )
    return out.reshape(q.shape), pages


class Subject(NamedTuple):
    """What is timed."""

    function: Callable[..., Any]
    share: Callable[..., Any] | None = None
    """As an implementation of the op has it."""


def subject(name: str) -> Subject:
    """A module of kernels_pallas.paged_attention, "cudnn", or "MODULE.write": the writing alone."""
    if name == "cudnn":
        return Subject(cudnn)
    name, _, part = name.partition(".")
    module = importlib.import_module(f"kernels_pallas.paged_attention.{name}")
    if not part:
        return Subject(module.paged_attention, module.IMPLEMENTATION.share)

    def write(q: Any, k: Any, v: Any, pages: Any, batch: PagedBatch, *, scale: float) -> Any:
        return q, module.write_kv(k, v, pages, batch)

    return Subject(write)


def make_arguments(heads: Heads, rows: Rows, layers: int) -> list[Any]:
    """Random (q, k, v, pools, batch) of a step."""
    batch, num_pages = make_batch(rows)
    num_tokens = sum(count for count, _ in rows)

    @functools.partial(jax.jit, static_argnums=0)
    def normal(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16)

    keys = iter(jax.random.split(jax.random.key(0), layers + 3))
    q = normal((num_tokens, heads.query, heads.size), next(keys))
    k, v = (normal((num_tokens, heads.key, heads.size), next(keys)) for _ in range(2))
    pool = (num_pages, PAGE_SIZE, 2 * heads.key, heads.size)
    return [q, k, v, [normal(pool, next(keys)) for _ in range(layers)], batch]


def compile_step(subject: Subject, heads: Heads, arguments: list[Any]) -> Any:
    """(q, k, v, pools, batch) -> (q, pools) over all layers, compiled."""
    one = jax.jit(functools.partial(subject.function, scale=heads.size**-0.5))

    @functools.partial(jax.jit, donate_argnums=(0, 3))
    def step(q: Any, k: Any, v: Any, pools: list[Any], batch: PagedBatch) -> Any:
        if subject.share is not None:
            sizes = {"num_heads": heads.query, "num_kv_heads": heads.key}
            shared, q = subject.share(batch, q, **sizes)
            batch = dataclasses.replace(batch, shared=shared)
        written = []
        for pages in pools:
            q, after = one(q, k, v, pages, batch)
            written.append(after)
        return q, written

    return step.lower(*arguments).compile()


def measure(program: Any, arguments: list[Any], *, repeats: int, seconds: float) -> list[float]:
    """Microseconds a layer, ``repeats`` times, each over about ``seconds`` of steps. What a step
    overwrites is replaced in ``arguments``."""

    def step() -> jax.Array:
        arguments[0], arguments[3] = program(*arguments)
        return arguments[0]

    return microseconds(step, calls=len(arguments[3]), repeats=repeats, seconds=seconds)


Case = tuple[str, str, str, Subject]
"""Model, step, name of the implementation, and the implementation."""


def run(
    cases: list[Case],
    *,
    layers: int,
    repeats: int,
    seconds: float,
    bandwidth: float,
    flops: float,
) -> list[dict[str, Any]]:
    """One record for each case; programs are compiled side by side, then timed one by one."""
    steps = {
        (model, step): make_arguments(MODELS[model], STEPS[step], layers)
        for model, step, _, _ in cases
    }
    with ThreadPoolExecutor(8) as pool:
        programs = pool.map(
            lambda case: compile_step(case[3], MODELS[case[0]], steps[case[:2]]), cases
        )
        compiled = list(programs)
    results = []
    for (model, step, name, _), program in zip(cases, compiled, strict=True):
        raw = measure(program, steps[model, step], repeats=repeats, seconds=seconds)
        time_us = statistics.median(raw)
        floor = 1e6 * floor_seconds(MODELS[model], STEPS[step], bandwidth, flops)
        results.append(
            {
                "model": model,
                "step": step,
                "implementation": name,
                "microseconds": time_us,
                "least": min(raw),
                "most": max(raw),
                "floor": floor,
                "times the floor": time_us / floor,
            }
        )
    return results


def main() -> None:
    """Prints a table, and writes it where ``--output`` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", nargs="+", default=["gpu"])
    parser.add_argument("--models", nargs="+", default=["llama-8b"], choices=MODELS)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.02, help="of each repeat")
    parser.add_argument("--bandwidth", type=float, default=4.46e12, help="bytes a second read")
    parser.add_argument("--flops", type=float, default=790e12, help="bfloat16, a second")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    cases = [
        (model, step, name, subject(name))
        for model in arguments.models
        for step in arguments.steps
        for name in arguments.implementations
        if name != "cudnn" or all(count == context for count, context in STEPS[step])
    ]
    results = run(
        cases,
        layers=arguments.layers,
        repeats=arguments.repeats,
        seconds=arguments.seconds,
        bandwidth=arguments.bandwidth,
        flops=arguments.flops,
    )
    print(table(results))
    save(arguments.output, "kernel_paged_attention", results)


if __name__ == "__main__":
    main()
