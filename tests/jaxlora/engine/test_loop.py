"""The engine's thread over a simulated device: messages, adapters read aside, failure, the end."""

from __future__ import annotations

import gc
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

import jaxlora.engine.loop as loop_module
from jaxlora.adapters.adapter import Adapter
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.loop import EngineLoop
from jaxlora.engine.messages import Event
from jaxlora.engine.scheduler import Plan
from jaxlora.errors import AdapterNotFoundError, EngineDeadError, RequestError
from jaxlora.outputs import RequestOutput
from jaxlora.types import LoRARequest, SamplingParams
from tests.jaxlora.engine.simulator import (
    Device,
    Gate,
    PieceTokenizer,
    check_nothing_is_held,
    complete,
    make_adapter,
    make_engine,
)
from tests.jaxlora.patience import SECONDS


def greedy(max_tokens: int = 5) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


class Inbox:
    """A sink that keeps every event."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def __call__(self, event: Event) -> None:
        self._events.put(event)

    def next(self) -> Event:
        return self._events.get(timeout=SECONDS)

    def last(self) -> RequestOutput:
        """The finished output; raises the error that ended the request."""
        while True:
            event = self.next()
            if isinstance(event, Exception):
                raise event
            if event.finished:
                assert self._events.empty()
                return event


@contextmanager
def running(engine: LLMEngine) -> Iterator[EngineLoop]:
    loop = EngineLoop(engine)
    try:
        yield loop
    finally:
        loop.shutdown()


def submit(
    loop: EngineLoop,
    request_id: str,
    prompt: Any = (1, 2),
    params: SamplingParams | None = None,
    lora_request: LoRARequest | None = None,
) -> Inbox:
    inbox = Inbox()
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    loop.submit(request_id, prompt, params or greedy(), lora_request, inbox)
    return inbox


def hold_reads(engine: LLMEngine) -> threading.Event:
    """Makes every adapter take until the event is set to be read."""
    registry = engine.adapters
    load, event = registry.reader._load, threading.Event()

    def slow(request: LoRARequest) -> Adapter:
        assert event.wait(SECONDS)
        return load(request)

    registry.reader._load = slow
    return event


def test_threads_that_read_hand_over_soon() -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        engine, _ = make_engine()
        with running(engine):
            assert sys.getswitchinterval() == pytest.approx(1e-4)
    finally:
        sys.setswitchinterval(before)


# Requests


def test_outputs_come_step_by_step_and_the_last_is_finished() -> None:
    engine, _ = make_engine()
    with running(engine) as loop:
        inbox = submit(loop, "a", params=greedy(3))
        events = [inbox.next() for _ in range(3)]
    expected = complete([1, 2], greedy(3), max_model_len=32)
    assert [
        (event.outputs[0].token_ids, event.finished)
        for event in events
        if isinstance(event, RequestOutput)
    ] == [(expected[:1], False), (expected[:2], False), (expected, True)]
    check_nothing_is_held(engine)


def test_requests_from_many_threads() -> None:
    engine, _ = make_engine(max_loras=2)
    names = [None, "x", "y", "z"]
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for i in range(5):
                name = names[(number + i) % 4]
                lora = LoRARequest(name) if name else None
                prompt = (1 + number, 2 + i)
                output = submit(loop, f"{number}-{i}", prompt, lora_request=lora).last()
                adapter = make_adapter(name) if name else None
                expected = complete(prompt, greedy(), adapter, max_model_len=32)
                assert output.outputs[0].token_ids == expected
        except BaseException as error:  # noqa: BLE001  raised again in the test's own thread
            failures.append(error)

    with running(engine) as loop:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    check_nothing_is_held(engine)


@pytest.mark.parametrize(
    ("prompt", "lora", "error", "message"),
    [
        ([], None, RequestError, "the prompt is empty"),
        ([1] * 40, None, RequestError, "40 tokens"),
        ({"text": "a"}, None, RequestError, "needs 'prompt' or 'prompt_token_ids'"),
        ([1], "missing", AdapterNotFoundError, "'missing'"),
        ("?", None, ValueError, "not in tuple"),
    ],
)
def test_a_refusal_reaches_its_own_sink_alone(
    prompt: Any, lora: str | None, error: type[Exception], message: str
) -> None:
    engine, _ = make_engine(max_loras=2, tokenizer=PieceTokenizer(*"abcdefghijklmno"))
    with running(engine) as loop:
        beside = submit(loop, "beside")
        bad = submit(loop, "bad", prompt, lora_request=LoRARequest(lora) if lora else None)
        with pytest.raises(error, match=message):
            bad.last()
        assert beside.last().outputs[0].token_ids == complete([1, 2], greedy(), max_model_len=32)
        # Its id is free again.
        assert submit(loop, "bad").last().finished
    check_nothing_is_held(engine)


def test_an_id_in_use_is_refused_and_the_first_request_goes_on() -> None:
    engine, device = make_engine()
    gate = Gate(device)
    with running(engine) as loop:
        first = submit(loop, "a")
        second = submit(loop, "a")
        gate.open()
        with pytest.raises(ValueError, match="request_id 'a' is in use"):
            second.last()
        assert first.last().outputs[0].finish_reason == "length"


def test_abort_ends_a_request_with_what_it_has() -> None:
    engine, _ = make_engine()
    with running(engine) as loop:
        inbox = submit(loop, "a", params=greedy(30))
        inbox.next()
        loop.abort(["a", "nobody"])
        completion = inbox.last().outputs[0]
        assert completion.finish_reason == "abort"
        expected = complete([1, 2], greedy(30), max_model_len=32)
        assert completion.token_ids == expected[: len(completion.token_ids)]
        assert submit(loop, "a").last().outputs[0].finish_reason == "length"
    check_nothing_is_held(engine)


# Adapters


def test_reading_an_adapter_holds_up_nobody_else() -> None:
    engine, _ = make_engine(max_loras=2)
    read = hold_reads(engine)
    with running(engine) as loop:
        waits = submit(loop, "x", lora_request=LoRARequest("x"))
        added = loop.add_lora(LoRARequest("x"))
        assert submit(loop, "base").last().finished
        assert loop.ask(LLMEngine.list_loras).result(SECONDS) == set()
        read.set()
        expected = complete([1, 2], greedy(), make_adapter("x"), max_model_len=32)
        assert waits.last().outputs[0].token_ids == expected
        assert added.result(SECONDS) is False
        assert loop.ask(LLMEngine.list_loras).result(SECONDS) == {1}
    check_nothing_is_held(engine)


def test_an_adapter_is_read_once_for_all_who_wait_for_it() -> None:
    engine, _ = make_engine(max_loras=2)
    load: Any = engine.adapters.reader._load
    read = hold_reads(engine)
    with running(engine) as loop:
        added = [loop.add_lora(LoRARequest("x")) for _ in range(3)]
        inboxes = [submit(loop, str(i), lora_request=LoRARequest("x")) for i in range(3)]
        loop.ask(LLMEngine.list_loras).result(SECONDS)
        read.set()
        assert [each.result(SECONDS) for each in added] == [True, False, False]
        assert all(inbox.last().finished for inbox in inboxes)
    assert load.loaded == ["x"]


def test_another_path_under_a_name_that_is_being_read_is_judged_after_it() -> None:
    engine, _ = make_engine(max_loras=2)
    read = hold_reads(engine)
    with running(engine) as loop:
        first = loop.add_lora(LoRARequest("x", None, "one"))
        second = loop.add_lora(LoRARequest("x", None, "two"))
        read.set()
        assert first.result(SECONDS) is True
        with pytest.raises(ValueError, match="was loaded from 'one'"):
            second.result(SECONDS)


def test_who_waits_for_an_adapter_that_cannot_be_read_is_told() -> None:
    engine, _ = make_engine(max_loras=2)
    read = hold_reads(engine)
    with running(engine) as loop:
        inboxes = [submit(loop, str(i), lora_request=LoRARequest("missing")) for i in range(2)]
        added = loop.add_lora(LoRARequest("missing"))
        read.set()
        for inbox in inboxes:
            with pytest.raises(AdapterNotFoundError):
                inbox.last()
        with pytest.raises(AdapterNotFoundError):
            added.result(SECONDS)
        loop.check()


def test_abort_ends_a_request_that_waits_for_its_adapter() -> None:
    engine, _ = make_engine(max_loras=2)
    read = hold_reads(engine)
    with running(engine) as loop:
        gone = submit(loop, "gone", lora_request=LoRARequest("x"))
        stays = submit(loop, "stays", lora_request=LoRARequest("x"))
        loop.abort(["gone"])
        output = gone.last()
        assert (output.prompt_token_ids, output.outputs[0].finish_reason) == ([1, 2], "abort")
        read.set()
        assert stays.last().outputs[0].finish_reason == "length"
    check_nothing_is_held(engine)


def test_adapters_are_managed_through_the_loop() -> None:
    engine, _ = make_engine(max_loras=2)
    with running(engine) as loop:
        assert loop.add_lora(LoRARequest("x", 7)).result(SECONDS) is True
        assert loop.add_lora(LoRARequest("x", 7)).result(SECONDS) is False
        with pytest.raises(ValueError, match="belongs to adapter 'x'"):
            loop.add_lora(LoRARequest("y", 7)).result(SECONDS)
        assert loop.ask(lambda engine: engine.pin_lora(7)).result(SECONDS) is True
        with pytest.raises(AdapterNotFoundError):
            loop.ask(lambda engine: engine.pin_lora(8)).result(SECONDS)
        assert loop.ask(lambda engine: engine.remove_lora(7)).result(SECONDS) is True
        assert loop.ask(LLMEngine.list_loras).result(SECONDS) == set()


def test_without_lora_a_request_for_an_adapter_is_refused() -> None:
    engine, _ = make_engine()
    with running(engine) as loop:
        with pytest.raises(ValueError, match="enable_lora=True"):
            submit(loop, "a", lora_request=LoRARequest("x")).last()
        with pytest.raises(ValueError, match="enable_lora=True"):
            loop.add_lora(LoRARequest("x")).result(SECONDS)


# The end


def fail_at(device: Device, step: int, error: BaseException) -> None:
    def fail(plan: Plan) -> None:
        if len(device.plans) == step:
            raise error

    device.fail = fail


@pytest.mark.parametrize("error", [RuntimeError("device lost"), SystemExit(3)])
def test_a_failing_step_fails_all_who_wait(error: BaseException) -> None:
    engine, device = make_engine(max_num_seqs=1, max_loras=2)
    read = hold_reads(engine)
    fail_at(device, 2, error)
    loop = EngineLoop(engine)
    added = loop.add_lora(LoRARequest("x"))
    inboxes = [submit(loop, "waits for its adapter", lora_request=LoRARequest("x"))]
    inboxes += [submit(loop, name) for name in ("runs", "waits")]
    for inbox in inboxes:
        with pytest.raises(EngineDeadError, match="stopped after") as raised:
            inbox.last()
        assert raised.value.__cause__ is error
    with pytest.raises(EngineDeadError):
        added.result(SECONDS)
    read.set()
    for refused in (loop.check, submit(loop, "late").last, loop.ask(LLMEngine.get_metrics).result):
        with pytest.raises(EngineDeadError, match=str(error)):
            refused()
    loop.shutdown()
    check_nothing_is_held(engine)


def test_shutdown_ends_what_runs_and_what_waits() -> None:
    engine, device = make_engine(max_num_seqs=1)
    gate = Gate(device)
    loop = EngineLoop(engine)
    inboxes = [submit(loop, name) for name in ("runs", "waits")]
    assert gate.reached.wait(SECONDS)
    stopper = threading.Thread(target=loop.shutdown)
    stopper.start()
    gate.open()
    stopper.join(SECONDS)
    for inbox in inboxes:
        with pytest.raises(EngineDeadError, match="the engine was shut down"):
            inbox.last()
    with pytest.raises(EngineDeadError, match="the engine was shut down"):
        loop.check()
    loop.shutdown()


def test_who_runs_does_not_wait_for_all_who_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "_RECEIVE_SECONDS", 0.0)
    engine, device = make_engine(max_num_seqs=8, step_sizes=(32,))
    gate = Gate(device)
    with running(engine) as loop:
        inboxes = [submit(loop, "first", params=greedy(20))]
        assert gate.reached.wait(SECONDS)
        inboxes += [submit(loop, str(i)) for i in range(5)]
        gate.open()
        for inbox in inboxes:
            assert inbox.last().finished
    begun = [sum(row.start == 0 for row in plan.rows) for plan in device.plans]
    assert [count for count in begun if count] == [1] * 6


def test_no_message_is_lost_at_the_end() -> None:
    for _ in range(50):
        engine, _ = make_engine()
        loop = EngineLoop(engine)
        start = threading.Barrier(3)
        inboxes: list[Inbox] = []

        def sender(
            loop: EngineLoop = loop, start: threading.Barrier = start, to: list[Inbox] = inboxes
        ) -> None:
            start.wait(SECONDS)
            to.extend(submit(loop, f"{threading.get_ident()}-{i}") for i in range(5))

        threads = [threading.Thread(target=sender) for _ in range(2)]
        for thread in threads:
            thread.start()
        start.wait(SECONDS)
        loop.shutdown()
        for thread in threads:
            thread.join(SECONDS)
        assert len(inboxes) == 10
        for inbox in inboxes:
            _ends(inbox.last)


def _ends(wait: Callable[[], RequestOutput]) -> None:
    with suppress(EngineDeadError):
        assert wait().finished


def test_what_is_read_after_the_end_is_kept_by_nobody() -> None:
    begun, ended = threading.Event(), threading.Event()
    read: list[weakref.ref[Adapter]] = []

    def load(request: LoRARequest) -> Adapter:
        begun.set()
        assert ended.wait(SECONDS)
        adapter = make_adapter(request.lora_name)
        read.append(weakref.ref(adapter))
        return adapter

    engine, _ = make_engine(max_loras=1)
    engine.adapters.reader._load = load
    loop = EngineLoop(engine)
    reply = loop.add_lora(LoRARequest("x"))
    assert begun.wait(SECONDS)
    loop.shutdown()
    with pytest.raises(EngineDeadError, match="the engine was shut down"):
        reply.result(SECONDS)
    ended.set()
    loop._readers.shutdown()
    gc.collect()
    assert [adapter() for adapter in read] == [None]


def test_the_engine_goes_with_its_loop() -> None:
    engine, _ = make_engine()
    gone = weakref.ref(engine)
    loop = EngineLoop(engine)
    submit(loop, "a").last()
    loop.shutdown()
    del engine, loop
    gc.collect()
    assert gone() is None
