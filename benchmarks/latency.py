"""Time per output token: over batches and adapters, and over sampling parameters."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines import dummy_engine, lora_requests, memory
from benchmarks.workloads import DECODE_GRID, SAMPLING, Decode, mix
from jaxlora import LLM, SamplingParams


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
                row = {"workload": workload.name, "TPOT ms": tpot(llm, workload, adapter)}
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
                milliseconds = tpot(llm, workload, adapter, **options)
                rows.append({"batch": batch, "sampling": name, "TPOT ms": milliseconds})
                print(rows[-1], flush=True)
    return rows


def tpot(llm: LLM, workload: Decode, adapter: Path, *, repeats: int = 3, **sampling: Any) -> float:
    """Milliseconds a token, the median of ``repeats``; adapters are loaded before."""
    sampling = {"temperature": 0.0} | sampling
    random = np.random.default_rng(0)
    prompts = random.integers(1, 500, (workload.batch, workload.prompt_len)).tolist()
    requests = lora_requests(mix("distinct", workload.batch, workload.adapters), adapter)

    def seconds(num_tokens: int) -> float:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **sampling)
        began = time.perf_counter()
        llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        return time.perf_counter() - began

    seconds(2)
    tokens = workload.long - workload.short
    times = [(seconds(workload.long) - seconds(workload.short)) / tokens for _ in range(repeats)]
    return float(np.median(times)) * 1e3
