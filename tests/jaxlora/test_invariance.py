"""A request's tokens are its own: the same alone, in a crowd, preempted, cached, in any chunks and
slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from jaxlora import LLM, LoRARequest, RequestError, SamplingParams
from tests.jaxlora.peft_models import KINDS, SIZES, Reference

NAMES = [None, *list(KINDS)[:3]]
MAX_LEN = SIZES["max_position_embeddings"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One request, with an adapter by name."""

    prompt: tuple[int, ...]
    params: SamplingParams
    name: str | None


def cases() -> list[Case]:
    """Short prompts and long, greedy and by seeds, under adapters and none."""
    random = np.random.default_rng(8)
    made = []
    for i, length in enumerate((1, 3, 17, 40, 64, 65, 100, 130)):
        params = SamplingParams(
            temperature=0.0 if i % 2 else 1.0, seed=i, max_tokens=30, ignore_eos=True
        )
        prompt = random.integers(0, SIZES["vocab_size"], length)
        made.append(Case(tuple(prompt.tolist()), params, NAMES[i % len(NAMES)]))
    return made


CASES = cases()


def tokens_of(llm: LLM, reference: Reference, some: Sequence[Case]) -> list[list[int]]:
    """What an engine says to all of them at once."""
    loras = [
        None if case.name is None else LoRARequest(case.name, None, reference.paths[case.name])
        for case in some
    ]
    prompts = [list(case.prompt) for case in some]
    outputs = llm.generate(
        prompts, [case.params for case in some], lora_request=loras, use_tqdm=False
    )
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(shared_llm: LLM, reference: Reference) -> list[list[int]]:
    """Each by itself, with nothing in the prefix cache."""
    said = []
    for case in CASES:
        shared_llm.reset_prefix_cache()
        said += tokens_of(shared_llm, reference, [case])
    return said


def test_in_a_crowd_preempted_and_resumed(
    llm: LLM, reference: Reference, alone: list[list[int]]
) -> None:
    llm.reset_prefix_cache()
    before = llm.get_metrics()["vllm:num_preemptions"]
    assert tokens_of(llm, reference, CASES) == alone
    assert tokens_of(llm, reference, CASES[::-1]) == alone[::-1]
    assert llm.get_metrics()["vllm:num_preemptions"] > before


def test_with_its_prompt_in_the_cache(
    llm: LLM, reference: Reference, alone: list[list[int]]
) -> None:
    for case, expected in zip(CASES, alone, strict=True):
        tokens_of(llm, reference, [case])
        hits = llm.get_metrics()["vllm:prefix_cache_hits"]
        assert tokens_of(llm, reference, [case]) == [expected]
        cached = llm.get_metrics()["vllm:prefix_cache_hits"] - hits
        assert cached == (len(case.prompt) - 1) // 16 * 16


def test_in_any_slot(llm: LLM, reference: Reference, alone: list[list[int]]) -> None:
    with_adapters = [i for i, case in enumerate(CASES) if case.name]
    slots: dict[str, set[int]] = {}
    for turn in range(len(with_adapters)):
        for lora_int_id in llm.list_loras():
            llm.remove_lora(lora_int_id)
        # The order in which they come is the order of their slots.
        order = [*with_adapters[turn:], *with_adapters[:turn]]
        said = tokens_of(llm, reference, [CASES[i] for i in order])
        assert said == [alone[i] for i in order]
        registry = llm.llm_engine.adapters
        for slot, name in registry.residents().items():
            slots.setdefault(name, set()).add(slot)
    assert all(len(each) > 1 for each in slots.values())


def test_as_one_of_several_completions(
    llm: LLM, reference: Reference, alone: list[list[int]]
) -> None:
    for case, expected in zip(CASES, alone, strict=True):
        if case.params.greedy:
            continue
        lora = case.name and LoRARequest(case.name, None, reference.paths[case.name])
        seed = (case.params.seed or 0) - 2
        many = dataclasses.replace(case.params, n=3, seed=seed)
        (output,) = llm.generate(
            [list(case.prompt)], many, lora_request=lora or None, use_tqdm=False
        )
        assert output.outputs[2].token_ids == expected


def test_in_chunks_and_pages_of_another_size_and_without_a_prefix_cache(
    reference: Reference, alone: list[list[int]]
) -> None:
    # Steps with prompts are padded to 32 tokens or 128.
    llm = LLM(
        reference.base_path,
        dtype="float32",
        enable_lora=True,
        max_loras=2,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        block_size=4,
        num_gpu_blocks_override=80,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        use_tqdm=False,
    )
    assert tokens_of(llm, reference, CASES) == alone


def test_up_to_the_models_length(llm: LLM) -> None:
    random = np.random.default_rng(1)
    for length in (MAX_LEN - 1, MAX_LEN - 20):
        prompt = random.integers(0, SIZES["vocab_size"], length).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == MAX_LEN - length
        assert output.outputs[0].finish_reason == "length"
    with pytest.raises(RequestError, match=rf"has {MAX_LEN} tokens.*max_model_len={MAX_LEN}"):
        llm.generate([[1] * MAX_LEN], params, use_tqdm=False)
