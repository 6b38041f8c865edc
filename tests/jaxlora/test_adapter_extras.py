"""DoRA, biases, and LoRA on embedding and head, through the public API against PEFT."""

from __future__ import annotations

from typing import Any

import pytest

import jaxlora
from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.engine.runner import Runner
from tests.jaxlora.peft_models import EXTRA_KINDS, TIED_KINDS, Reference, prompts

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

CASES = [("extras", name) for name in EXTRA_KINDS] + [("tied", name) for name in TIED_KINDS]


def parts(which: str, request: pytest.FixtureRequest) -> tuple[LLM, Reference]:
    names = (f"{which}_llm", f"{which}_reference")
    llm, reference = (request.getfixturevalue(name) for name in names)
    return llm, reference


def generate(
    llm: LLM, reference: Reference, texts: list[list[int]], names: list[str | None]
) -> list[list[int]]:
    requests = [name and LoRARequest(name, None, reference.paths[name]) for name in names]
    outputs = llm.generate(texts, GREEDY, lora_request=requests, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(("which", "name"), CASES)
def test_alone(which: str, name: str, request: pytest.FixtureRequest) -> None:
    llm, reference = parts(which, request)
    for prompt in prompts(2):
        (got,) = generate(llm, reference, [prompt], [name])
        reference.check_greedy(prompt, got, name)


@pytest.mark.parametrize("which", ["extras", "tied"])
def test_every_row_another_adapter(which: str, request: pytest.FixtureRequest) -> None:
    """Extras beside plain adapters and base rows; every slot held something else before."""
    llm, reference = parts(which, request)
    names = [None, *reference.kinds] * 2
    texts = prompts(len(names), seed=1)
    before = llm.get_metrics()
    together = generate(llm, reference, texts, names)
    for prompt, name, got in zip(texts, names, together, strict=True):
        reference.check_greedy(prompt, got, name)
        assert generate(llm, reference, [prompt], [name]) == [got]
    after = llm.get_metrics()
    evictions = "jaxlora:adapter_evictions_total"
    assert after[evictions] > before[evictions]
    compilations = "jaxlora:compilations_total"
    assert after[compilations] == before[compilations]


@pytest.mark.parametrize("which", ["extras", "tied"])
def test_adapters_change_what_is_generated(which: str, request: pytest.FixtureRequest) -> None:
    llm, reference = parts(which, request)
    (prompt,) = prompts(1, seed=2)
    names = [None, *reference.kinds]
    got = generate(llm, reference, [prompt] * len(names), names)
    assert len({tuple(tokens) for tokens in got}) == len(names)


def test_a_step_without_extras_runs_the_plain_programs(
    extras_llm: LLM, extras_reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = extras_llm.llm_engine._runner
    assert isinstance(runner, Runner)
    used: list[str] = []

    class Recorder(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            used.append(name)
            return super().__getitem__(name)

    (prompt,) = prompts(1)
    for name, word in ((None, ""), ("plain", "lora"), ("dora-some", "extras"), ("plain", "lora")):
        used.clear()
        with monkeypatch.context() as patch:
            patch.setattr(runner, "_programs", Recorder(runner._programs))
            generate(extras_llm, extras_reference, [prompt], [name])
        forward = [program for program in used if program.startswith(("decode", "mixed"))]
        assert forward
        kinds = {program.rpartition(" ")[0].partition(" ")[2] for program in forward}
        assert kinds == {{"": "", "lora": "lora", "extras": "lora extras"}[word]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("embed", r"LoRA on embed_tokens, .* start it with lora_extras=\['embed_tokens'\]"),
        ("bias", r"lm_head and a bias on B .* start it with lora_extras=\['bias', 'lm_head'\]"),
        ("dora", r"DoRA \(use_dora\), .* start it with lora_extras=\['dora'\]"),
    ],
)
def test_an_engine_without_extras_refuses_them_by_the_option(
    name: str, message: str, llm: LLM, extras_reference: Reference
) -> None:
    with pytest.raises(jaxlora.AdapterRefusedError, match=message):
        llm.add_lora(LoRARequest(name, None, extras_reference.paths[name]))
    assert llm.list_loras() == set()


def test_an_engine_without_extras_has_no_programs_or_memory_for_them(llm: LLM) -> None:
    runner = llm.llm_engine._runner
    assert isinstance(runner, Runner)
    assert runner.bank is not None
    assert runner.bank.extras is None
    assert not [name for name in runner._programs if "extras" in name]


def test_options_that_make_no_sense_are_refused(extras_reference: Reference) -> None:
    for extras in ("dora", ["dora", "everything"]):
        with pytest.raises(jaxlora.ConfigError, match=r"lora_extras=.* must be a list of embed_"):
            jaxlora.EngineArgs(model="m", lora_extras=extras)
    with pytest.raises(jaxlora.ConfigError, match=r"lora_extras=\['dora'\] needs enable_lora=True"):
        LLM(extras_reference.base_path, lora_extras=["dora"], skip_tokenizer_init=True)
