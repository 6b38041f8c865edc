"""The engine over a simulated device: run-ahead, ends of completions, refusals, failures."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.sampling import OVERFLOWED
from jaxlora.engine.scheduler import Plan
from jaxlora.errors import (
    AdapterCapacityError,
    AdapterNotFoundError,
    GenerationError,
    RequestError,
)
from jaxlora.interrupts import uninterrupted
from jaxlora.outputs import RequestOutput
from jaxlora.structured_outputs import StructuredOutputsParams
from jaxlora.tokenizer import Detokenizer
from jaxlora.types import LoRARequest, RequestOutputKind, SamplingParams
from tests.jaxlora.engine.simulator import (
    EOS,
    GRAMMARS,
    VOCAB_SIZE,
    PieceDetokenizer,
    PieceTokenizer,
    check_nothing_is_held,
    complete,
    make_adapter,
    make_engine,
    run,
    saying,
)

LETTERS = PieceTokenizer(*"abcdefghijkl", "ab", "cd", "~")
PROMPT = [1]


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, **params)


def say(pieces: list[str], **params: Any) -> tuple[RequestOutput, LLMEngine]:
    """Runs one request to which the model answers these pieces."""
    answer = [LETTERS.pieces.index(piece) for piece in pieces]
    engine, _ = make_engine(model=saying(*answer), tokenizer=LETTERS)
    engine.add_request("r", PROMPT, greedy(**params))
    output = run(engine)["r"]
    check_nothing_is_held(engine)
    return output, engine


# Running ahead


def test_a_step_is_dispatched_before_the_last_one_is_read() -> None:
    engine, device = make_engine()
    engine.add_request("a", [1, 2], greedy(max_tokens=5, ignore_eos=True))
    run(engine)
    assert device.events == [
        ("run", 0),
        *[("run", 1), ("read", 0)],
        *[("run", 2), ("read", 1)],
        *[("run", 3), ("read", 2)],
        *[("run", 4), ("read", 3)],
        ("read", 4),
    ]


def test_requests_may_join_and_leave_while_steps_run_ahead() -> None:
    engine, device = make_engine()
    for i in range(6):
        engine.add_request(str(i), [1, i + 1], greedy(max_tokens=i + 3, ignore_eos=True))
        engine.step()
    run(engine)
    dispatched = {n: at for at, (what, n) in enumerate(device.events) if what == "run"}
    read = {n: at for at, (what, n) in enumerate(device.events) if what == "read"}
    last = len(device.plans) - 1
    assert all(dispatched[n + 1] < read[n] for n in range(last))
    assert list(read) == list(range(last + 1))


def test_the_token_of_a_step_too_many_is_dropped() -> None:
    engine, device = make_engine(model=saying(3, 4))
    engine.add_request("a", PROMPT, greedy())
    outputs = run(engine)
    assert outputs["a"].outputs[0].token_ids == [3, 4, EOS]
    # The third step yields EOS, which is not known before the fourth is under way.
    assert [len(plan.rows) for plan in device.plans] == [1, 1, 1, 1]
    assert device.events[-1] == ("read", 3)
    assert engine.get_metrics()["vllm:generation_tokens"] == 3
    check_nothing_is_held(engine)


def test_no_step_is_too_many_when_the_end_is_known() -> None:
    engine, device = make_engine(model=saying(3, 4, 5, 6))
    engine.add_request("a", PROMPT, greedy(max_tokens=3))
    run(engine)
    assert len(device.plans) == 3


def test_what_a_finished_request_held_is_used_by_the_next_at_once() -> None:
    engine, device = make_engine(max_num_seqs=1)
    engine.add_request("a", [1, 2], greedy())
    engine.add_request("b", [3], greedy(max_tokens=4))
    outputs = run(engine)
    for name, prompt, params in (("a", [1, 2], greedy()), ("b", [3], greedy(max_tokens=4))):
        assert outputs[name].outputs[0].token_ids == complete(prompt, params, max_model_len=32)
    names = [row.sequence.request_id for plan in device.plans for row in plan.rows]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("most", "asked", "refused"),
    [
        (20, 20, False),
        (20, 21, True),
        (20, -1, True),
        (0, 0, False),
        (0, 1, True),
        (-1, -1, False),
        (-1, 9999, False),
    ],
)
@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_the_engine_says_how_many_logprobs_may_be_asked_for(
    name: str, most: int, asked: int, refused: bool
) -> None:
    engine, _ = make_engine(max_logprobs=most)
    params = SamplingParams(**{name: asked})
    if not refused:
        engine.add_request("a", PROMPT, params)
        return
    with pytest.raises(RequestError, match=rf"^{name}={asked} .*is more than max_logprobs={most};"):
        engine.add_request("a", PROMPT, params)


# Text that cannot be made


class BreakingTokenizer(PieceTokenizer):
    """Has no text for "l", and says so by raising, when it is pushed or only when flushed."""

    def __init__(self, *, held: bool = False) -> None:
        super().__init__(*"abcdefghijkl")
        self._held_ones = held

    def stream(self, **options: Any) -> Detokenizer:
        del options
        return BreakingDetokenizer(self.pieces, self._held_ones)


class BreakingDetokenizer(PieceDetokenizer):
    def __init__(self, pieces: tuple[str, ...], held: bool) -> None:
        super().__init__(pieces)
        self._is_held, self._broken = held, False

    def push(self, token_ids: Sequence[int]) -> str:
        if "l" in [self._pieces[i] for i in token_ids]:
            if not self._is_held:
                raise UnicodeError("no text")
            self._broken = True
        return super().push(token_ids)

    def flush(self) -> str:
        if self._broken:
            raise UnicodeError("no text")
        return super().flush()


def test_what_overflows_ends_its_own_request() -> None:
    engine, _ = make_engine(model=saying(3, OVERFLOWED, 4), grammars=GRAMMARS)
    engine.add_request("greedy", PROMPT, greedy())
    engine.add_request("n", PROMPT, SamplingParams(n=2, seed=0, top_k=5))
    letters = StructuredOutputsParams(regex="[a-h]{2,9}")
    engine.add_request("constrained", PROMPT, greedy(structured_outputs=letters))
    engine.add_request("short", PROMPT, greedy(max_tokens=1))
    outputs = run(engine)
    for name in ("greedy", "n", "constrained"):
        assert {c.finish_reason for c in outputs[name].outputs} == {"error"}
        assert isinstance(outputs[name].error, GenerationError)
        assert "after 2 tokens the scores of the next one are NaN" in str(outputs[name].error)
    # What was there before is told.
    assert outputs["greedy"].outputs[0].token_ids == [3]
    assert outputs["short"].outputs[0].finish_reason == "length"
    check_nothing_is_held(engine)


@pytest.mark.parametrize("held", [False, True])
def test_a_token_without_text_ends_its_own_request(held: bool) -> None:
    tokenizer = BreakingTokenizer(held=held)
    bad = tokenizer.pieces.index("l")
    engine, _ = make_engine(model=saying(3, bad, 4), tokenizer=tokenizer)
    engine.add_request("broken", PROMPT, greedy())
    engine.add_request("twice", PROMPT, SamplingParams(n=2, seed=0))
    engine.add_request("ids", PROMPT, greedy(detokenize=False))
    engine.add_request("short", PROMPT, greedy(max_tokens=1))
    outputs = run(engine)
    for name in ("broken", "twice"):
        assert {c.finish_reason for c in outputs[name].outputs} == {"error"}
        assert isinstance(outputs[name].error, GenerationError)
        assert f"token {bad} could not be turned into text" in str(outputs[name].error)
    # What was there before is told.
    assert outputs["broken"].outputs[0].text == "c"
    assert outputs["ids"].outputs[0].token_ids == [3, bad, 4, EOS]
    assert outputs["short"].outputs[0].text == "c"
    check_nothing_is_held(engine)


class TailTokenizer(PieceTokenizer):
    """Raises at the end of a text that ends with "~", which waits for more."""

    def stream(self, **options: Any) -> Detokenizer:
        del options
        return TailDetokenizer(self.pieces)


class TailDetokenizer(PieceDetokenizer):
    def flush(self) -> str:
        if self._held.endswith("~"):
            raise UnicodeError("no text")
        return super().flush()


@pytest.mark.parametrize("params", [{}, {"max_tokens": 3}, {"stop_token_ids": [4]}])
def test_an_end_without_text_ends_its_own_request(params: dict[str, Any]) -> None:
    """When it is known already why the completion ends."""
    tokenizer = TailTokenizer("a", "b", "~", "c")
    engine, _ = make_engine(model=saying(3, 4, 3), tokenizer=tokenizer)
    engine.add_request("broken", PROMPT, greedy(**params))
    engine.add_request("ids", PROMPT, greedy(detokenize=False))
    # More steps than the broken one had, and a later user of its row.
    outputs = run(engine)
    engine.add_request("later", PROMPT, greedy(detokenize=False))
    outputs |= run(engine)
    assert outputs["broken"].outputs[0].finish_reason == "error"
    assert "could not be turned into text" in str(outputs["broken"].error)
    for name in ("ids", "later"):
        assert outputs[name].outputs[0].token_ids == [3, 4, 3, EOS]
    check_nothing_is_held(engine)


# How completions end


@pytest.mark.parametrize(
    ("params", "tokens", "text", "finish_reason", "stop_reason"),
    [
        ({}, [2, 3, 4, EOS], "bcd", "stop", None),
        ({"ignore_eos": True, "max_tokens": 5}, [2, 3, 4, EOS, EOS], "bcd", "length", None),
        ({"max_tokens": 2}, [2, 3], "bc", "length", None),
        ({"max_tokens": 4}, [2, 3, 4, EOS], "bcd", "stop", None),
        ({"stop_token_ids": [5, 3]}, [2, 3], "b", "stop", 3),
        ({"stop_token_ids": [3], "include_stop_str_in_output": True}, [2, 3], "bc", "stop", 3),
        ({"stop_token_ids": [3], "min_tokens": 1}, [2, 3], "b", "stop", 3),
        # Held back, the simulated model takes its next choice, the lowest id.
        ({"stop_token_ids": [3], "min_tokens": 2}, [2, 1, 4, EOS], "bad", "stop", None),
        ({"min_tokens": 5, "max_tokens": 6}, [2, 3, 4, 1, 1, EOS], "bcdaa", "stop", None),
        ({"detokenize": False}, [2, 3, 4, EOS], "", "stop", None),
    ],
)
def test_a_completion_ends(
    params: dict[str, Any],
    tokens: list[int],
    text: str,
    finish_reason: str,
    stop_reason: int | str | None,
) -> None:
    output, _ = say(["b", "c", "d"], **params)
    (completion,) = output.outputs
    assert completion.token_ids == tokens
    assert completion.text == text
    assert completion.finish_reason == finish_reason
    assert completion.stop_reason == stop_reason
    assert output.finished


@pytest.mark.parametrize(
    ("pieces", "params", "text", "stop_reason", "num_tokens"),
    [
        (["a", "b", "c"], {"stop": "b"}, "a", "b", 2),
        (["a", "b", "c"], {"stop": ["c", "b"]}, "a", "b", 2),
        (["a", "b", "c"], {"stop": "b", "include_stop_str_in_output": True}, "ab", "b", 2),
        # Across tokens, and in the middle of one.
        (["a", "b", "cd", "e"], {"stop": "bc"}, "a", "bc", 3),
        (["a", "b", "cd", "e"], {"stop": "bc", "include_stop_str_in_output": True}, "abc", "bc", 3),
        (["e", "f", "ab", "g"], {"stop": "efab"}, "", "efab", 3),
        # The first of two, and a false start before the true one.
        (["e", "ab", "cd"], {"stop": ["b", "a"]}, "e", "a", 2),
        (["a", "a", "b", "c"], {"stop": "aab"}, "", "aab", 3),
        (["ab", "ab", "c"], {"stop": "abc"}, "ab", "abc", 3),
        # Text that the detokenizer held until the end completes it.
        (["a", "~"], {"stop": "a~"}, "", "a~", 3),
        # Not before min_tokens, but later, or across its edge.
        (["a", "b", "a", "b"], {"stop": "a", "min_tokens": 2}, "ab", "a", 3),
        (["a", "b", "c"], {"stop": "ab", "min_tokens": 2}, "", "ab", 2),
        (["a", "b", "c"], {"stop": "ab", "min_tokens": 3}, "abc", None, 4),
        # At the last token that max_tokens allows.
        (["a", "b", "c"], {"stop": "b", "max_tokens": 2}, "a", "b", 2),
        (["a", "b", "c"], {"stop": "bd"}, "abc", None, 4),
    ],
)
def test_stop_strings(
    pieces: list[str],
    params: dict[str, Any],
    text: str,
    stop_reason: str | None,
    num_tokens: int,
) -> None:
    output, _ = say(pieces, **params)
    (completion,) = output.outputs
    assert completion.text == text
    assert completion.stop_reason == stop_reason
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) == num_tokens


@pytest.mark.parametrize(
    ("pieces", "params", "texts"),
    [
        (["e", "a", "b", "a", "ab", "cd"], {"stop": ["abd", "abc"]}, "e e e eab eaba eaba"),
        (["a", "a", "b"], {"stop": "aab"}, "- - -"),
        (["a", "a", "c"], {"stop": "aab"}, "- - aac aac"),
        (["a", "b", "c"], {"stop": "ab", "min_tokens": 3}, "- ab abc abc"),
        (["a", "b"], {"stop": "ab", "include_stop_str_in_output": True}, "a ab"),
    ],
)
def test_text_that_was_shown_is_never_taken_back(
    pieces: list[str], params: dict[str, Any], texts: str
) -> None:
    answer = [LETTERS.pieces.index(piece) for piece in pieces]
    engine, _ = make_engine(model=saying(*answer), tokenizer=LETTERS)
    engine.add_request("r", PROMPT, greedy(**params))
    seen = []
    while engine.has_unfinished_requests():
        seen += [output.outputs[0].text or "-" for output in engine.step()]
    assert seen == texts.split()


def test_max_tokens_none_goes_on_to_the_models_length() -> None:
    engine, _ = make_engine(max_model_len=10)
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=None, ignore_eos=True))
    engine.add_request("b", [1, 2, 3], greedy(max_tokens=20, ignore_eos=True))
    for output in run(engine).values():
        assert len(output.outputs[0].token_ids) == 7
        assert output.outputs[0].finish_reason == "length"


def test_seeds_decide_and_unseeded_requests_differ() -> None:
    def texts(seed: int, seeds: list[int | None]) -> list[list[int]]:
        engine, _ = make_engine(seed=seed)
        for i, each in enumerate(seeds):
            params = SamplingParams(seed=each, max_tokens=12, ignore_eos=True)
            engine.add_request(str(i), [1], params)
        outputs = run(engine)
        return [outputs[str(i)].outputs[0].token_ids for i in range(len(seeds))]

    seeds = [7, 7, -2, 2**64 - 2, None, -1]  # -1 is none, as in vLLM
    first = texts(0, seeds)
    assert first[0] == first[1] != first[2]
    assert first[2] == first[3]  # seeds are 64 bits, signed or not
    assert first[4] != first[5]
    assert texts(0, seeds) == first
    assert texts(1, seeds)[:4] == first[:4]
    assert texts(1, seeds)[4:] != first[4:]


# Requests and outputs


def test_prompts_are_text_or_ids() -> None:
    engine, _ = make_engine(tokenizer=LETTERS, max_num_seqs=8)
    for i, prompt in enumerate(("bc", [2, 3], {"prompt": "bc"}, {"prompt_token_ids": [2, 3]})):
        engine.add_request(str(i), prompt, greedy(max_tokens=3))
    outputs = list(run(engine).values())
    assert {output.prompt for output in outputs} == {"bc", None}
    assert all(output.prompt_token_ids == [2, 3] for output in outputs)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1


def test_fields_of_an_output() -> None:
    engine, _ = make_engine(tokenizer=LETTERS, max_loras=1, model=saying(2, 3))
    request = LoRARequest("x", 3)
    engine.add_request("r", "a", greedy(max_tokens=2), request)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    first, last = outputs
    for output, tokens, text in ((first, [2], "b"), (last, [2, 3], "bc")):
        assert (output.request_id, output.prompt) == ("r", "a")
        assert output.prompt_token_ids == [1]
        assert output.lora_request is request
        assert output.finished is (output is last)
        (completion,) = output.outputs
        assert completion.index == 0
        assert completion.lora_request is request
        assert (completion.token_ids, completion.text) == (tokens, text)
    assert first.outputs[0].finish_reason is None
    times = last.metrics
    assert times.first_scheduled_time is not None
    assert times.first_token_time is not None
    assert times.finished_time is not None
    assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time
    assert times.first_token_time <= times.finished_time


def test_sampling_parameters_default_to_the_models() -> None:
    engine, _ = make_engine(generation_defaults={"temperature": 0.0, "top_k": 7})
    assert engine.get_default_sampling_params() == greedy(top_k=7)
    engine.add_request("a", [1, 2])
    assert run(engine)["a"].outputs[0].token_ids == complete([1, 2], greedy(), max_model_len=32)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 8, {}, "the prompt has 8 tokens.*max_model_len=8"),
        ([1] * 9, {}, "the prompt has 9 tokens.*max_model_len=8"),
        ([1, VOCAB_SIZE], {}, "prompt token 16 is outside the vocabulary of 16 ids"),
        ([-1], {}, "prompt token -1 is outside the vocabulary of 16 ids"),
        ([1], {"stop_token_ids": [2, 16]}, "stop_token_ids 16 is outside the vocabulary of 16"),
        ("a", {}, "no tokenizer: give prompt_token_ids"),
        ({"prompt": "a"}, {}, "no tokenizer: give prompt_token_ids"),
        ({"text": "a"}, {}, r"keys \['text'\], it needs 'prompt' or 'prompt_token_ids'"),
        ([1], {"stop": "a"}, "stop strings need a tokenizer; use stop_token_ids"),
    ],
)
def test_what_can_never_run_is_refused(prompt: Any, params: dict[str, Any], message: str) -> None:
    engine, _ = make_engine(max_model_len=8)
    with pytest.raises(RequestError, match=message):
        engine.add_request("a", prompt, greedy(**params))
    check_nothing_is_held(engine)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1.5, 2], r"a text or a list of token ids, got \[1.5, 2\]: 'float' object"),
        ({"prompt_token_ids": [None]}, r"a list of token ids, got \[None\]: 'NoneType' object"),
        (5, "a text or a list of token ids, got 5: 'int' object is not iterable"),
        (b"ab", "a list of token ids, got b'ab': text in bytes must be decoded"),
    ],
)
@pytest.mark.usefixtures("without_types")
def test_a_prompt_that_is_none_is_refused(prompt: Any, message: str) -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match=message):
        engine.add_request("a", prompt, greedy())
    check_nothing_is_held(engine)


@pytest.mark.usefixtures("without_types")
def test_ids_of_a_prompt_may_be_numpys() -> None:
    engine, _ = make_engine()
    prompt: Any = {"prompt_token_ids": np.arange(1, 4)}
    engine.add_request("a", prompt, greedy())
    output = run(engine)["a"]
    assert output.prompt_token_ids == [1, 2, 3]
    assert output.outputs[0].token_ids == complete([1, 2, 3], greedy(), max_model_len=32)


@pytest.mark.parametrize("request_id", [7, None, ("a",)])
@pytest.mark.usefixtures("without_types")
def test_an_id_that_is_no_text_is_refused(request_id: Any) -> None:
    engine, _ = make_engine()
    with pytest.raises(ValueError, match="must be a text") as refused:
        engine.add_request(request_id, [1, 2], greedy())
    assert f"request_id={request_id!r}" in str(refused.value)
    check_nothing_is_held(engine)


@pytest.mark.parametrize("priority", ["high", None, 0.5])
@pytest.mark.usefixtures("without_types")
def test_a_priority_that_is_no_integer_is_refused(priority: Any) -> None:
    engine, _ = make_engine()
    engine.add_request("a", [1, 2], greedy(max_tokens=3))
    with pytest.raises(ValueError, match=f"priority={priority!r} must be an integer"):
        engine.add_request("b", [1, 2], greedy(), priority=priority)
    assert set(run(engine)) == {"a"}
    check_nothing_is_held(engine)


def test_the_longest_prompt_that_leaves_room_runs() -> None:
    engine, _ = make_engine(max_model_len=8)
    engine.add_request("a", [1] * 7, greedy(ignore_eos=True))
    assert len(run(engine)["a"].outputs[0].token_ids) == 1


def test_a_request_id_is_free_again_once_its_request_ended() -> None:
    engine, _ = make_engine()
    engine.add_request("a", [1, 2], greedy())
    with pytest.raises(ValueError, match="request_id 'a' is in use by an unfinished request"):
        engine.add_request("a", [1, 2], greedy())
    engine.step()
    engine.abort_request("a")
    # The aborted request's step is still under way; its tokens are not the new one's.
    engine.add_request("a", [3], greedy())
    assert run(engine)["a"].outputs[0].token_ids == complete([3], greedy(), max_model_len=32)
    engine.add_request("a", [1, 2], greedy())
    run(engine)


def test_aborting() -> None:
    engine, _ = make_engine()
    for name in "abc":
        engine.add_request(name, [1, 2], greedy(ignore_eos=True))
    engine.step()
    engine.abort_request(["a", "b", "nobody"])
    engine.abort_request("a")
    outputs = run(engine)
    assert list(outputs) == ["c"]
    engine.abort_request("c")
    check_nothing_is_held(engine)


def test_metrics() -> None:
    engine, _ = make_engine(max_num_seqs=2, max_loras=1, num_pages=10)
    for i, name in enumerate("xyx"):
        engine.add_request(str(i), [1, 2], greedy(max_tokens=3, ignore_eos=True), LoRARequest(name))
    engine.step()
    metrics = engine.get_metrics()
    assert metrics.pop("jaxlora:adapter_load_seconds_total") > 0
    assert metrics == {
        "vllm:num_requests_running": 2,
        "vllm:num_requests_waiting": 1,
        "vllm:kv_cache_usage_perc": pytest.approx(0.2),
        "vllm:prefix_cache_queries": 4,
        "vllm:prefix_cache_hits": 0,
        "vllm:num_preemptions": 0,
        "vllm:prompt_tokens": 6,
        "vllm:generation_tokens": 0,
        "vllm:inter_token_latency_seconds_count": 0,
        "vllm:inter_token_latency_seconds_sum": 0,
        "jaxlora:adapters_registered": 2,
        "jaxlora:adapters_resident": 1,
        "jaxlora:adapter_evictions_total": 0,
        "jaxlora:adapters_on_host": 2,
        "jaxlora:adapter_host_bytes": 2 * make_adapter("x").num_bytes,
        "jaxlora:adapter_staged_bytes": 1,
        "jaxlora:adapter_writes_total": 1,
        "jaxlora:adapter_loads_total": 2,
    }
    run(engine)
    metrics = engine.get_metrics()
    assert metrics["vllm:generation_tokens"] == 9
    assert metrics["vllm:inter_token_latency_seconds_count"] == 6
    assert metrics["vllm:kv_cache_usage_perc"] == 0
    # y waits for the slot that x, asked for before and after it, has.
    assert metrics["jaxlora:adapter_evictions_total"] == 1
    assert "jaxlora:adapters_resident" not in make_engine()[0].get_metrics()


def test_the_time_between_tokens_is_noted_for_every_completion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Streamed or not, one of several or alone, preempted or not; each step takes 2 s here."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    engine, _ = make_engine(num_pages=5)
    for name, params in (
        ("two", SamplingParams(n=2, seed=0, max_tokens=12, ignore_eos=True)),
        ("final", greedy(max_tokens=5, output_kind=RequestOutputKind.FINAL_ONLY, ignore_eos=True)),
        ("one", greedy(max_tokens=1)),
    ):
        engine.add_request(name, PROMPT, params)
    while engine.has_unfinished_requests():
        engine.step()
        now += 2.0
    assert engine.get_metrics()["vllm:num_preemptions"] > 0
    histogram = engine.get_histograms()["vllm:inter_token_latency_seconds"]
    assert histogram.count == 2 * 11 + 4
    assert histogram.counts[histogram.bounds.index(2.5)] >= 20
    # Nobody waits while its tokens come, but who was preempted.
    assert histogram.sum > 2.0 * histogram.count
    copied = histogram.copy()
    engine.add_request("more", PROMPT, greedy(max_tokens=2, ignore_eos=True))
    run(engine)
    assert histogram.count == copied.count == 26


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_a_stream_is_told_of_several_tokens_at_once(kind: RequestOutputKind) -> None:
    """Of the first one when it comes, and of the end; others every ``stream_interval`` tokens."""
    engine, _ = make_engine(model=saying(*range(1, 11)), tokenizer=LETTERS, stream_interval=4)
    engine.add_request("r", PROMPT, greedy(output_kind=kind))
    engine.add_request("final", PROMPT, greedy(output_kind=RequestOutputKind.FINAL_ONLY))
    told: dict[str, list[RequestOutput]] = {"r": [], "final": []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            told[output.request_id].append(output)
    texts = [output.outputs[0].text for output in told["r"]]
    ids = [output.outputs[0].token_ids for output in told["r"]]
    if kind is RequestOutputKind.DELTA:
        assert texts == ["a", "bcde", "fghi", "j"]
        assert ids == [[1], [2, 3, 4, 5], [6, 7, 8, 9], [10, EOS]]
    else:
        assert texts == ["a", "abcde", "abcdefghi", "abcdefghij"]
        assert [len(each) for each in ids] == [1, 5, 9, 11]
    assert [output.finished for output in told["r"]] == [False, False, False, True]
    assert [output.outputs[0].text for output in told["final"]] == ["abcdefghij"]
    assert engine.get_histograms()["vllm:inter_token_latency_seconds"].count == 20


def test_completions_of_one_prompt_are_told_each_in_its_own_time() -> None:
    engine, _ = make_engine(tokenizer=LETTERS, stream_interval=3)
    params = SamplingParams(
        n=2, seed=0, max_tokens=7, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    engine.add_request("r", PROMPT, params)
    ids: dict[int, list[list[int]]] = {0: [], 1: []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.outputs
            for completion in output.outputs:
                ids[completion.index].append(completion.token_ids)
    assert [[len(piece) for piece in pieces] for pieces in ids.values()] == [[1, 3, 3]] * 2
    check_nothing_is_held(engine)


def test_what_was_not_told_yet_comes_with_an_abort() -> None:
    engine, _ = make_engine(model=saying(*range(1, 11)), tokenizer=LETTERS, stream_interval=100)
    engine.add_request("r", PROMPT, greedy(output_kind=RequestOutputKind.DELTA))
    outputs = [output for _ in range(6) for output in engine.step()]
    (last,) = engine.abort_request("r")
    assert [output.outputs[0].text for output in (*outputs, last)] == ["a", "bcde"]
    assert last.outputs[0].finish_reason == "abort"
    run(engine)
    check_nothing_is_held(engine)


# Adapters


def test_without_lora_adapters_are_refused() -> None:
    engine, _ = make_engine()
    request = LoRARequest("x")
    for call in (
        lambda: engine.add_request("a", [1], greedy(), request),
        lambda: engine.add_lora(request),
        lambda: engine.remove_lora(1),
        lambda: engine.pin_lora(1),
        engine.list_loras,
    ):
        with pytest.raises(ValueError, match=r"LoRA is not enabled.*enable_lora=True"):
            call()
    check_nothing_is_held(engine)


def test_an_adapter_that_cannot_be_served_leaves_nothing_queued() -> None:
    engine, _ = make_engine(max_loras=1)
    with pytest.raises(AdapterNotFoundError, match="missing"):
        engine.add_request("a", [1], greedy(), LoRARequest("missing"))
    assert engine.list_loras() == set()
    check_nothing_is_held(engine)


def test_managing_adapters() -> None:
    engine, _ = make_engine(max_loras=2)
    assert engine.add_lora(LoRARequest("x", 5))
    assert not engine.add_lora(LoRARequest("x", 5))
    engine.add_request("a", [1], greedy(), LoRARequest("y"))
    assert engine.list_loras() == {5, 6}
    assert engine.remove_lora(5)
    assert not engine.remove_lora(5)
    run(engine)


def test_pinned_adapters_take_slots_ahead_of_requests() -> None:
    engine, _ = make_engine(max_loras=2)
    engine.add_lora(LoRARequest("x"))
    engine.add_request("y", [1], greedy(), LoRARequest("y"))
    assert engine.pin_lora(1)
    assert engine.has_work()
    engine.step()
    assert engine.get_metrics()["jaxlora:adapters_resident"] == 2
    # The base model and what is in the slots is served, others are refused at once.
    assert engine.pin_lora(2)
    with pytest.raises(AdapterCapacityError, match=r"'z'.*max_loras=2.*2 are pinned; remove_lora"):
        engine.add_request("z", [1], greedy(), LoRARequest("z"))
    engine.add_request("base", [1], greedy())
    assert set(run(engine)) == {"y", "base"}
    assert not engine.has_work()
    engine.remove_lora(1)
    engine.add_request("z", [1], greedy(), LoRARequest("z"))
    assert run(engine)["z"].outputs[0].token_ids
    check_nothing_is_held(engine)
    # Without any request.
    engine.add_lora(LoRARequest("w"))
    engine.remove_lora(2)
    engine.pin_lora(4)
    while engine.has_work():
        assert engine.step() == []
    assert {each.lora_name: each.tier for each in engine.describe_loras()}["w"] == "device"


def test_a_removed_adapter_serves_its_requests_to_their_end() -> None:
    engine, _ = make_engine(max_loras=2, max_num_seqs=2)
    params = greedy(max_tokens=8, ignore_eos=True)
    old, new = LoRARequest("x", 1, "old"), LoRARequest("x", 1, "new")
    for name in ("running", "too", "waiting"):
        engine.add_request(name, [1], params, old)
    engine.step()
    assert engine.remove_lora(1)
    engine.add_request("after", [1], params, new)
    outputs = run(engine)
    for name, path in (("running", "old"), ("too", "old"), ("waiting", "old"), ("after", "new")):
        expected = complete([1], params, make_adapter(path), max_model_len=32)
        assert outputs[name].outputs[0].token_ids == expected
    assert outputs["after"].outputs[0].token_ids != outputs["waiting"].outputs[0].token_ids
    assert engine.get_metrics()["jaxlora:adapters_resident"] == 1
    check_nothing_is_held(engine)


# Failures and Ctrl-C


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_a_step_that_fails_aborts_everything_and_leaves_a_sound_engine(
    error: BaseException, step: int
) -> None:
    engine, device = make_engine(max_loras=2)
    params = greedy(max_tokens=6, ignore_eos=True)
    requests = {"a": "x", "b": None, "c": "y", "d": "z"}

    def add() -> None:
        for name, adapter in requests.items():
            engine.add_request(name, [1, 2], params, LoRARequest(adapter) if adapter else None)

    def fail(plan: Plan) -> None:
        if len(device.plans) == step:
            device.fail = lambda plan: None
            raise error

    add()
    device.fail = fail
    with pytest.raises(type(error)):
        run(engine)
    check_nothing_is_held(engine)
    assert engine.step() == []
    # What was about to be written to a slot, but was not, is written now.
    add()
    outputs = run(engine)
    for name, adapter in requests.items():
        expected = complete([1, 2], params, adapter and make_adapter(adapter), max_model_len=32)
        assert outputs[name].outputs[0].token_ids == expected


def test_ctrl_c_waits_for_the_end_of_the_step() -> None:
    engine, device = make_engine()
    engine.add_request("a", [1, 2], greedy())
    interrupted = []

    def press(plan: Plan) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        interrupted.append(plan)

    device.fail = press
    # A shell starts what it runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(interrupted) == len(device.plans) == 1
    check_nothing_is_held(engine)


def test_outside_the_main_thread_and_without_a_handler_signals_are_left_alone() -> None:
    seen = []

    def inside() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        inside()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert seen == [handler, signal.SIG_IGN]
