"""The engine over several devices: what it says is what one device says, and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jsonschema_rs
import numpy as np
import pytest
import torch

from jaxlora import LLM
from jaxlora.errors import ConfigError
from tests.jaxlora import tensor_parallel_run, test_gpu
from tests.jaxlora.peft_models import KINDS, Reference
from tests.jaxlora.tensor_parallel_run import SCHEMA, VOCAB_SIZE, workload
from tests.jaxlora.tiny_tokenizer import add_tokenizer
from tests.jaxlora.virtual_devices import run_on_virtual_devices

SIZES = {"vocab_size": VOCAB_SIZE, "num_attention_heads": 8, "num_key_value_heads": 4}
NUM_LAYERS = 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Biases everywhere, of which a sum over devices must hold one."""
    folder = tmp_path_factory.mktemp("tensor-parallel")
    return Reference(folder, attention_bias=True, mlp_bias=True, **SIZES)


@pytest.fixture(scope="module")
def results(
    reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """By number of devices: virtual ones, which only a process of their own can have."""
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    tokenizer = add_tokenizer(Path(reference.base_path), folder, vocab_size=VOCAB_SIZE)
    asked = {"base": reference.base_path, "tokenizer": str(tokenizer)}
    asked |= {"adapters": reference.paths, "sizes": [1, 4]}
    return run_on_virtual_devices("tensor_parallel_run", asked)


def test_tokens_are_those_of_one_device_and_of_peft(
    results: dict[str, dict[str, Any]], reference: Reference
) -> None:
    texts, names = workload(list(KINDS))
    for prompt, name, got in zip(texts, names, results["4"]["greedy"], strict=True):
        reference.check_greedy(prompt, got, name)
    assert results["4"]["greedy"] == results["1"]["greedy"]


def test_what_overflows_is_told_by_all_devices(results: dict[str, dict[str, Any]]) -> None:
    for size in ("1", "4"):
        assert len(results[size]["overflowed"]) == 2
        for error in results[size]["overflowed"]:
            assert "the arithmetic overflowed" in error


def test_a_kernel_for_linears_serves_all_but_the_gate(results: dict[str, dict[str, Any]]) -> None:
    """With and without adapters: the gate's bias comes before its end, and what o and down are
    added to comes after the sum over devices."""
    assert not results["1"]["fused"]
    kinds = {(len(splits), ending) for _, _, splits, _, ending in results["4"]["fused"]}
    assert kinds == {(3, ""), (1, "")}
    assert len(results["4"]["fused"]) == 6


def test_sampling_and_logprobs_are_those_of_one_device(results: dict[str, dict[str, Any]]) -> None:
    assert results["4"]["sampled"] == results["1"]["sampled"]
    for told in ("logprobs", "prompt_logprobs"):
        for ours, theirs in zip(results["4"][told], results["1"][told], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_constrained_completions_are_json_of_their_schema(
    results: dict[str, dict[str, Any]],
) -> None:
    """Under every adapter and none, beside completions that are free."""
    assert len(results["4"]["json"]) >= len(KINDS)
    for text in results["4"]["json"]:
        jsonschema_rs.validate(SCHEMA, json.loads(text))
    assert len(set(results["4"]["json"])) > 1
    assert results["4"]["json"] == results["1"]["json"]


def test_nothing_compiles_after_warm_up(results: dict[str, dict[str, Any]]) -> None:
    assert [result["compilations"] for result in results.values()] == [0, 0]


def test_devices_sum_twice_a_layer_and_once_for_the_embedding(
    results: dict[str, dict[str, Any]],
) -> None:
    """And one device never asks another."""
    assert not any(results["1"]["collectives"].values())
    programs = results["4"]["collectives"]
    forward = {name for name in programs if name.startswith(("decode", "mixed"))}
    assert len(forward) > 4
    for name in forward:
        # And they compare the best of their scores, and whose it is.
        assert programs[name] == ["all-gather"] * 2 + ["all-reduce"] * (2 * NUM_LAYERS + 1)
    assert programs["sample 4"] == ["all-gather"]
    assert not programs["adapter write, rank 16 float32"]


def test_every_device_has_its_part(results: dict[str, dict[str, Any]]) -> None:
    (whole,) = results["1"]["bytes"].values()
    parts = list(results["4"]["bytes"].values())
    assert len(parts) == 4
    assert len(set(parts)) == 1
    # Norms, row biases and one matrix of each pair of LoRA matrices are on all of them.
    assert parts[0] < 0.4 * whole


def start(reference: Reference, **options: Any) -> None:
    LLM(reference.base_path, skip_tokenizer_init=True, use_tqdm=False, **options)


def test_more_devices_than_there_are_is_refused(reference: Reference) -> None:
    size = len(jax.devices()) + 1
    with pytest.raises(ConfigError, match=f"tensor_parallel_size={size} needs {size} devices"):
        start(reference, tensor_parallel_size=size)


two_gpus = pytest.mark.skipif("len(jax.devices()) < 2", reason="no accelerator: needs two GPUs")


@pytest.mark.gpu
@two_gpus
def test_two_gpus_agree_with_one(reference: Reference) -> None:
    one, two = (
        tensor_parallel_run.run(reference.base_path, reference.paths, size) for size in (1, 2)
    )
    assert two["greedy"] == one["greedy"]
    assert two["compilations"] == 0


def regret(
    reference: Reference, prompt: list[int], tokens: list[int], name: str | None
) -> np.ndarray:
    """How far each token is behind the reference's best choice, in float32."""
    logits = reference.logits([*prompt, *tokens], name)[len(prompt) - 1 : -1]
    return logits.max(axis=-1) - logits[np.arange(len(tokens)), tokens]


@pytest.mark.gpu
@two_gpus
def test_two_gpus_are_as_close_in_bfloat16_as_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With the kernels, for whose sizes half a model is large enough."""
    sizes = test_gpu.SIZES | {"vocab_size": VOCAB_SIZE}
    reference = Reference(tmp_path_factory.mktemp("two-gpus"), **sizes)
    # Judge by the weights that are served: those rounded to bfloat16.
    reference.model.to(torch.bfloat16).to(torch.float32)
    texts, names = workload(list(KINDS))
    one, two = (
        np.concatenate(
            [
                regret(reference, prompt, tokens, name)
                for prompt, tokens, name in zip(texts, result["greedy"], names, strict=True)
            ]
        )
        for result in (
            tensor_parallel_run.run(reference.base_path, reference.paths, size, "bfloat16")
            for size in (1, 2)
        )
    )
    # Not the largest: so small a model may as well say another token now and then.
    assert two.mean() <= 2 * one.mean() + 1e-3
