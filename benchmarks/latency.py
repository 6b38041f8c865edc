"""Time per output token: over batches and adapters, and over sampling parameters."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.engines import dummy_engine, lora_requests, memory
from benchmarks.workloads import DECODE_GRID, SAMPLING, Decode, mix
from jaxlora import LLM, SamplingParams


class PerToken(NamedTuple):
    """Milliseconds from each token of a request to the next."""

    time: float
    host: float
    """For which the thread that steps was on a processor: what is more than the device takes, or
    hardly less, the device waits for."""


def decode(args: argparse.Namespace) -> list[dict[str, Any]]:
    """TPOT = (time for ``long`` tokens - time for ``short`` tokens) / (long - short)."""
    rows = []
    for slots in args.slots:
        grid = [w for w in DECODE_GRID if w.slots == slots and w.batch <= args.max_batch]
        if not grid:
            continue
        most, rank = max(w.batch for w in grid), grid[0].rank
        began = time.perf_counter()
        with dummy_engine(args.shape, slots=slots, rank=rank, max_num_seqs=most) as (llm, adapter):
            start_up = time.perf_counter() - began
            for workload in grid:
                found = per_token(llm, workload, adapter)
                row = {"workload": workload.name, "TPOT ms": found.time, "host ms": found.host}
                rows.append(row | {"start-up s": start_up, **memory()})
                print(rows[-1], flush=True)
    return rows


def sampling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time per output token of base requests that all ask for the same."""
    rows = []
    batches = [batch for batch in (1, 16, 128) if batch <= args.max_batch]
    with dummy_engine(args.shape, slots=1, rank=8, max_num_seqs=batches[-1]) as (llm, adapter):
        for batch in batches:
            workload = Decode(slots=1, adapters=0, batch=batch, prompt_len=64)
            for name, options in SAMPLING.items():
                found = per_token(llm, workload, adapter, **options)
                row = {"batch": batch, "sampling": name, "TPOT ms": found.time}
                rows.append(row | {"host ms": found.host})
                print(rows[-1], flush=True)
    return rows


def per_token(
    llm: LLM, workload: Decode, adapter: Path, *, repeats: int = 3, **sampling: Any
) -> PerToken:
    """The medians of ``repeats``; adapters are loaded before."""
    sampling = {"temperature": 0.0} | sampling
    random = np.random.default_rng(0)
    prompts = random.integers(1, 500, (workload.batch, workload.prompt_len)).tolist()
    requests = lora_requests(mix("distinct", workload.batch, workload.adapters), adapter)

    def milliseconds(num_tokens: int) -> np.ndarray:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **sampling)
        began = np.array([time.perf_counter(), time.thread_time()])
        llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        return (np.array([time.perf_counter(), time.thread_time()]) - began) * 1e3

    milliseconds(2)
    tokens = workload.long - workload.short
    times = [
        (milliseconds(workload.long) - milliseconds(workload.short)) / tokens
        for _ in range(repeats)
    ]
    return PerToken(*np.median(times, axis=0).tolist())
