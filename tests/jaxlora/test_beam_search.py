"""Beam search through the public API, against transformers' own."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
from typing import Any

import pytest

from jaxlora import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    EngineDeadError,
    LoRARequest,
    RequestError,
    SamplingParams,
)
from jaxlora.adapters.adapter import Adapter
from jaxlora.engine.beam_search import BeamSearch
from jaxlora.errors import AdapterNotFoundError
from jaxlora.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxlora.types import TokensPrompt
from tests.jaxlora.awaited import awaited
from tests.jaxlora.patience import SECONDS
from tests.jaxlora.peft_models import Reference, prompts


@pytest.mark.parametrize("width", [1, 3])
def test_the_sequences_are_those_of_transformers(
    llm: LLM, reference: Reference, width: int
) -> None:
    if width == 1:
        reference.model.generation_config.num_beams = 1
    texts = [prompt[:20] for prompt in prompts(2, seed=7)]
    params = BeamSearchParams(beam_width=width, max_tokens=5, length_penalty=0.0)
    outputs = llm.beam_search(texts, params)
    for prompt, output in zip(texts, outputs, strict=True):
        theirs = reference.beam_search(prompt, None, width, 5)
        assert [beam.tokens for beam in output.sequences] == theirs.sequences.tolist()
        if width > 1:
            scores = theirs.sequences_scores.tolist()
            assert [beam.cum_logprob for beam in output.sequences] == pytest.approx(
                scores, abs=1e-4
            )
        for beam in output.sequences:
            assert (beam.finish_reason, beam.text, len(beam.logprobs)) == ("length", None, 5)
            told = zip(beam.logprobs, beam.tokens[len(prompt) :], strict=True)
            assert beam.cum_logprob == pytest.approx(sum(entry[t].logprob for entry, t in told))


def test_adapters_have_beams_of_their_own(
    llm: LLM, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    (prompt,) = prompts(1, seed=8)
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    request = LoRARequest("r16-all", None, reference.paths["r16-all"])
    base, adapted = llm.beam_search([prompt, prompt], params, lora_request=[None, request])
    # In vLLM's order, with its progress bar.
    alone = llm.beam_search(prompt, params, request, use_tqdm=True)[0]
    assert "Beam search" in capsys.readouterr().err
    assert [beam.tokens for beam in alone.sequences] == [beam.tokens for beam in adapted.sequences]
    assert base.sequences[0].tokens != adapted.sequences[0].tokens
    assert adapted.sequences[0].lora_request == request


def test_a_search_with_a_salt_leaves_nothing_that_others_find(llm: LLM) -> None:
    tokens = [*range(1, 41)]
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    greedy = SamplingParams(temperature=0, max_tokens=1)

    def num_cached(prompt: Any) -> int | None:
        return llm.generate(prompt, greedy, use_tqdm=False)[0].num_cached_tokens

    llm.reset_prefix_cache()
    salted: Any = {"prompt_token_ids": tokens, "cache_salt": "secret"}
    llm.beam_search(salted, params)
    served = AsyncLLM(llm.llm_engine)
    asyncio.run(served.beam_search(salted, params, "a"))
    served.shutdown()
    assert num_cached(tokens) == 0
    assert num_cached(salted) == 32


def test_an_adapter_that_is_loaded_in_place_is_read_once(llm: LLM, reference: Reference) -> None:
    (prompt,) = prompts(1, seed=8)
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    request = LoRARequest("r16-all", None, reference.paths["r16-all"], load_inplace=True)
    before = llm.get_metrics()["jaxlora:adapter_loads_total"]
    (offline,) = llm.beam_search(prompt, params, lora_request=request)
    assert llm.get_metrics()["jaxlora:adapter_loads_total"] == before + 1
    served = AsyncLLM(llm.llm_engine)
    online = asyncio.run(served.beam_search(prompt, params, "a", lora_request=request))
    served.shutdown()
    assert llm.get_metrics()["jaxlora:adapter_loads_total"] == before + 2
    assert [beam.tokens for beam in online.sequences] == [b.tokens for b in offline.sequences]


def test_a_search_ends_with_the_version_it_began_with(llm: LLM, reference: Reference) -> None:
    (prompt,) = prompts(1, seed=8)
    params = BeamSearchParams(beam_width=2, max_tokens=20)
    request = LoRARequest("r16-all", None, reference.paths["r16-all"])
    other = LoRARequest("r16-all", None, reference.paths["patterns"], load_inplace=True)
    (expected,) = llm.beam_search(prompt, params, lora_request=request)
    compilations = llm.get_metrics()["jaxlora:compilations_total"]

    async def tokens_come(served: AsyncLLM) -> None:
        name = "vllm:generation_tokens"
        before = (await served.get_metrics())[name]
        while (await served.get_metrics())[name] == before:
            await asyncio.sleep(0)

    async def main() -> None:
        served = AsyncLLM(llm.llm_engine)
        search = asyncio.create_task(served.beam_search(prompt, params, "a", lora_request=request))
        await tokens_come(served)
        # This event loop does nothing meanwhile, so the search does not end.
        assert served._loop.add_lora(other).result(SECONDS)
        (lora_int_id,) = await served.list_loras()
        gone = asyncio.create_task(served.remove_lora(lora_int_id, wait=True))
        while await served.list_loras():
            pass
        assert not search.done()
        found = await search
        assert await gone
        assert [beam.tokens for beam in found.sequences] == [b.tokens for b in expected.sequences]
        # One that is given up lets go of what it held, and so does one whose engine ends.
        for end in (None, served.shutdown):
            given_up = served.beam_search(prompt, params, "b", lora_request=request)
            search = asyncio.create_task(given_up)
            await tokens_come(served)
            if end is None:
                search.cancel()
            else:
                await asyncio.to_thread(end)
            (error,) = await asyncio.gather(search, return_exceptions=True)
            assert isinstance(error, EngineDeadError if end else asyncio.CancelledError)

    asyncio.run(main())
    registry = llm.llm_engine.adapters
    assert not registry._held
    assert llm.get_metrics()["jaxlora:compilations_total"] == compilations


@awaited
async def test_what_a_search_loads_in_place_is_what_it_begins_with(
    llm: LLM, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts(1, seed=8)
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    mine, other = (
        LoRARequest("a", None, reference.paths[name], load_inplace=True)
        for name in ("r16-all", "patterns")
    )
    (expected,) = llm.beam_search(prompt, params, lora_request=mine)
    llm.add_lora(other)
    may_read, reader = threading.Event(), llm.llm_engine.adapters.reader
    load = reader._load

    def wait_and_load(request: LoRARequest) -> Adapter:
        assert may_read.wait(SECONDS)
        return load(request)

    monkeypatch.setattr(reader, "_load", wait_and_load)
    served = AsyncLLM(llm.llm_engine)
    search = asyncio.create_task(served.beam_search(prompt, params, "a", lora_request=mine))
    while not served._loop._waiting:
        await asyncio.sleep(0)
    added = served._loop.add_lora(other)
    may_read.set()
    # Nobody here runs until the other one is in its place.
    assert added.result(SECONDS)
    found = await search
    assert [beam.tokens for beam in found.sequences] == [b.tokens for b in expected.sequences]
    assert found.sequences[0].lora_request == dataclasses.replace(mine, load_inplace=False)
    served.shutdown()


def test_what_ends_a_step_ends_the_search() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    search = BeamSearch([TokensPrompt(prompt_token_ids=[1, 2])], params, (), 32)
    ended = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error", logprobs=[])
    output = RequestOutput(
        request_id="0",
        prompt=None,
        prompt_token_ids=[1, 2],
        outputs=[ended],
        finished=True,
        metrics=RequestMetrics(arrival_time=0.0),
        error=AdapterNotFoundError("its folder is gone"),
    )
    with pytest.raises(AdapterNotFoundError, match="its folder is gone"):
        search.take([output])


def test_an_end_ends_a_beam(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = prompts(1, seed=3)
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    best = llm.beam_search(prompt, params)[0].sequences[0].tokens
    eos = best[len(prompt)]
    monkeypatch.setattr(llm.llm_engine._intake, "eos_token_ids", frozenset([eos]))
    sequences = llm.beam_search(prompt, params)[0].sequences
    # It is the likeliest, being the shortest.
    assert sequences[0].tokens == best[: len(prompt) + 1]
    for beam in sequences:
        ends = [at for at, token in enumerate(beam.tokens[len(prompt) :]) if token == eos]
        assert (beam.finish_reason == "stop") is bool(ends)
        assert ends in ([], [len(beam.tokens) - len(prompt) - 1])
    ignoring = BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
    assert llm.beam_search(prompt, ignoring)[0].sequences[0].tokens == best


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"beam_width": 0}, "beam_width=0 must be in [1, 10]"),
        ({"beam_width": 11}, "beam_width=11 must be in [1, 10]"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": 2.5}, "temperature=2.5 must be in [0, 2]"),
        ({"length_penalty": float("inf")}, "length_penalty=inf must be in [-50, 50]"),
        ({"length_penalty": 1e308}, "length_penalty=1e+308 must be in [-50, 50]"),
        ({"length_penalty": 10**400}, "must be in [-50, 50]"),
    ],
)
def test_what_is_out_of_range_is_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BeamSearchParams(**({"beam_width": 2, "max_tokens": 3} | params))


def test_what_cannot_fit_is_refused(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=250)
    with pytest.raises(
        RequestError, match=r"7 tokens, which with max_tokens=250 .*max_model_len=256"
    ):
        llm.beam_search([[1] * 7], params)
