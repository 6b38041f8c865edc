"""One workload over several devices, in a process of its own where the devices are virtual.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu \
        python -m tests.jaxlora.tensor_parallel_run \\
        '{"base": "", "tokenizer": "", "adapters": {}, "sizes": [1, 4]}'

prints what was generated and compiled at each size, as JSON. Several devices decode four
rows by the stand-in for a kernel that does all of a linear at once.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import load_file

from jaxlora import LLM, LoRARequest, SamplingParams, StructuredOutputsParams
from tests.jaxlora.fused_linear import Call, chosen
from tests.jaxlora.peft_models import prompts
from tests.jaxlora.small_pieces import in_small_pieces

VOCAB_SIZE = 96
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(
    temperature=1.0,
    top_k=20,
    top_p=0.95,
    seed=11,
    max_tokens=8,
    ignore_eos=True,
    repetition_penalty=1.2,
    logit_bias={3: 2.0, 95: 1.0},
    logprobs=3,
    prompt_logprobs=2,
)


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["x", "y"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
STRUCTURED = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)


def workload(
    names: list[str], vocab_size: int = VOCAB_SIZE
) -> tuple[list[list[int]], list[str | None]]:
    """Prompts, and the adapter of each; more adapters than slots."""
    asked = [None, *names, *names[::-1], None]
    return prompts(len(asked), vocab_size), asked


def bytes_on_devices(arrays: Any, size: int) -> dict[str, int]:
    """What each of the first devices has of arrays."""
    return {
        str(device): sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(arrays)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        for device in jax.devices()[:size]
    }


def run(
    base: str,
    adapters: dict[str, str],
    size: int,
    dtype: str = "float32",
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """The workload on ``size`` devices: tokens, log-probabilities, compilations, collectives; and
    JSON of a schema, if there is a tokenizer."""
    with in_small_pieces():
        llm = LLM(
            base,
            dtype=dtype,
            tensor_parallel_size=size,
            enable_lora=True,
            max_loras=3,
            max_num_seqs=4,
            # Steps with prompts are padded to 32 tokens or 128.
            max_num_batched_tokens=128,
            num_gpu_blocks_override=64,
            tokenizer=tokenizer,
            skip_tokenizer_init=tokenizer is None,
            use_tqdm=False,
        )
    texts, names = workload(list(adapters))
    requests = [name and LoRARequest(name, None, adapters[name]) for name in names]
    compiled = llm.get_metrics()["jaxlora:compilations_total"]
    greedy = llm.generate(texts, GREEDY, lora_request=requests, use_tqdm=False)
    sampled = llm.generate(texts, SAMPLED, lora_request=requests, use_tqdm=False)
    structured = [
        SamplingParams(temperature=0, max_tokens=30, structured_outputs=STRUCTURED),
        GREEDY,
    ]
    json_texts = (
        []
        if tokenizer is None
        else llm.generate(
            texts, structured * (len(texts) // 2), lora_request=requests, use_tqdm=False
        )
    )
    large = llm.generate(
        texts[:2],
        [GREEDY, SAMPLED],
        lora_request=overflowing(adapters["r16-all"]),
        use_tqdm=False,
    )
    runner: Any = llm.llm_engine._runner
    arrays = (runner._weights, runner._cache, runner.bank.arrays)
    return {
        "greedy": [output.outputs[0].token_ids for output in greedy],
        "sampled": [output.outputs[0].token_ids for output in sampled],
        "logprobs": [flat(output.outputs[0].logprobs) for output in sampled],
        "prompt_logprobs": [flat(output.prompt_logprobs, first=1) for output in sampled],
        "overflowed": [str(output.error) for output in large],
        "json": [output.outputs[0].text for output in json_texts[::2]],
        "compilations": llm.get_metrics()["jaxlora:compilations_total"] - compiled,
        "collectives": {
            name: sorted(collectives(program.as_text()))
            for name, program in runner._programs.items()
        },
        "bytes": bytes_on_devices(arrays, size),
    }


def flat(told: Any, first: int = 0) -> list[float]:
    """The log-probabilities of all tokens that were told, place by place."""
    return [logprob.logprob for entry in told[first:] for logprob in entry.values()]


def overflowing(path: str) -> LoRARequest:
    """An adapter of finite numbers that make NaN of a prompt."""
    tensors = load_file(Path(path) / "adapter_model.safetensors")
    large = {key: each * 1e25 for key, each in tensors.items()}
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    return LoRARequest.from_tensors("large", large, config)


def collectives(hlo: str) -> list[str]:
    """Names of the operations between devices in a compiled program."""
    names = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    return re.findall(rf"^.* = .*?\b({names})(?:-start)?\(", hlo, re.MULTILINE)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    results = {}
    for size in asked["sizes"]:
        stands_in: contextlib.AbstractContextManager[set[Call]] = (
            chosen(4) if size > 1 else contextlib.nullcontext(set())
        )
        with stands_in as calls:
            results[str(size)] = run(
                asked["base"], asked["adapters"], size, tokenizer=asked["tokenizer"]
            )
        results[str(size)]["fused"] = sorted(calls)
    sys.stdout.write(json.dumps(results))
