"""The benchmark harness: our engine through its public API, on any device.

    python -m benchmarks.run demo                      the demo's model and adapters
    python -m benchmarks.run decode --shape llama-3.1-8b --slots 8
    python -m benchmarks.run offline --slots 8 64      throughput of each adapter mix
    python -m benchmarks.run peft                      against PEFT's mixed-adapter generate
    python -m benchmarks.run sampling --shape tiny     greedy decoding, logprobs, penalties ...

Each prints a table and, with ``--out``, writes JSON with hardware, versions, commit and command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from benchmarks.record import save, table
from benchmarks.workloads import DECODE_GRID, SAMPLING, SHAPES, Decode, mix
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
                **_memory(),
            }
        )
    return rows


def decode(args: argparse.Namespace) -> list[dict[str, Any]]:
    """TPOT = (time for ``long`` tokens - time for ``short`` tokens) / (long - short)."""
    rows = []
    for slots in args.slots:
        grid = [w for w in DECODE_GRID if w.slots == slots and w.batch <= args.max_batch]
        if not grid:
            continue
        most, rank = max(w.batch for w in grid), grid[0].rank
        began = time.perf_counter()
        with _dummy_engine(args.shape, slots=slots, rank=rank, max_num_seqs=most) as (llm, adapter):
            start_up = time.perf_counter() - began
            for workload in grid:
                row = {"workload": workload.name, "TPOT ms": _tpot(llm, workload, adapter)}
                rows.append(row | {"start-up s": start_up, **_memory()})
                print(rows[-1], flush=True)
    return rows


def offline(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Throughput: 512 requests of 256 tokens in and 128 out, at most 128 at once."""
    rows = []
    num_requests, prompt_len, new = args.requests, 256, 128
    prompts = np.random.default_rng(0).integers(1, 500, (num_requests, prompt_len)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    for slots in args.slots:
        with _dummy_engine(args.shape, slots=slots, rank=16, max_num_seqs=128) as (llm, adapter):
            mixes = {"base": [None] * num_requests} | {
                name: mix(name, num_requests, slots)
                for name in ("identical", "distinct", "uniform", "zipf")
            }
            for name, chosen in mixes.items():
                loras = [
                    None if i is None else LoRARequest(f"adapter-{i}", None, str(adapter))
                    for i in chosen
                ]
                began = time.perf_counter()
                llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
                rate = num_requests * new / (time.perf_counter() - began)
                rows.append({"slots": slots, "mix": name, "output tok/s": rate})
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
        llm.generate(
            [prompt for prompt, _, _ in items],
            [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for _, n, _ in items],
            lora_request=[a and LoRARequest(a, None, str(ADAPTERS / a)) for _, _, a in items],
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


def sampling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time per output token of base requests that all ask for the same."""
    rows = []
    batches = [batch for batch in (1, 16, 128) if batch <= args.max_batch]
    with _dummy_engine(args.shape, slots=1, rank=8, max_num_seqs=batches[-1]) as (llm, adapter):
        for batch in batches:
            workload = Decode(slots=1, adapters=0, batch=batch, prompt_len=64)
            for name, options in SAMPLING.items():
                milliseconds = _tpot(llm, workload, adapter, **options)
                rows.append({"batch": batch, "sampling": name, "TPOT ms": milliseconds})
                print(rows[-1], flush=True)
    return rows


def _tpot(llm: LLM, workload: Decode, adapter: Path, **sampling: Any) -> float:
    """Milliseconds a token, the median of three; adapters are loaded before."""
    sampling = {"temperature": 0.0} | sampling
    random = np.random.default_rng(0)
    prompts = random.integers(1, 500, (workload.batch, workload.prompt_len)).tolist()
    requests: list[LoRARequest | None] = [None] * workload.batch
    if workload.adapters:
        requests = [
            LoRARequest(f"adapter-{i % workload.adapters}", None, str(adapter))
            for i in range(workload.batch)
        ]

    def seconds(num_tokens: int) -> float:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, **sampling)
        began = time.perf_counter()
        llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        return time.perf_counter() - began

    seconds(2)
    tokens = workload.long - workload.short
    times = [(seconds(workload.long) - seconds(workload.short)) / tokens for _ in range(3)]
    return float(np.median(times)) * 1e3


@contextlib.contextmanager
def _dummy_engine(
    shape: str, *, slots: int, rank: int, max_num_seqs: int
) -> Iterator[tuple[LLM, Path]]:
    """An engine with random weights, and a random adapter's folder to load under many names."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        adapter = _random_adapter(Path(folder), SHAPES[shape], rank)
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_lora=True,
            max_loras=slots,
            max_lora_rank=rank,
            max_model_len=2048,
            max_num_seqs=max_num_seqs,
        )
        yield llm, adapter


def _random_adapter(folder: Path, shape: dict[str, Any], rank: int) -> Path:
    """A random PEFT adapter on all seven linears; its B is small, so that nothing overflows."""
    path = folder / "adapter"
    path.mkdir()
    hidden, mlp = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    widths = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, mlp),
        "mlp.up_proj": (hidden, mlp),
        "mlp.down_proj": (mlp, hidden),
    }
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for module, (d_in, d_out) in widths.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            a = random.normal(0, 0.02, (rank, d_in)).astype(ml_dtypes.bfloat16)
            b = random.normal(0, 0.001, (d_out, rank)).astype(ml_dtypes.bfloat16)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    modules = [module.rsplit(".", 1)[1] for module in widths]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _memory() -> dict[str, float]:
    """Most memory this process has held, on the host and on an accelerator, in MiB."""
    peak = {"peak host MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    stats = jax.devices()[0].memory_stats()
    if stats:
        peak["peak device MiB"] = stats["peak_bytes_in_use"] / 2**20
    return peak


BENCHMARKS = {
    "demo": demo,
    "decode": decode,
    "offline": offline,
    "peft": peft,
    "sampling": sampling,
}


def main() -> None:
    """Runs one benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("benchmark", nargs="?", default="demo", choices=tuple(BENCHMARKS))
    parser.add_argument(
        "--shape",
        default="llama-3.1-8b",
        choices=SHAPES,
        help="decode, offline, sampling: the model",
    )
    parser.add_argument(
        "--slots", type=int, nargs="*", default=[8, 64], help="decode, offline: max_loras"
    )
    parser.add_argument("--requests", type=int, default=512, help="offline: how many")
    parser.add_argument(
        "--max-batch", type=int, default=128, help="decode, sampling: leave out larger ones"
    )
    parser.add_argument("--max-num-seqs", type=int, default=16, help="peft: our rows in a step")
    parser.add_argument("--out", help="write the results to this JSON file")
    args = parser.parse_args()
    rows = BENCHMARKS[args.benchmark](args)
    print(table(rows))
    save(args.out, args.benchmark, rows)


if __name__ == "__main__":
    main()
