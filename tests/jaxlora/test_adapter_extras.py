"""DoRA, biases, and LoRA on embedding and head, through the public API against PEFT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jaxlora
from jaxlora import LLM, LoRARequest, SamplingParams
from jaxlora.engine.runner import Runner
from tests.jaxlora.peft_models import (
    EXTRA_KINDS,
    SAVED_KINDS,
    TIED_KINDS,
    TIED_SAVED_KINDS,
    TIED_TOKEN_KINDS,
    TOKEN_KINDS,
    Reference,
    prompts,
)
from tests.jaxlora.small_pieces import PIECE_BYTES

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

BASES = ["extras", "tied"]
KINDS: dict[str, dict[str, str]] = {
    "extras": dict.fromkeys(EXTRA_KINDS, "extras")
    | dict.fromkeys(SAVED_KINDS, "saved")
    | dict.fromkeys(TOKEN_KINDS, "tokens"),
    "tied": dict.fromkeys(TIED_KINDS, "tied")
    | dict.fromkeys(TIED_SAVED_KINDS, "tied_saved")
    | dict.fromkeys(TIED_TOKEN_KINDS, "tied_tokens"),
}
"""By base: adapter name -> the reference that has it."""


class Side:
    """An engine, and for each adapter a PEFT model on the same base."""

    def __init__(self, base: str, request: pytest.FixtureRequest) -> None:
        self.llm: LLM = request.getfixturevalue(f"{base}_llm")
        self.names = [None, *KINDS[base]]
        self.references: dict[str | None, Reference] = {
            name: request.getfixturevalue(f"{which}_reference")
            for name, which in KINDS[base].items()
        }
        self.references[None] = request.getfixturevalue(f"{base}_reference")

    def generate(self, texts: list[list[int]], names: list[str | None]) -> list[list[int]]:
        requests = [
            LoRARequest(name, None, self.references[name].paths[name]) if name else None
            for name in names
        ]
        outputs = self.llm.generate(texts, GREEDY, lora_request=requests, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    def check(self, prompt: list[int], got: list[int], name: str | None) -> None:
        self.references[name].check_greedy(prompt, got, name)


@pytest.fixture
def side(request: pytest.FixtureRequest) -> Side:
    return Side(request.param, request)


@pytest.mark.parametrize(
    ("side", "name"),
    [(base, name) for base in BASES for name in KINDS[base]],
    indirect=["side"],
)
def test_alone(side: Side, name: str) -> None:
    for prompt in prompts(2):
        (got,) = side.generate([prompt], [name])
        side.check(prompt, got, name)


@pytest.mark.parametrize(("side", "name"), [("extras", "saved-both-dora")], indirect=["side"])
def test_large_matrices_are_sent_in_pieces(side: Side, name: str) -> None:
    """The other tests say that they are put together again."""
    engine = side.llm.llm_engine
    bank = engine._runner.bank  # type: ignore[attr-defined]
    path = side.references[name].paths[name]
    adapter = engine.adapters.read(LoRARequest(name, None, path))
    staged = bank.stage(adapter).extras
    assert set(adapter.matrices) == {"embed", "lm_head"}
    for target, matrix in adapter.matrices.items():
        pieces = [np.asarray(piece) for piece in staged.matrices[target]]
        assert max(piece.nbytes for piece in pieces) <= PIECE_BYTES
        np.testing.assert_array_equal(np.concatenate(pieces), matrix.reshape(-1))


@pytest.mark.parametrize("side", BASES, indirect=True)
def test_every_row_another_adapter(side: Side) -> None:
    """Extras beside plain adapters and base rows; every slot held something else before."""
    names = side.names * 2
    texts = prompts(len(names), seed=1)
    before = side.llm.get_metrics()
    together = side.generate(texts, names)
    for prompt, name, got in zip(texts, names, together, strict=True):
        side.check(prompt, got, name)
        assert side.generate([prompt], [name]) == [got]
    after = side.llm.get_metrics()
    evictions = "jaxlora:adapter_evictions_total"
    assert after[evictions] > before[evictions]
    compilations = "jaxlora:compilations_total"
    assert after[compilations] == before[compilations]


@pytest.mark.parametrize("side", BASES, indirect=True)
def test_adapters_change_what_is_generated(side: Side) -> None:
    (prompt,) = prompts(1, seed=2)
    got = side.generate([prompt] * len(side.names), side.names)
    assert len({tuple(tokens) for tokens in got}) == len(side.names)


@pytest.mark.parametrize("side", ["extras"], indirect=True)
def test_a_step_without_extras_runs_the_plain_programs(
    side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = side.llm.llm_engine._runner
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
            side.generate([prompt], [name])
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
