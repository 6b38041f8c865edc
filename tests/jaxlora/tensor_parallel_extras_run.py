"""Adapters of every kind over several devices, in a process of its own where they are virtual.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu \\
        python -m tests.jaxlora.tensor_parallel_extras_run \\
        '{"base": "", "adapters": {}, "size": 4, "options": {}}'

prints what was generated and compiled, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.numpy import load_file

from jaxlora import LLM, AdapterRefusedError, LoRARequest, SamplingParams
from jaxlora.adapters import base_weights
from tests.jaxlora.small_pieces import in_small_pieces
from tests.jaxlora.tensor_parallel_run import bytes_on_devices, collectives, workload

VOCAB_SIZE = 100
"""So that four devices have the same share; many rows that adapters bring are not on the first."""

REPLACED = ("dora-vocabulary", "saved-head", "tokens", "plain", "embed")
"""Adapters that come after one another under one name."""
CHANGED_ROWS = (0, 42, VOCAB_SIZE - 1)


def params(*, scored: bool) -> SamplingParams:
    """Greedy, with each token's log-probability, and those of the prompt's if it is scored: such
    prompts are read in small steps, others in those of the largest size."""
    told = 0 if scored else None
    return SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=told
    )


def generate(
    llm: LLM, texts: list[list[int]], requests: list[LoRARequest | None]
) -> list[dict[str, Any]]:
    """Of each prompt the tokens that follow, and the log-probabilities that were told."""
    scored = [params(scored=i % 2 == 0) for i in range(len(texts))]
    outputs = llm.generate(texts, scored, lora_request=requests, use_tqdm=False)
    results = []
    for output in outputs:
        prompt, made = output.prompt_token_ids, output.outputs[0]
        scores: list[Any] = output.prompt_logprobs or [None]
        told = zip(prompt[1:], scores[1:], strict=False)
        results.append(
            {
                "tokens": made.token_ids,
                "logprobs": [
                    each[token].logprob
                    for token, each in zip(made.token_ids, made.logprobs, strict=True)
                ],
                "prompt_logprobs": [each[token].logprob for token, each in told],
            }
        )
    return results


def run(base: str, adapters: dict[str, str], size: int, options: dict[str, Any]) -> dict[str, Any]:
    """The workload; one name with one adapter after another; copies of the base that are none."""
    with in_small_pieces():
        llm = LLM(
            base,
            dtype="float32",
            tensor_parallel_size=size,
            enable_lora=True,
            max_loras=3,
            # Threads read adapters again, and compute norms, while steps run.
            max_cpu_loras=4,
            max_num_seqs=4,
            # Steps with prompts are padded to 32 tokens or 128.
            max_num_batched_tokens=128,
            num_gpu_blocks_override=64,
            skip_tokenizer_init=True,
            use_tqdm=False,
            **options,
        )
    compiled = llm.get_metrics()["jaxlora:compilations_total"]
    # Of an adapter's two prompts one is scored.
    texts, names = workload(list(adapters), VOCAB_SIZE)
    requests = [name and LoRARequest(name, None, adapters[name]) for name in names]
    together = generate(llm, texts, requests)
    runner: Any = llm.llm_engine._runner
    extras = runner.bank.extras
    return {
        "together": together,
        "replaced": [replaced(llm, adapters[name], texts[0]) for name in REPLACED],
        "after": after_removal(llm, LoRARequest("head", None, adapters["plain"]), texts[0]),
        "refused": [refused(llm, adapters["embed"], row) for row in CHANGED_ROWS],
        "compilations": llm.get_metrics()["jaxlora:compilations_total"] - compiled,
        "collectives": {
            name: sorted(collectives(program.as_text()))
            for name, program in runner._programs.items()
        },
        "reported_bytes": extras.num_bytes,
        "bytes": list(bytes_on_devices(extras.arrays, size).values()),
    }


def replaced(llm: LLM, path: str, prompt: list[int]) -> dict[str, Any]:
    """What an adapter says under a name that others have had before it."""
    request = LoRARequest("changing", None, path, load_inplace=True)
    (result,) = generate(llm, [prompt], [request])
    return result


def after_removal(llm: LLM, request: LoRARequest, prompt: list[int]) -> list[dict[str, Any]]:
    """What base and adapter say once all others are removed."""
    for lora_int_id in llm.list_loras():
        llm.remove_lora(lora_int_id)
    return generate(llm, [prompt, prompt], [None, request])


def refused(llm: LLM, path: str, row: int) -> str:
    """Why an adapter is refused whose copy of the base's embedding differs in one row."""
    tensors = load_file(Path(path) / "adapter_model.safetensors")
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    (key,) = (key for key in tensors if key.endswith("embed_tokens.base_layer.weight"))
    changed = tensors[key].copy()
    changed[row, 5] += 1e-3
    request = LoRARequest.from_tensors("changed", tensors | {key: changed}, config)
    try:
        llm.add_lora(request)
    except AdapterRefusedError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    # Several blocks of each device's part, of which none divides it.
    with mock.patch.object(base_weights, "_BLOCK_ROWS", 18):
        sys.stdout.write(json.dumps(run(**json.loads(sys.argv[1]))))
