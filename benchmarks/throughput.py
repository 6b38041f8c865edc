"""Tokens a second: the demo, adapter mixes offline, and beside PEFT."""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np

from benchmarks.engines import dummy_engine, lora_requests, memory
from benchmarks.workloads import mix
from examples.demo_model import ADAPTERS, model_path
from jaxlora import LLM, LoRARequest, SamplingParams

DEMO_PROMPTS = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "How do I boil an egg?",
    "Why do leaves change colour in autumn?",
)


def demo(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The demo's mixed batch: every prompt under the base model and every adapter, twice."""
    started = time.perf_counter()
    adapters = sorted(folder.name for folder in ADAPTERS.iterdir() if folder.is_dir())
    llm = LLM(
        model_path(), enable_lora=True, max_loras=len(adapters), max_model_len=1024, max_num_seqs=16
    )
    start_up = time.perf_counter() - started
    requests = [None, *(LoRARequest(name, None, str(ADAPTERS / name)) for name in adapters)]
    conversations = [[{"role": "user", "content": text}] for text in DEMO_PROMPTS for _ in requests]
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    compiled = llm.get_metrics()["jaxlora:compilations_total"]
    rows = []
    for turn in ("first", "second", "third"):
        began = time.perf_counter()
        outputs = llm.chat(
            conversations, params, lora_request=requests * len(DEMO_PROMPTS), use_tqdm=False
        )
        seconds = time.perf_counter() - began
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rows.append(
            {
                "run": turn,
                "requests": len(outputs),
                "output tok/s": tokens / seconds,
                "start-up s": start_up,
                "compilations": int(llm.get_metrics()["jaxlora:compilations_total"] - compiled),
                **memory(),
            }
        )
    return rows


def offline(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Throughput: 512 requests of 256 tokens in and 128 out, at most 128 at once."""
    rows = []
    num_requests, prompt_len, new = args.requests, 256, 128
    prompts = np.random.default_rng(0).integers(1, 500, (num_requests, prompt_len)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    for slots in args.slots:
        with dummy_engine(args.shape, slots=slots, rank=16, max_num_seqs=128) as (llm, adapter):
            adapters = args.adapters or slots
            mixes = {"base": [None] * num_requests} | {
                name: mix(name, num_requests, adapters)
                for name in ("identical", "distinct", "uniform", "zipf")
            }
            for name, chosen in mixes.items():
                loras = lora_requests(chosen, adapter)
                compiled = llm.get_metrics()["jaxlora:compilations_total"]
                # All adapters have the same content, and so the same pages.
                llm.reset_prefix_cache()
                began = time.perf_counter()
                llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
                rate = num_requests * new / (time.perf_counter() - began)
                late = int(llm.get_metrics()["jaxlora:compilations_total"] - compiled)
                row = {"slots": slots, "adapters": len(set(chosen) - {None}), "mix": name}
                rows.append(row | {"output tok/s": rate, "compilations": late})
                print(rows[-1], flush=True)
    return rows


def prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """64 prompts of 512 tokens, one token of each, from the call to the last: without adapters and
    with as many as slots, in steps of each size."""
    count, length = 64, 512
    rows = []
    given = np.random.default_rng(0).integers(1, 500, (count, length)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    for slots, tokens in itertools.product(args.slots, args.max_num_batched_tokens):
        options = {"max_num_seqs": count, "max_num_batched_tokens": tokens}
        with dummy_engine(args.shape, slots=slots, rank=16, **options) as (llm, adapter):
            for adapters in (0, slots):
                loras = lora_requests(mix("distinct", count, adapters), adapter)
                # The first run brings the adapters to their slots.
                for repeat in range(args.repeats + 1):
                    llm.reset_prefix_cache()
                    began = time.perf_counter()
                    llm.generate(given, params, lora_request=loras, use_tqdm=False)
                    seconds = time.perf_counter() - began
                    row = {"slots": slots, "adapters": adapters, "tokens in a step": tokens}
                    if repeat:
                        rows.append(row | {"seconds": seconds})
                        print(rows[-1], flush=True)
    return rows


def peft(args: argparse.Namespace) -> list[dict[str, Any]]:
    """8 equal requests, and 32 of mixed lengths, spread over the demo's adapters: ours and PEFT's.

    Both generate greedily, in float32, each request exactly as many tokens as it asks for. Each
    set is run once before it is timed.
    """
    from benchmarks.peft_engine import PeftEngine

    adapters = sorted(folder.name for folder in ADAPTERS.iterdir() if folder.is_dir())
    names: list[str | None] = [None, *adapters]
    random = np.random.default_rng(0)
    lengths = {
        "8 equal": [(32, 64)] * 8,
        "32 mixed": random.integers(8, 128, (32, 2)).tolist(),
    }
    work: dict[str, list[tuple[list[int], int, str | None]]] = {
        label: [
            (random.integers(100, 40000, prompt).tolist(), new, names[i % len(names)])
            for i, (prompt, new) in enumerate(pairs)
        ]
        for label, pairs in lengths.items()
    }
    llm = LLM(
        model_path(),
        dtype="float32",
        enable_lora=True,
        max_loras=len(adapters),
        max_model_len=1024,
        max_num_seqs=args.max_num_seqs,
    )

    def ours(items: list[tuple[list[int], int, str | None]]) -> None:
        # The run before the timed one has left the prompts there.
        llm.reset_prefix_cache()
        llm.generate(
            [prompt for prompt, _, _ in items],
            [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for _, n, _ in items],
            lora_request=[
                LoRARequest(a, None, str(ADAPTERS / a)) if a else None for _, _, a in items
            ],
            use_tqdm=False,
        )

    theirs = PeftEngine(model_path(), {a: ADAPTERS / a for a in adapters})
    rows = []
    for label, items in work.items():
        for engine, generate in (("jaxlora", ours), ("PEFT", theirs.generate)):
            generate(items)
            began = time.perf_counter()
            generate(items)
            seconds = time.perf_counter() - began
            tokens = sum(n for _, n, _ in items)
            rows.append({"requests": label, "engine": engine, "output tok/s": tokens / seconds})
    return rows
