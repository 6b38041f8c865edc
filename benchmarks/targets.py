"""Decoding and throughput from one engine: the start-up of an 8B model is paid once."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from benchmarks.engines import dummy_engine, lora_requests, memory
from benchmarks.latency import per_token
from benchmarks.workloads import DECODE_GRID, Decode, mix
from jaxlora import SamplingParams


def targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every decode workload and 512 requests offline (256 tokens in, 128 out, at most 128 at once),
    on an engine with as many slots as the largest of ``--slots``."""
    slots = max(args.slots)
    chosen = {
        (w.adapters, w.batch): Decode(slots=slots, adapters=w.adapters, batch=w.batch)
        for w in DECODE_GRID
        if w.adapters <= slots and w.batch <= args.max_batch
    }
    # What adapters there are is loaded step by step: first those without.
    ordered = [chosen[key] for key in sorted(chosen)]
    most = max(w.batch for w in ordered)
    rows: list[dict[str, Any]] = []

    def tell(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)

    began = time.perf_counter()
    with dummy_engine(args.shape, slots=slots, rank=16, max_num_seqs=most) as (llm, adapter):
        tell({"what": "start-up", "value": time.perf_counter() - began, "unit": "s"})
        compiled = llm.get_metrics()["jaxlora:compilations_total"]
        for workload in ordered:
            for _ in range(args.repeats):
                found = per_token(llm, workload, adapter, repeats=1)
                tell({"what": workload.name, "value": found.time, "unit": "ms a token"})
                tell({"what": f"{workload.name}, host", "value": found.host, "unit": "ms a token"})
        prompts = np.random.default_rng(0).integers(1, 500, (args.requests, 256)).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
        for count in sorted({w.adapters for w in ordered if w.adapters != 1}):
            loras = lora_requests(mix("distinct", args.requests, count), adapter)
            for _ in range(args.repeats):
                llm.reset_prefix_cache()
                began = time.perf_counter()
                llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
                value = args.requests * 128 / (time.perf_counter() - began)
                tell({"what": f"offline, A={count}", "value": value, "unit": "tok/s"})
        late = llm.get_metrics()["jaxlora:compilations_total"] - compiled
        tell({"what": "compilations after start-up", "value": late, "unit": ""})
        for name, value in memory().items():
            tell({"what": name, "value": value, "unit": ""})
    return rows
