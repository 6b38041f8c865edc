"""The whole engine on an NVIDIA GPU in bfloat16, with the kernels that are chosen there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from benchmarks.trace import traced
from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.adapters import host_blocks
from kernels_pallas.lora_linear import gpu_prompt_config
from tests.jaxlora.peft_models import KINDS, Reference, prompts

# Sizes the kernels are written for: multiples of 64, and of 256 for that of large steps.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDE_SIZES = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def regret(
    reference: Reference, prompt: list[int], tokens: list[int], name: str | None
) -> np.ndarray:
    """How far each token is behind the reference's best choice, in float32."""
    logits = reference.logits([*prompt, *tokens], name)[len(prompt) - 1 : -1]
    return logits.max(axis=-1) - logits[np.arange(len(tokens)), tokens]


def check_memory(llm: LLM, path: str) -> None:
    """Adapters lie in pinned memory, one after the other in the same, and arrive as they are."""
    tensors = safetensors.numpy.load_file(Path(path) / "adapter_model.safetensors")
    arrived, seen = [], set()
    with mock.patch.object(
        host_blocks, "pinned_memory", side_effect=host_blocks.pinned_memory
    ) as pinned:
        for step in range(1, 7):
            weights = {key: array * np.float32(step) for key, array in tensors.items()}
            config = json.loads((Path(path) / "adapter_config.json").read_text())
            request = LoRARequest.from_tensors(f"step-{step}", weights, config)
            (block,) = llm.llm_engine.read_lora(request).blocks
            arrived.append((weights, jax.device_put(block)))
            seen.add(block.ctypes.data)
            del block
        # One more for each that is still on its way when the next one comes.
        assert pinned.call_count < 6
        assert len(seen) < 6
    order = sorted(tensors)
    for weights, block in arrived:
        whole = np.concatenate([weights[key].reshape(-1) for key in order])
        np.testing.assert_array_equal(np.asarray(block), whole)


def check_swap(llm: LLM, path: str) -> None:
    """One copy has all weights, one dispatch is one kernel's."""
    request = LoRARequest("traced", 99, path)
    size = llm.llm_engine.read_lora(request).num_bytes
    with traced() as trace:
        llm.add_lora(request)
        llm.pin_lora(99, wait=True)
        jax.block_until_ready(jax.live_arrays())
    llm.remove_lora(99)
    weights, *small = sorted(trace.copied, reverse=True)
    assert size <= weights < 2 * size
    assert len(small) == 2, str(trace)
    assert max(small) < 1000
    assert trace.dispatched == ["jit(_write)"]
    assert sum("write_slot" in kernel.name for kernel in trace.kernels) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "most_tokens", "large_steps"),
    [(SIZES, 256, "XLA and the LoRA kernel in larger steps"), (WIDE_SIZES, 1024, "on another")],
)
def test_bfloat16_is_as_close_as_torch_in_bfloat16(
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    sizes: dict[str, int],
    most_tokens: int,
    large_steps: str,
) -> None:
    """All prompts are in few steps of the most tokens."""
    caplog.set_level(logging.INFO)
    reference = Reference(tmp_path_factory.mktemp("gpu"), **sizes)
    # Judge both by the weights that both have: those rounded to bfloat16.
    reference.model.to(torch.bfloat16).to(torch.float32)
    # So small a model would leave large steps to XLA.
    with mock.patch.object(gpu_prompt_config, "_LEAST_TILES", 1):
        llm = LLM(
            reference.base_path,
            dtype="bfloat16",
            enable_lora=True,
            max_loras=4,
            # Not one of the sizes that the kernel for a decode step's linears serves.
            max_num_seqs=20,
            max_num_batched_tokens=most_tokens,
            num_gpu_blocks_override=256,
            skip_tokenizer_init=True,
        )
    assert "LoRA matmul: mosaic_gpu" in caplog.text
    assert "linears in one piece: mosaic_gpu" in caplog.text
    assert large_steps in caplog.text
    assert "it is pinned" in caplog.text
    compiled = llm.get_metrics()["jaxlora:compilations_total"]
    names = [None, *KINDS] * 3
    texts = prompts(len(names))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    requests = [name and LoRARequest(name, None, reference.paths[name]) for name in names]
    outputs = llm.generate(texts, params, lora_request=requests)
    check_memory(llm, reference.paths["r16-all"])
    check_swap(llm, reference.paths["r16-all"])
    assert llm.get_metrics()["jaxlora:compilations_total"] == compiled
    ours = [
        regret(reference, prompt, output.outputs[0].token_ids, name)
        for prompt, output, name in zip(texts, outputs, names, strict=True)
    ]
    reference.model.to(torch.bfloat16)
    theirs_tokens = [
        reference.greedy(prompt, 24, name) for prompt, name in zip(texts, names, strict=True)
    ]
    reference.model.to(torch.float32)
    theirs = [
        regret(reference, prompt, tokens, name)
        for prompt, tokens, name in zip(texts, theirs_tokens, names, strict=True)
    ]
    assert np.mean(ours) <= 2 * np.mean(theirs) + 1e-3
    assert np.max(ours) <= 2 * np.max(theirs) + 1e-2
