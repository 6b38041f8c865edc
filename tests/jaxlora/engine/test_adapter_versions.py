"""Versions and tiers under traffic, simulated: each request is served what it was queued with."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.registered import HeldVersion, Registered
from jaxlora.adapters.staging import StagingArea
from jaxlora.async_llm import AsyncLLM
from jaxlora.engine import engine as engine_module
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.loop import EngineLoop
from jaxlora.engine.scheduler import Plan
from jaxlora.errors import (
    AdapterCapacityError,
    AdapterError,
    AdapterNotFoundError,
    AdapterRefusedError,
)
from jaxlora.outputs import RequestOutput
from jaxlora.types import LoRARequest, RequestOutputKind, SamplingParams
from tests.jaxlora.engine.simulator import (
    Device,
    Inline,
    Loader,
    Reader,
    check_nothing_is_held,
    complete,
    make_adapter,
    make_engine,
    make_staging,
    run,
)
from tests.jaxlora.engine.test_loop import submit
from tests.jaxlora.patience import SECONDS, wait_until


def greedy(max_tokens: int = 6, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)


def expected(content: str | None, max_tokens: int = 6) -> list[int]:
    adapter = None if content is None else make_adapter(content)
    return complete([1, 2], greedy(max_tokens), adapter, max_model_len=32)


def update(engine: LLMEngine, name: str, content: str) -> bool:
    return engine.update_lora(name, {"content": content})


def test_a_running_request_finishes_on_the_version_it_began_with() -> None:
    engine, _ = make_engine(max_loras=2)
    engine.add_request("old", [1, 2], greedy(), LoRARequest("x"))
    engine.step()
    engine.add_request("queued", [1, 2], greedy(), LoRARequest("x"))
    assert update(engine, "x", "new")
    assert not update(engine, "x", "new")
    engine.add_request("new", [1, 2], greedy(), LoRARequest("x"))
    outputs = {key: output.outputs[0].token_ids for key, output in run(engine).items()}
    assert outputs == {"old": expected("x"), "queued": expected("x"), "new": expected("new")}
    assert expected("x") != expected("new")
    assert engine.get_metrics()["jaxlora:adapters_resident"] == 1
    check_nothing_is_held(engine)


def steps_until_admitted(engine: LLMEngine, device: Device, name: str) -> int:
    """How often the engine steps before a new request of an adapter is in a step."""
    engine.add_request("asked", [1, 2], greedy(1), LoRARequest(name))
    for count in range(10):
        before = len(device.plans)
        engine.step()
        if len(device.plans) > before:
            run(engine)
            return count
    raise AssertionError("it was not admitted")


@pytest.mark.parametrize("in_use", [False, True])
def test_the_version_after_a_resident_one_is_staged_before_it_is_asked_for(in_use: bool) -> None:
    threads = Reader()
    engine, device = make_engine(max_loras=3, staging=make_staging(threads))
    for name in "xy":
        engine.add_lora(LoRARequest(name))
    engine.add_request("a", [1, 2], greedy(20), LoRARequest("x"))
    engine.step()
    threads.run()
    engine.step()
    if not in_use:
        run(engine)
    assert update(engine, "x", "new")
    assert update(engine, "y", "newer")
    threads.run()
    # And that of an adapter that was in no slot is not.
    assert engine.get_metrics()["jaxlora:adapter_staged_bytes"] == 1
    if in_use:
        engine.abort_request("a")
    assert steps_until_admitted(engine, device, "x") == 0
    engine.add_request("y", [1, 2], greedy(), LoRARequest("y"))
    engine.step()
    threads.run()
    assert run(engine)["y"].outputs[0].token_ids == expected("newer")
    check_nothing_is_held(engine)


def test_the_version_after_a_resident_one_takes_no_memory_from_who_waits() -> None:
    threads = Reader()
    engine, device = make_engine(max_loras=2, staging=make_staging(threads, max_adapters=1))
    engine.add_request("a", [1, 2], greedy(20), LoRARequest("x"))
    engine.step()
    threads.run()
    engine.step()
    engine.add_request("b", [1, 2], greedy(20), LoRARequest("y"))
    engine.step()
    assert update(engine, "x", "new")
    threads.run()
    engine.step()
    assert [row.sequence.request_id for row in device.plans[-1].rows] == ["a", "b"]
    # Then it is its turn, and it makes room for others again.
    assert engine.get_metrics()["jaxlora:adapter_staged_bytes"] == 1
    threads.run()
    engine.add_request("c", [1, 2], greedy(20), LoRARequest("z"))
    engine.step()
    threads.run()
    run(engine)
    engine.add_request("d", [1, 2], greedy(), LoRARequest("x"))
    engine.step()
    threads.run()
    assert run(engine)["d"].outputs[0].token_ids == expected("new")
    check_nothing_is_held(engine)


def test_a_pinned_version_leaves_its_elder_room_to_be_staged() -> None:
    """The elder is waited for and goes first, in the one slot and before that in the one room."""
    engine, _ = make_engine(max_loras=1, staging=make_staging(max_adapters=1))
    engine.add_lora(LoRARequest("x"))
    engine.pin_lora(1)
    engine.step()
    assert update(engine, "x", "new")
    engine.add_request("a", [1, 2], greedy(), LoRARequest("x"))
    assert update(engine, "x", "newer")
    engine.add_request("b", [1, 2], greedy(), LoRARequest("x"))
    outputs = {key: output.outputs[0].token_ids for key, output in run(engine).items()}
    assert outputs == {"a": expected("new"), "b": expected("newer")}


def test_a_version_that_is_replaced_before_it_was_asked_for_leaves_nothing() -> None:
    threads = Reader()
    engine, _ = make_engine(max_loras=1, staging=make_staging(threads))
    engine.add_request("a", [1, 2], greedy(), LoRARequest("x"))
    engine.step()
    threads.run()
    run(engine)
    for i in range(4):
        update(engine, "x", str(i))
        if i % 2:
            threads.run()
    threads.run()
    engine.step()
    assert engine.get_metrics()["jaxlora:adapter_staged_bytes"] == 1
    assert engine.remove_lora(1)
    assert engine.get_metrics()["jaxlora:adapter_staged_bytes"] == 0
    assert not engine.has_work()
    check_nothing_is_held(engine)


def test_a_request_may_load_in_place() -> None:
    loader = Loader()
    engine, _ = make_engine(max_loras=2, loader=loader)
    engine.add_request("old", [1, 2], greedy(), LoRARequest("x", None, "one"))
    engine.add_request("new", [1, 2], greedy(), LoRARequest("x", None, "two", load_inplace=True))
    outputs = {key: output.outputs[0].token_ids for key, output in run(engine).items()}
    assert outputs == {"old": expected("one"), "new": expected("two")}
    assert engine.list_loras() == {1}


def test_what_is_read_again_by_its_name_is_read_where_it_is() -> None:
    loader = Loader()
    engine, _ = make_engine(max_loras=2, loader=loader)
    engine.add_lora(LoRARequest("x", None, "here"))
    by_name = LoRARequest("x")
    in_place = dataclasses.replace(by_name, load_inplace=True)
    registry = engine.adapters
    loader.written["here"] = "second"
    assert engine.add_lora(by_name)
    loader.written["here"] = "third"
    assert registry.get(in_place).version == make_adapter("third").version
    loop = EngineLoop(engine)
    loader.written["here"] = "fourth"
    assert loop.add_lora(in_place).result(SECONDS)
    loader.written["here"] = "fifth"
    inbox = submit(loop, "fifth", lora_request=in_place)
    assert inbox.last().outputs[0].token_ids == expected("fifth", 5)
    loader.written["here"] = "sixth"
    assert loop.add_lora(by_name).result(SECONDS)
    loop.shutdown()
    assert registry.names.find("x").request.lora_path == "here"
    assert registry.names.find("x").version == make_adapter("sixth").version
    check_nothing_is_held(engine)


def test_an_update_that_is_refused_changes_nothing() -> None:
    engine, _ = make_engine(max_loras=1, max_cpu_loras=1)
    engine.add_lora(LoRARequest("x"))
    engine.add_lora(LoRARequest("y"))
    with pytest.raises(AdapterError, match="max_cpu_loras=1"):
        update(engine, "x", "new")
    with pytest.raises(AdapterNotFoundError, match="'z'"):
        update(engine, "z", "new")
    engine.add_request("a", [1, 2], greedy(), LoRARequest("x"))
    assert run(engine)["a"].outputs[0].token_ids == expected("x")


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_what_cannot_be_read_again_ends_its_own_requests(kind: RequestOutputKind) -> None:
    loader = Loader()
    engine, _ = make_engine(max_loras=2, max_cpu_loras=1, loader=loader)
    for name in "xyz":
        engine.add_lora(LoRARequest(name))
    loader.written |= {"x": "changed", "y": None}
    for i, name in enumerate("zxyx"):
        params = greedy(output_kind=kind)
        engine.add_request(f"{i}{name}", [1, 2], params, LoRARequest(name))
    outputs = run(engine)
    for key in ("1x", "3x", "2y"):
        assert [c.finish_reason for c in outputs[key].outputs] == ["error"]
        assert outputs[key].finished
    assert isinstance(outputs["1x"].error, AdapterRefusedError)
    assert "'x' has changed" in str(outputs["1x"].error)
    assert isinstance(outputs["2y"].error, AdapterNotFoundError)
    assert outputs["0z"].error is None
    assert outputs["0z"].outputs[0].finish_reason == "length"
    check_nothing_is_held(engine)
    # Added again, the new content is served.
    assert engine.add_lora(LoRARequest("x"))
    engine.add_request("again", [1, 2], greedy(), LoRARequest("x"))
    assert run(engine)["again"].outputs[0].token_ids == expected("changed")


def test_the_loop_tells_only_those_whose_adapter_cannot_be_read_again() -> None:
    loader = Loader()
    engine, _ = make_engine(max_loras=2, max_cpu_loras=1, loader=loader)
    for name in "xyz":
        engine.add_lora(LoRARequest(name))
    loader.written["x"] = None
    loop = EngineLoop(engine)
    bad = submit(loop, "bad", lora_request=LoRARequest("x"))
    good = submit(loop, "good", lora_request=LoRARequest("y"))
    with pytest.raises(AdapterNotFoundError):
        bad.last()
    assert good.last().outputs[0].finish_reason == "length"
    loop.check()
    loop.shutdown()
    check_nothing_is_held(engine)


def test_the_loop_loads_in_place_beside_a_running_request() -> None:
    loader = Loader()
    engine, _ = make_engine(max_loras=2, loader=loader)
    loop = EngineLoop(engine)
    here = LoRARequest("x", None, "here")
    assert loop.add_lora(here).result(SECONDS) is True
    loader.written["here"] = "new"
    again = LoRARequest("x", None, "here", load_inplace=True)
    old = submit(loop, "old", lora_request=here)
    inbox = submit(loop, "new", lora_request=again)
    assert old.last().outputs[0].token_ids == expected("here", 5)
    assert inbox.last().outputs[0].token_ids == expected("new", 5)
    assert loop.add_lora(again).result(SECONDS) is False
    loader.written["here"] = "newest"
    assert loop.add_lora(here).result(SECONDS) is True
    update = loop.ask(lambda engine: engine.update_request("x", {"content": "made"}))
    request = update.result(SECONDS)
    assert loop.add_lora(request).result(SECONDS) is True
    made = submit(loop, "made", lora_request=LoRARequest("x"))
    assert made.last().outputs[0].token_ids == expected("made", 5)
    loop.shutdown()
    check_nothing_is_held(engine)


def test_staging_holds_up_nobody_else() -> None:
    threads = Reader()
    engine, _ = make_engine(max_loras=2, staging=make_staging(threads, max_adapters=1))
    engine.add_request("x", [1, 2], greedy(), LoRARequest("x"))
    engine.add_request("base", [1, 2], greedy(20))
    for _ in range(5):
        assert {output.request_id for output in engine.step()} <= {"base"}
    engine.add_request("y", [1, 2], greedy(), LoRARequest("y"))
    engine.step()
    threads.run()
    for _ in range(2):
        engine.step()
    # One at a time is all there is room for.
    running = [sequence.request_id for sequence in engine.scheduler.running]
    assert running == ["x", "base"]
    threads.run()
    outputs = run(engine)
    assert outputs["x"].outputs[0].token_ids == expected("x")
    assert outputs["y"].outputs[0].token_ids == expected("y")
    check_nothing_is_held(engine)


def waits_of(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Lets an engine that has nothing to do wait for long, and counts how often it begins to."""
    registry, waits = engine.adapters, threading.Semaphore(0)
    wait = registry.prefetch.wait

    def counted(seconds: float) -> None:
        waits.release()
        wait(seconds)

    monkeypatch.setattr(engine_module, "_IDLE_WAIT_S", 2 * SECONDS)
    monkeypatch.setattr(registry.prefetch, "wait", counted)
    return waits


def test_what_is_staged_before_the_wait_for_it_begins_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = Reader()
    engine, _ = make_engine(max_loras=2, staging=make_staging(threads))
    for name in "xy":
        engine.add_request(name, [1, 2], greedy(), LoRARequest(name))
    waits_of(engine, monkeypatch)
    schedule = engine.scheduler.schedule

    def late() -> Plan:
        plan = schedule()
        if not plan.rows:
            # One of the two.
            threads.run(1)
        return plan

    monkeypatch.setattr(engine.scheduler, "schedule", late)
    began = time.monotonic()
    assert run(engine)["x"].outputs[0].token_ids == expected("x")
    assert time.monotonic() - began < SECONDS
    check_nothing_is_held(engine)


def test_a_message_ends_the_wait_for_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Reader()
    engine, _ = make_engine(max_loras=2, staging=make_staging(threads))
    waits = waits_of(engine, monkeypatch)
    loop = EngineLoop(engine)
    x = submit(loop, "x", lora_request=LoRARequest("x"))
    assert waits.acquire(timeout=SECONDS)
    assert submit(loop, "base").last().outputs[0].token_ids == expected(None, 5)
    # So does an adapter that is read meanwhile: it can be staged then.
    y = submit(loop, "y", lora_request=LoRARequest("y"))
    wait_until(lambda: len(threads._calls) >= 2)
    assert len(threads._calls) == 2
    threads.run()
    assert x.last().outputs[0].token_ids == expected("x", 5)
    assert y.last().outputs[0].token_ids == expected("y", 5)
    loop.shutdown()
    check_nothing_is_held(engine)


def test_who_waits_for_the_room_of_what_nobody_wants_sleeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, arrived = ThreadPoolExecutor(2), threading.Event()
    staging = StagingArea(
        lambda adapter: (arrived.wait(SECONDS), adapter)[1],
        size_of=lambda adapter: 1,
        threads=threads,
        max_bytes=1,
    )
    engine, _ = make_engine(max_loras=2, staging=staging)
    monkeypatch.setattr(engine_module, "_IDLE_WAIT_S", 0.02)
    engine.add_request("x", [1, 2], greedy(), LoRARequest("x"))
    engine.step()
    engine.abort_request("x")
    engine.add_request("y", [1, 2], greedy(), LoRARequest("y"))
    # The first has news of what is there to see to.
    assert not engine.step()
    began, num_steps = time.monotonic(), 0
    while time.monotonic() - began < 0.2:
        assert not engine.step()
        num_steps += 1
    assert num_steps <= 10
    arrived.set()
    assert run(engine)["y"].outputs[0].token_ids == expected("y")
    threads.shutdown()
    check_nothing_is_held(engine)


def test_what_is_urgent_is_staged_first() -> None:
    threads = Reader()
    engine, _ = make_engine(max_loras=1, staging=make_staging(threads, max_adapters=1))
    engine.add_request("long", [1, 2], greedy(20), LoRARequest("long"))
    engine.step()
    threads.run()
    engine.step()
    engine.add_request("x", [1, 2], greedy(), LoRARequest("x"))
    engine.step()
    threads.run()
    engine.add_request("y", [1, 2], greedy(), LoRARequest("y"), priority=-1)
    engine.step()
    threads.run()
    # It took the room of what is staged and waits for the slot.
    registry = engine.adapters
    ready = [each.name for each in registry.names.entries() if registry.is_ready(each)]
    assert ready == ["long", "y"]
    order = []
    while engine.has_unfinished_requests():
        order += [output.request_id for output in engine.step() if output.finished]
        threads.run()
    assert order == ["long", "y", "x"]
    check_nothing_is_held(engine)


def test_what_is_held_between_two_requests_makes_room_for_who_waits() -> None:
    """A beam search asks again, and waits its turn then."""
    engine, _ = make_engine(max_loras=1, staging=make_staging(max_adapters=1))
    held = HeldVersion()
    engine.add_request("first", [1, 2], greedy(1), LoRARequest("beams"), held=held)
    run(engine)
    engine.add_request("long", [1, 2], greedy(20), LoRARequest("long"))
    for _ in range(4):
        engine.step()
    engine.add_request("x", [1, 2], greedy(), LoRARequest("x"))
    engine.step()
    engine.add_request("second", [1, 3], greedy(1), LoRARequest("beams"), held=held)
    engine.step()
    registry = engine.adapters
    ready = [each.name for each in registry.names.entries() if registry.is_ready(each)]
    assert ready == ["long", "x"]
    assert list(run(engine)) == ["long", "x", "second"]
    engine.adapters.end_hold(held)
    check_nothing_is_held(engine)


def test_what_cannot_be_staged_ends_its_own_requests() -> None:
    def stage(adapter: Adapter) -> Adapter:
        if adapter.version == make_adapter("large").version:
            raise AdapterCapacityError("no memory")
        return adapter

    staging = make_staging()
    staging._stage = stage
    engine, _ = make_engine(max_loras=2, staging=staging)
    for name in ("large", "small"):
        engine.add_request(name, [1, 2], greedy(), LoRARequest(name))
    outputs = run(engine)
    assert str(outputs["large"].error) == "no memory"
    assert outputs["small"].outputs[0].token_ids == expected("small")
    check_nothing_is_held(engine)


def test_a_request_that_gets_no_slot_ends_past_the_deadline() -> None:
    engine, _ = make_engine(max_loras=2, lora_slot_timeout=60)
    now = 0.0
    engine._slot_deadline._clock = lambda: now
    engine.add_lora(LoRARequest("pinned"))
    engine.pin_lora(1)
    # Of ten requests for y each is over before the deadline, so that a slot changes hands.
    for i in range(10):
        engine.add_request(f"y{i}", [1, 2], greedy(8), LoRARequest("y"))
        engine.add_request(f"z{i}", [1, 2], greedy(8), LoRARequest("z"))
    errors = {}
    while engine.has_unfinished_requests():
        now += 5
        errors |= {output.request_id: output.error for output in engine.step()}
    assert set(errors.values()) == {None}
    engine.add_request("long", [1, 2], greedy(29), LoRARequest("y"))
    engine.add_request("late", [1, 2], greedy(), LoRARequest("z"))
    engine.add_request("base", [1, 2], greedy())
    for seconds in (0, 0, 60, 1):
        now += seconds
        outputs = {output.request_id: output for output in engine.step()}
        assert "late" not in outputs or now > 160
    late = outputs["late"]
    assert isinstance(late.error, AdapterCapacityError)
    assert str(late.error) == (
        "no slot for adapter 'z' in 60 s, in which none changed hands: of max_loras=2 slots 1 are "
        "in use, 1 are pinned; remove_lora a pinned one, or raise max_loras or lora_slot_timeout"
    )
    outputs = run(engine)
    assert set(outputs) == {"long", "base"}
    assert {output.error for output in outputs.values()} == {None}
    check_nothing_is_held(engine)


def pinned(loop: EngineLoop, lora_int_id: int) -> Future[bool]:
    """What tells when a pinned adapter is in its slot."""
    assert loop.ask(lambda engine: engine.pin_lora(lora_int_id)).result(SECONDS)
    return loop.until(lambda engine: engine.adapters.is_placed(lora_int_id))


async def gathered(*calls: Coroutine[Any, Any, bool]) -> list[bool]:
    return await asyncio.gather(*calls)


def test_the_loop_answers_when_an_adapter_is_gone_or_in_its_slot() -> None:
    threads = Reader()
    engine, _ = make_engine(
        max_loras=1, max_model_len=200, staging=make_staging(threads), max_cpu_loras=2
    )
    for name in ("x", "y"):
        engine.add_lora(LoRARequest(name))
    llm = AsyncLLM(engine)
    loop = llm._loop
    placed = pinned(loop, 1)
    assert loop.ask(LLMEngine.list_loras).result(SECONDS) == {1, 2}
    assert not placed.done()
    while not placed.done():
        threads.run()
    assert placed.result() is True
    inbox = submit(loop, "x", params=greedy(150), lora_request=LoRARequest("x"))
    removed = [llm.remove_lora(1, wait=True) for _ in range(2)]
    assert asyncio.run(gathered(*removed)) == [True, False]
    # All it held is free by now, and its request had every token.
    assert loop.ask(LLMEngine.get_metrics).result(SECONDS)["jaxlora:adapters_on_host"] == 1
    assert len(inbox.last().outputs[0].token_ids) == 150
    assert asyncio.run(llm.remove_lora(2, wait=True))
    with pytest.raises(AdapterNotFoundError, match="no adapter has id 2"):
        pinned(loop, 2)
    loop.shutdown()
    check_nothing_is_held(engine)


def test_a_removal_waits_for_requests_of_earlier_versions_too() -> None:
    engine, _ = make_engine(max_loras=3, max_model_len=300)
    engine.add_lora(LoRARequest("x"))
    llm = AsyncLLM(engine)
    loop = llm._loop
    first = submit(loop, "first", params=greedy(200), lora_request=LoRARequest("x"))
    assert loop.ask(LLMEngine.list_loras).result(SECONDS) == {1}
    request = LoRARequest.from_tensors("x", {"content": "y"}, {}, load_inplace=True)
    assert loop.add_lora(request).result(SECONDS)
    second = submit(loop, "second", params=greedy(2), lora_request=LoRARequest("x"))
    assert second.last().finished
    assert asyncio.run(llm.remove_lora(1, wait=True))
    metrics = loop.ask(LLMEngine.get_metrics).result(SECONDS)
    assert (metrics["vllm:num_requests_running"], metrics["jaxlora:adapters_on_host"]) == (0, 0)
    adapter = make_adapter("x")
    tokens = complete([1, 2], greedy(200), adapter, max_model_len=300)
    assert first.last().outputs[0].token_ids == tokens
    loop.shutdown()
    check_nothing_is_held(engine)


def test_a_pin_that_fails_tells_who_waits_for_it() -> None:
    loader, threads = Loader(), Reader()
    engine, _ = make_engine(max_loras=1, max_cpu_loras=2, loader=loader, readers=threads)
    for name in ("x", "y", "z"):
        engine.add_lora(LoRARequest(name))
    loader.written["x"] = None
    loop = EngineLoop(engine)
    placed = pinned(loop, 1)
    while not placed.done():
        threads.run()
    with pytest.raises(AdapterNotFoundError, match="'x'"):
        placed.result()
    placed = pinned(loop, 1)
    assert loop.ask(lambda engine: engine.remove_lora(1)).result(SECONDS)
    with pytest.raises(AdapterNotFoundError, match="removed before it had a slot"):
        placed.result(SECONDS)
    assert pinned(loop, 3).result(SECONDS) is True
    loop.shutdown()


BY_VERSION = {make_adapter(each).version: each for each in [*"abcd", "one", "two", "three"]}


class EngineMachine(RuleBasedStateMachine):
    """Every request yields what its adapter was when it was queued, or says why it cannot."""

    names = st.sampled_from("abcd")
    contents = st.sampled_from(["one", "two", "three"])

    @initialize(
        room=st.sampled_from([None, 1, 2, 3]),
        num_slots=st.integers(1, 3),
        max_staged=st.sampled_from([None, 1, 2]),
    )
    def start(self, room: int | None, num_slots: int, max_staged: int | None) -> None:
        self.room, self.loader, self.was_pinned = room, Loader(), False
        self.engine, _ = make_engine(
            max_loras=num_slots,
            max_cpu_loras=room,
            loader=self.loader,
            readers=Inline(),
            staging=make_staging(max_adapters=max_staged),
            num_pages=14,
        )
        self.wanted: dict[str, Registered | None] = {}
        self.got: dict[str, RequestOutput] = {}

    @rule(name=st.none() | names)
    def request(self, name: str | None) -> None:
        key = str(len(self.wanted))
        if name is None or self.try_to(self.engine.add_lora, LoRARequest(name)):
            lora = None if name is None else LoRARequest(name)
            if self.try_to(self.engine.add_request, key, [1, 2], greedy(), lora):
                self.wanted[key] = None if name is None else self.find(name)

    @rule(name=names, content=contents)
    def write(self, name: str, content: str) -> None:
        self.loader.written[name] = content

    @rule(name=names)
    def add(self, name: str) -> None:
        self.try_to(self.engine.add_lora, LoRARequest(name, load_inplace=True))

    @rule(name=names, content=contents)
    def update(self, name: str, content: str) -> None:
        if self.find(name) is not None and self.try_to(update, self.engine, name, content):
            entry = self.find(name)
            assert entry is not None
            assert BY_VERSION[entry.version] == content

    @rule(name=names)
    def remove(self, name: str) -> None:
        entry = self.find(name)
        if entry is not None:
            assert self.engine.remove_lora(entry.lora_int_id)

    @rule(name=names)
    def pin(self, name: str) -> None:
        entry = self.find(name)
        if entry is not None:
            self.was_pinned = True
            self.try_to(self.engine.pin_lora, entry.lora_int_id)

    @rule()
    def step(self) -> None:
        self.got |= {output.request_id: output for output in self.engine.step()}

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.got |= run(self.engine)
        check_nothing_is_held(self.engine)
        for key, entry in self.wanted.items():
            output, tokens = self.got[key], self.got[key].outputs[0].token_ids
            right = expected(None if entry is None else BY_VERSION[entry.version])
            if output.error is None:
                assert tokens == right
            else:
                assert self.room is not None
                assert "has changed" in str(output.error)
                assert tokens == right[: len(tokens)]

    def find(self, name: str) -> Registered | None:
        registry = self.engine.adapters
        return registry.names._by_name.get(name)

    def try_to(self, change: Any, *arguments: Any) -> bool:
        """False if there is no room on the host or no slot, which a change may say where room is
        limited or something was pinned."""
        try:
            change(*arguments)
        except AdapterCapacityError:
            assert self.room is not None or self.was_pinned
            return False
        return True


EngineMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
test_any_history = EngineMachine.TestCase
