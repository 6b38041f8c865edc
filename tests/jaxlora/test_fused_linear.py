"""Steps whose linears are one kernel, adapters and ending included: where it is asked, and
that nobody's tokens change. On a CPU a stand-in is asked; what the kernel answers is tested in
tests/kernels_pallas/test_lora_linear.py."""

from __future__ import annotations

from typing import Any

import pytest

from jaxlora import LLM, LoRARequest, SamplingParams
from tests.jaxlora.fused_linear import Call, chosen
from tests.jaxlora.peft_models import EXTRA_KINDS, KINDS, SIZES, Reference, prompts

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
HIDDEN, MLP = SIZES["hidden_size"], SIZES["intermediate_size"]
QKV = (HIDDEN, HIDDEN // 2, HIDDEN // 2)


def asked(d_in: int, splits: tuple[int, ...], with_lora: bool, ending: str) -> set[Call]:
    """In steps of 1 and 8 rows, of one row by adapters alone, and of 64 tokens of prompts."""
    sizes = (1, 8, 64)[not with_lora :]
    return {Call(tokens, d_in, splits, with_lora, ending) for tokens in sizes}


def qkv(with_lora: bool) -> set[Call]:
    return asked(HIDDEN, QKV, with_lora, "")


def gate_up(with_lora: bool) -> set[Call]:
    return asked(HIDDEN, (MLP, MLP), with_lora, "gated")


def onto_residual(with_lora: bool) -> set[Call]:
    return asked(HIDDEN, (HIDDEN,), with_lora, "residual") | asked(
        MLP, (HIDDEN,), with_lora, "residual"
    )


def generated(
    reference: Reference,
    names: list[str | None],
    most_tokens: int = 64,
    lora_tokens: int | None = None,
    sizes: tuple[int, ...] = (1, 8, 16),
    **options: Any,
) -> set[Call]:
    """Starts an engine that runs steps of ``most_tokens`` through the op, and with adapters from
    ``lora_tokens`` on, compares what it says with PEFT, to all requests together and to the last
    one alone, and tells what its linears asked."""
    with chosen(*sizes, prompt_tokens=most_tokens, lora_prompt_tokens=lora_tokens) as calls:
        llm = LLM(
            reference.base_path,
            dtype="float32",
            max_num_seqs=6,
            max_num_batched_tokens=most_tokens,
            num_gpu_blocks_override=48,
            skip_tokenizer_init=True,
            use_tqdm=False,
            **options,
        )
    compiled = llm.get_metrics()["jaxlora:compilations_total"]
    texts = prompts(len(names))
    requests = [name and LoRARequest(name, None, reference.paths[name]) for name in names]
    outputs = llm.generate(texts, GREEDY, lora_request=requests, use_tqdm=False)
    outputs += llm.generate(texts[-1:], GREEDY, lora_request=requests[-1:], use_tqdm=False)
    texts, names = [*texts, texts[-1]], [*names, names[-1]]
    assert llm.get_metrics()["jaxlora:compilations_total"] == compiled
    for prompt, output, name in zip(texts, outputs, names, strict=True):
        reference.check_greedy(prompt, output.outputs[0].token_ids, name)
    return calls


def test_every_linear_and_every_kind_of_adapter(reference: Reference) -> None:
    """More adapters than slots, so that a slot's next one has another rank."""
    calls = generated(reference, [None, *KINDS, *KINDS], enable_lora=True, max_loras=4)
    assert calls == set().union(
        *(qkv(lora) | gate_up(lora) | onto_residual(lora) for lora in (False, True))
    )


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What every layer asks, and half as much to compile."""
    kinds = {"r8-qv": KINDS["r8-qv"]}
    return Reference(tmp_path_factory.mktemp("one-layer"), kinds, num_hidden_layers=1)


@pytest.fixture(scope="module")
def one_layer_with_biases(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("one-layer-with-biases")
    kinds = {name: EXTRA_KINDS[name] for name in ("plain", "dora")}
    return Reference(folder, kinds, num_hidden_layers=1, attention_bias=True, mlp_bias=True)


def test_linears_that_no_adapter_may_target(one_layer: Reference) -> None:
    names = [None, "r8-qv", "r8-qv"]
    options: dict[str, Any] = {"lora_target_modules": ["q_proj", "v_proj"]}
    calls = generated(one_layer, names, enable_lora=True, max_loras=1, **options)
    assert calls == qkv(True) | qkv(False) | gate_up(False) | onto_residual(False)


def test_large_steps_begin_earlier_with_adapters(one_layer: Reference) -> None:
    names = [None, "r8-qv", "r8-qv"]
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2}
    calls = generated(one_layer, names, most_tokens=128, lora_tokens=32, **options)
    assert {call.tokens for call in calls if call.with_lora} == {1, 8, 32, 128}
    assert {call.tokens for call in calls if not call.with_lora} == {8, 128}


def test_small_steps_with_prompts(one_layer: Reference) -> None:
    """An engine of six rows has no decode step of 32."""
    names = [None, "r8-qv", "r8-qv"]
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2}
    calls = generated(one_layer, names, most_tokens=128, sizes=(1, 8, 32), **options)
    assert {call.tokens for call in calls if call.with_lora} == {1, 8, 32, 128}
    assert {call.tokens for call in calls if not call.with_lora} == {8, 32, 128}


def test_the_last_layer_of_a_large_step_goes_on_with_its_rows(one_layer: Reference) -> None:
    """Of the largest of several sizes; here that layer is the only one."""
    names = [None, "r8-qv", None, "r8-qv", "r8-qv"]
    calls = generated(one_layer, names, most_tokens=128, enable_lora=True, max_loras=2)
    every = qkv(True) | qkv(False)
    every = {call._replace(tokens=128) if call.tokens == 64 else call for call in every}
    after_attention = set().union(*(gate_up(lora) | onto_residual(lora) for lora in (False, True)))
    assert calls == every | {call for call in after_attention if call.tokens < 64}


def test_an_engine_without_adapters(one_layer: Reference) -> None:
    calls = generated(one_layer, [None] * 7)
    assert calls == qkv(False) | gate_up(False) | onto_residual(False)


def test_a_bias_before_the_end_and_dora_are_left_to_others(
    one_layer_with_biases: Reference,
) -> None:
    """A step with DoRA in it asks for no linear of this model, of which all have a bias."""
    names = [None, "plain", "dora", "plain", "dora"]
    options: dict[str, Any] = {"lora_extras": ["dora"]}
    calls = generated(one_layer_with_biases, names, enable_lora=True, max_loras=2, **options)
    assert calls == qkv(False) | qkv(True)
