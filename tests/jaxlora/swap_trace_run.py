"""Loads of adapters under JAX's profiler, in a process of its own.

    python -m tests.jaxlora.swap_trace_run '{"base": "", "adapters": {"name": "path"}}'

prints for each what was brought to the device and what was dispatched, as JSON; under "" the same
of what this does itself. (The profiler ends a process in which anything was compiled for a TPU.)
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax

from benchmarks.trace import Trace, traced
from jaxlora import LLM, LoRARequest


def trace_of_a_load(llm: LLM, name: str, path: str) -> Trace:
    """From the folder into a slot; a pin brings it there without a request that would run."""
    with traced() as trace:
        llm.add_lora(LoRARequest(name, 1, path))
        llm.pin_lora(1, wait=True)
        jax.block_until_ready(jax.live_arrays())
    llm.remove_lora(1)
    return trace


def trace_of_ours() -> Trace:
    """Two transfers and three dispatches."""
    double = jax.jit(lambda x: 2 * x)
    double(3.0)
    with traced() as trace:
        double(jax.device_put(2.0)).block_until_ready()
        double(double(3.0)).block_until_ready()
    return trace


def run(base: str, adapters: dict[str, str]) -> dict[str, Trace]:
    """One engine for all of them."""
    llm = LLM(
        base,
        dtype="float32",
        enable_lora=True,
        max_loras=2,
        max_num_seqs=1,
        max_num_batched_tokens=16,
        num_gpu_blocks_override=16,
        skip_tokenizer_init=True,
        use_tqdm=False,
    )
    return {"": trace_of_ours()} | {
        name: trace_of_a_load(llm, name, path) for name, path in adapters.items()
    }


if __name__ == "__main__":
    asked: dict[str, Any] = json.loads(sys.argv[1])
    traces = run(**asked)
    sys.stdout.write(
        json.dumps(
            {name: (trace.num_transfers, trace.dispatched) for name, trace in traces.items()}
        )
    )
