"""The whole engine on an NVIDIA GPU in bfloat16, with the kernels that are chosen there."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from benchmarks.step import decode_inputs, make_runner
from benchmarks.trace import traced
from benchmarks.workloads import SHAPES
from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.adapters.pinned_memory import PinnedMemory
from jaxlora.engine.lowering import lower
from jaxlora.engine.runner import Runner
from kernels_pallas import dependent_launch
from kernels_pallas.lora_linear import gpu_config, gpu_prompt_config
from tests.jaxlora.peft_models import KINDS, Reference, prompts

# Sizes the kernels are written for: multiples of 64, and of 128 for that of large steps.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ONE_KEY_HEAD = SIZES | {"num_key_value_heads": 1}
CONTEXT = 609
# Heads of 128, which attention turns and writes itself.
WIDE_SIZES = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def logprobs(
    reference: Reference, prompt: list[int], tokens: list[int], name: str | None
) -> np.ndarray:
    """Of generated tokens, by the reference in the dtype that its model has."""
    logits = reference.logits([*prompt, *tokens], name)[len(prompt) - 1 : -1]
    scores = logits.astype(np.float64)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return scores[np.arange(len(tokens)), tokens]


def make_llm(reference: Reference, most_tokens: int) -> LLM:
    """Serves the model that the reference has from then on: its weights rounded to bfloat16."""
    # Judge both by the weights that both have.
    reference.model.to(torch.bfloat16).to(torch.float32)
    return LLM(
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


def check_logprobs(llm: LLM, reference: Reference) -> None:
    """They are as far as torch's in bfloat16 from those in float32."""
    names = [None, *KINDS] * 3
    texts = prompts(len(names))
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    requests = [name and LoRARequest(name, None, reference.paths[name]) for name in names]
    outputs = [output.outputs[0] for output in llm.generate(texts, params, lora_request=requests)]

    def by_reference() -> np.ndarray:
        scored = zip(texts, outputs, names, strict=True)
        return np.array([logprobs(reference, p, o.token_ids, name) for p, o, name in scored])

    right = by_reference()
    reference.model.to(torch.bfloat16)
    theirs = np.abs(by_reference() - right)
    told = [
        [chosen[token].logprob for token, chosen in zip(o.token_ids, o.logprobs, strict=True)]
        for o in outputs
    ]
    ours = np.abs(told - right)
    # The largest errors of so small a model are chance: a token that it could as well do without.
    assert np.mean(ours) <= 2 * np.mean(theirs)
    assert np.median(ours) <= 2 * np.median(theirs)


def check_memory(llm: LLM, path: str) -> None:
    """Adapters lie in what was pinned at start, one after the other in the same, and arrive as
    they are."""
    tensors = safetensors.numpy.load_file(Path(path) / "adapter_model.safetensors")
    arrived, seen = [], set()
    with mock.patch.object(PinnedMemory, "pin", autospec=True, side_effect=PinnedMemory.pin) as pin:
        for step in range(1, 7):
            weights = {key: array * np.float32(step) for key, array in tensors.items()}
            config = json.loads((Path(path) / "adapter_config.json").read_text())
            request = LoRARequest.from_tensors(f"step-{step}", weights, config)
            (block,) = llm.llm_engine.adapters.read(request).blocks
            arrived.append((weights, jax.device_put(block)))
            seen.add(block.ctypes.data)
            del block
        assert not pin.called
        # One more for each that is still on its way when the next one comes.
        assert len(seen) < 6
    order = sorted(tensors)
    for weights, block in arrived:
        whole = np.concatenate([weights[key].reshape(-1) for key in order])
        np.testing.assert_array_equal(np.asarray(block), whole)


def check_swap(llm: LLM, path: str) -> None:
    """One copy has all weights, and one dispatch is one kernel's."""
    request = LoRARequest("traced", 99, path)
    with traced() as trace:
        llm.add_lora(request)
        llm.pin_lora(99, wait=True)
        jax.block_until_ready(jax.live_arrays())
    llm.remove_lora(99)
    # All weights, and a few numbers in two.
    assert trace.num_transfers == 3, str(trace)
    assert trace.dispatched == ["jit(_write)"]
    assert sum("write_slot" in kernel.name for kernel in trace.kernels) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "most_tokens", "large_steps"),
    [
        (ONE_KEY_HEAD, 256, "XLA and the LoRA kernel in larger steps"),
        (SIZES, 256, "another from 1024 tokens on, and from 256 on with adapters"),
        (WIDE_SIZES, 1024, "another from 1024 tokens on"),
    ],
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
    # So small a model would leave large steps to XLA.
    with (
        mock.patch.object(gpu_prompt_config, "_LEAST_TILES", 1),
        mock.patch.object(PinnedMemory, "pin", autospec=True, side_effect=PinnedMemory.pin) as pin,
    ):
        llm = make_llm(reference, most_tokens)
    assert pin.call_count == 1
    assert "LoRA matmul: mosaic_gpu" in caplog.text
    assert "linears in one piece: mosaic_gpu" in caplog.text
    assert large_steps in caplog.text
    assert "it is pinned" in caplog.text
    compiled = llm.get_metrics()["jaxlora:compilations_total"]
    check_logprobs(llm, reference)
    check_memory(llm, reference.paths["r16-all"])
    check_swap(llm, reference.paths["r16-all"])
    assert llm.get_metrics()["jaxlora:compilations_total"] == compiled


@pytest.mark.gpu
def test_bfloat16_without_kernels_is_as_close_as_torch_in_bfloat16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What GPUs that no kernel is written for run."""
    caplog.set_level(logging.INFO)
    reference = Reference(tmp_path, **SIZES)
    with mock.patch.object(gpu_config, "MULTIPROCESSORS", 10_000):
        llm = make_llm(reference, 256)
    assert "LoRA matmul: dense (gpu: the kernels are written for Hopper" in caplog.text
    assert "mosaic_gpu" not in caplog.text
    check_logprobs(llm, reference)


@jax.jit
def same_bits(these: tuple[jax.Array, ...], those: tuple[jax.Array, ...]) -> jax.Array:
    """Whether arrays are equal, NaN and all; on the device, since they are large."""
    kinds = {2: jnp.uint16, 4: jnp.uint32}
    pairs = [
        jnp.array_equal(*(array.view(kinds[array.dtype.itemsize]) for array in pair))
        for pair in zip(these, those, strict=True)
    ]
    return jnp.stack(pairs).all()


@pytest.fixture(scope="module")
def runner() -> Runner:
    """Four layers of Llama-3.1-8B, random weights, a random adapter in every slot and a cache full
    of random keys and values."""
    shapes = {"four layers": SHAPES["llama-3.1-8b"] | {"num_hidden_layers": 4}}
    with mock.patch.dict(SHAPES, shapes):
        runner = make_runner("four layers", slots=8, rows=128, context=CONTEXT)
    keys = jax.random.split(jax.random.key(1), len(runner._cache))
    runner._cache = [
        jax.random.normal(key, pages.shape, pages.dtype)
        for key, pages in zip(keys, runner._cache, strict=True)
    ]
    return runner


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "adapters"), [(1, 8), (16, 0), (16, 8), (64, 0), (64, 8), (128, 0), (128, 8)]
)
def test_kernels_that_begin_early_compute_what_they_do_in_turn(
    runner: Runner, rows: int, adapters: int
) -> None:
    program = runner.programs()[f"decode {'lora ' * bool(adapters)}{rows}"]
    lowered = lower(program, runner.devices)
    assert program.options == dependent_launch.OPTIONS
    # A CUDA graph runs one after the other.
    early, in_turn = lowered.compile(dict(program.options)), lowered.compile()
    inputs = decode_inputs(rows, CONTEXT)
    for seed in range(20):
        random = np.random.default_rng(seed)
        ids = random.integers(1, 500, rows).astype(np.int32)
        rest: list[Any] = [dataclasses.replace(inputs, token_ids=ids)]
        if adapters:
            rest += runner.lora_arguments(inputs, np.sort(np.arange(rows) % adapters))
        rest = jax.device_put(rest)
        results = []
        for executable in (early, in_turn):
            # They are overwritten.
            cache, table = jax.tree.map(jnp.copy, (runner._cache, runner._table))
            jax.block_until_ready(cache)
            _, _, cache, logits, _ = executable(runner._weights, cache, table, *rest)
            results.append((logits, *cache))
        assert same_bits(*results)
