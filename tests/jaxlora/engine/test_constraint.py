"""Constrained completions over a simulated device: what they yield, who waits, who fails."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest
from llguidance import LLParserLimits

from jaxlora.errors import GenerationError, RequestError
from jaxlora.outputs import RequestOutput
from jaxlora.structured_outputs import StructuredOutputsParams
from jaxlora.types import LoRARequest, SamplingParams
from tests.jaxlora.engine.simulator import (
    EOS,
    PieceTokenizer,
    check_nothing_is_held,
    complete,
    letter_grammars,
    make_adapter,
    make_engine,
    run,
)
from tests.jaxlora.patience import SECONDS

LETTERS = "abcdefghijklmno"


def regex(pattern: str, **params: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(regex=pattern), **params)


def text_of(output: RequestOutput) -> str:
    return "".join(LETTERS[token - 1] for token in output.outputs[0].token_ids if token != EOS)


class Threads(Executor):
    """Runs each call on a thread of its own, once ``gate`` lets it, which is told whose it is and
    which of theirs: the first to ask for a mask is 0, and so is its first mask."""

    def __init__(self, gate: Callable[[int, int], None]) -> None:
        self._gate = gate
        self._counts: dict[Any, Iterator[int]] = {}
        self._pool = ThreadPoolExecutor(16)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        count = self._counts.setdefault(fn.__self__, itertools.count())
        who, number = list(self._counts).index(fn.__self__), next(count)

        def call() -> Any:
            self._gate(who, number)
            return fn(*args, **kwargs)

        return self._pool.submit(call)


def test_the_host_makes_the_mask_while_the_forward_pass_runs() -> None:
    engine, device = make_engine(grammars=letter_grammars())
    engine.add_request("a", [1, 2], regex("[a-c]{4}", temperature=0))
    outputs = run(engine)
    # As without a constraint, a step's forward pass is dispatched before the last one is read.
    assert device.events[:5] == [("run", 0), ("run", 1), ("read", 0), ("run", 2), ("read", 1)]
    assert len(text_of(outputs["a"])) == 4
    assert outputs["a"].outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("late", [0, 2, 5])
def test_constrained_ones_beside_others(late: int, prefix_caching: bool) -> None:
    """Preempted and resumed, in chunks, under adapters, some masks late: equal tokens."""
    engine, device = make_engine(
        num_pages=10,
        page_size=2,
        max_num_seqs=4,
        step_sizes=(5,),
        max_model_len=18,
        max_loras=1,
        enable_prefix_caching=prefix_caching,
        grammars=letter_grammars(
            executor=Threads(lambda _, i: time.sleep(0.004 * bool(late and i % late == 0)))
        ),
    )
    requests: list[tuple[list[int], SamplingParams, str | None]] = [
        ([1, 2, 3], regex("[a-h]{3,9}", temperature=0), "x"),
        ([1, 2, 3], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), None),
        ([1, 2, 3, 4, 5, 6, 7], regex("(abc|de?o)+", seed=1, max_tokens=10), None),
        ([1, 2, 3], SamplingParams(seed=2, max_tokens=9), "x"),
        ([4] * 6, regex("[^a]*", seed=3, min_tokens=7, max_tokens=10), "y"),
        ([4] * 6, regex("ab?", seed=3, min_tokens=7, max_tokens=10), "y"),
    ]
    for i, (prompt, params, adapter) in enumerate(requests):
        engine.add_request(str(i), prompt, params, LoRARequest(adapter) if adapter else None)
    outputs = run(engine)
    for i, (prompt, params, adapter) in enumerate(requests):
        weights = make_adapter(adapter) if adapter else None
        expected = complete(prompt, params, weights, max_model_len=18)
        assert outputs[str(i)].outputs[0].token_ids == expected, (i, outputs[str(i)])
    assert engine.scheduler.num_preemptions
    assert any(not row.samples for plan in device.plans for row in plan.rows)
    check_nothing_is_held(engine)


def test_a_late_mask_holds_up_its_own_completion_only() -> None:
    release = threading.Event()

    def gate(who: int, number: int) -> None:
        if (who, number) == (0, 1):  # after the first of slow's tokens
            release.wait(SECONDS)

    engine, _ = make_engine(grammars=letter_grammars(executor=Threads(gate)))
    engine.add_request("slow", [1], regex("[a-c]{4}", temperature=0))
    engine.add_request("quick", [2], regex("[a-d]{8}", temperature=0))
    engine.add_request("free", [3], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    done: dict[str, RequestOutput] = {}
    while not {"quick", "free"} <= set(done):
        done.update({o.request_id: o for o in engine.step() if o.finished})
    assert "slow" not in done
    # Once the step too many is read there is nothing to do but to wait, and it does not spin.
    engine.step()
    before = time.monotonic()
    assert engine.step() == []
    assert time.monotonic() - before > 0.005
    release.set()
    done.update(run(engine))
    for name, prompt, params in (
        ("slow", [1], regex("[a-c]{4}", temperature=0)),
        ("quick", [2], regex("[a-d]{8}", temperature=0)),
        ("free", [3], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)),
    ):
        assert done[name].outputs[0].token_ids == complete(prompt, params, max_model_len=32)
    check_nothing_is_held(engine)


def test_a_late_completion_can_be_aborted() -> None:
    release = threading.Event()
    engine, _ = make_engine(
        grammars=letter_grammars(executor=Threads(lambda *_: release.wait(SECONDS)))
    )
    engine.add_request("late", [1], regex("[a-c]{4}"))
    engine.add_request("free", [3], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    for _ in range(6):
        engine.step()
    (output,) = engine.abort_request("late")
    assert output.outputs[0].finish_reason == "abort"
    check_nothing_is_held(engine)
    release.set()


def test_completions_of_one_prompt_have_constraints_of_their_own() -> None:
    engine, _ = make_engine(grammars=letter_grammars())
    params = regex("[a-e]{2,6}", n=3, seed=5, temperature=1)
    engine.add_request("a", [1, 2], params)
    outputs = run(engine)["a"].outputs
    for i, output in enumerate(outputs):
        alone = regex("[a-e]{2,6}", seed=5 + i, temperature=1)
        assert output.token_ids == complete([1, 2], alone, max_model_len=32)
    assert len({tuple(output.token_ids) for output in outputs}) > 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"allowed_token_ids": [3]}, "allowed_token_ids and bad_words leave none"),
        ({"allowed_token_ids": [1, 3]}, "allowed_token_ids and bad_words leave none"),
    ],
)
def test_what_leaves_no_token_ends_that_request(params: dict[str, Any], message: str) -> None:
    engine, _ = make_engine(grammars=letter_grammars())
    engine.add_request("a", [1, 2], regex("ab", temperature=0, **params))
    engine.add_request("b", [1, 2], regex("ab", temperature=0))
    outputs = run(engine)
    assert outputs["a"].outputs[0].finish_reason == "error"
    assert isinstance(outputs["a"].error, GenerationError)
    assert message in str(outputs["a"].error)
    assert text_of(outputs["b"]) == "ab"
    check_nothing_is_held(engine)


def test_a_grammar_that_becomes_too_costly_ends_that_request() -> None:
    limits = LLParserLimits(max_items_in_row=4, verbose_errors=False)
    engine, _ = make_engine(grammars=letter_grammars(limits=limits))
    costly = StructuredOutputsParams(grammar="start: x\nx: x x | /[a-e]/")
    params = SamplingParams(structured_outputs=costly, temperature=0)
    engine.add_request("costly", [1], params)
    engine.add_request("twice", [1, 2], SamplingParams(structured_outputs=costly, n=2, seed=1))
    engine.add_request("other", [2], regex("[a-d]{8}", temperature=0))
    outputs = run(engine)
    for name in ("costly", "twice"):
        assert {c.finish_reason for c in outputs[name].outputs} == {"error"}
        assert isinstance(outputs[name].error, GenerationError)
        assert "structured_outputs: " in str(outputs[name].error)
    # What came before is told.
    assert outputs["costly"].outputs[0].token_ids
    assert len(text_of(outputs["other"])) == 8
    check_nothing_is_held(engine)


def test_a_failure_of_a_thread_ends_that_request() -> None:
    def gate(who: int, number: int) -> None:
        if who == 0:
            raise MemoryError("no room")

    engine, _ = make_engine(grammars=letter_grammars(executor=Threads(gate)))
    engine.add_request("a", [1], regex("[a-d]{8}"))
    engine.add_request("b", [1], regex("[a-d]{8}"))
    outputs = run(engine)
    assert "MemoryError('no room')" in str(outputs["a"].error)
    assert len(text_of(outputs["b"])) == 8


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "a(b"}, r"(?s)structured_outputs: .*unclosed group"),
        ({"regex": "(a)\\1"}, "backreferences are not supported"),
        ({"grammar": "start: nowhere"}, "nowhere"),
        ({"grammar": 'root ::= "a" nowhere'}, "nowhere"),
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"type": "integer", "minimum": 2, "maximum": 1}}, "Unsatisfiable"),
    ],
)
def test_a_bad_constraint_is_refused_with_the_reason(
    constraint: dict[str, Any], message: str
) -> None:
    engine, device = make_engine(grammars=letter_grammars())
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**constraint))
    with pytest.raises(RequestError, match=message):
        engine.add_request("a", [1], params)
    assert not engine.has_unfinished_requests()
    assert not device.plans


def test_without_a_tokenizer_it_is_refused() -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match=r"needs a tokenizer.*skip_tokenizer_init=True"):
        engine.add_request("a", [1], regex("a"))


@pytest.mark.parametrize("min_tokens", [0, 5])
def test_it_ends_although_eos_is_ignored(min_tokens: int) -> None:
    engine, _ = make_engine(grammars=letter_grammars())
    params = regex("ab", ignore_eos=True, min_tokens=min_tokens, max_tokens=5)
    engine.add_request("a", [1], params)
    output = run(engine)["a"].outputs[0]
    assert output.token_ids == [1, 2, EOS]
    assert output.finish_reason == "stop"


def test_a_grammar_is_compiled_once() -> None:
    grammars = letter_grammars()
    params = StructuredOutputsParams(regex="[a-c]+")
    assert grammars.compile(params) is grammars.compile(StructuredOutputsParams(regex="[a-c]+"))
    for i in range(200):
        grammars.compile(StructuredOutputsParams(choice=[LETTERS[i % 15] * (i // 15 + 1)]))
    assert len(grammars._kept) == 128


def test_bad_words_are_kept_out_of_the_mask() -> None:
    # The simulated device knows nothing of bad words, so it is the mask that counts here.
    tokenizer = PieceTokenizer(*LETTERS[:-1], " ")
    engine, _ = make_engine(grammars=letter_grammars(), tokenizer=tokenizer)
    for i in range(8):
        engine.add_request(f"free {i}", [1, i], regex("a(b|c)", temperature=0))
        engine.add_request(f"kept {i}", [1, i], regex("a(b|c)", temperature=0, bad_words=["ab"]))
    engine.add_request("stuck", [1, 2], regex("ab", bad_words=["ab"]))
    outputs = run(engine)
    assert isinstance(outputs.pop("stuck").error, GenerationError)
    texts = {name: text_of(output) for name, output in outputs.items()}
    assert {text for name, text in texts.items() if "kept" in name} == {"ac"}
    assert {text for name, text in texts.items() if "free" in name} == {"ab", "ac"}
