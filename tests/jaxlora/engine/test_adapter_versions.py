"""Versions and tiers under traffic, simulated: each request is served what it was queued with."""

from __future__ import annotations

from concurrent.futures import Executor, Future
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from jaxlora.adapters.registry import Registered
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.loop import EngineLoop
from jaxlora.errors import (
    AdapterCapacityError,
    AdapterError,
    AdapterNotFoundError,
    AdapterRefusedError,
)
from jaxlora.types import LoRARequest, RequestOutput, RequestOutputKind, SamplingParams
from tests.jaxlora.engine.simulator import (
    Loader,
    Reader,
    check_nothing_is_held,
    complete,
    make_adapter,
    make_engine,
    run,
)
from tests.jaxlora.engine.test_loop import SECONDS, submit


def greedy(max_tokens: int = 6, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)


def expected(content: str | None, max_tokens: int = 6) -> list[int]:
    adapter = None if content is None else make_adapter(content)
    return complete([1, 2], greedy(max_tokens), adapter, max_model_len=32)


class Inline(Executor):
    """Reads at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        reader = Reader()
        future = reader.submit(fn, *args, **kwargs)
        reader.run()
        return future


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


def test_a_request_may_load_in_place() -> None:
    loader = Loader()
    engine, _ = make_engine(max_loras=2, loader=loader)
    engine.add_request("old", [1, 2], greedy(), LoRARequest("x", None, "one"))
    engine.add_request("new", [1, 2], greedy(), LoRARequest("x", None, "two", load_inplace=True))
    outputs = {key: output.outputs[0].token_ids for key, output in run(engine).items()}
    assert outputs == {"old": expected("one"), "new": expected("two")}
    assert engine.list_loras() == {1}


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
    request = loop.ask("update_request", "x", {"content": "made"}).result(SECONDS)
    assert loop.add_lora(request).result(SECONDS) is True
    made = submit(loop, "made", lora_request=LoRARequest("x"))
    assert made.last().outputs[0].token_ids == expected("made", 5)
    loop.shutdown()
    check_nothing_is_held(engine)


BY_VERSION = {make_adapter(each).version: each for each in [*"abcd", "one", "two", "three"]}


class EngineMachine(RuleBasedStateMachine):
    """Every request yields what its adapter was when it was queued, or says why it cannot."""

    names = st.sampled_from("abcd")
    contents = st.sampled_from(["one", "two", "three"])

    @initialize(room=st.sampled_from([None, 1, 2, 3]), num_slots=st.integers(1, 3))
    def start(self, room: int | None, num_slots: int) -> None:
        self.room, self.loader = room, Loader()
        self.engine, _ = make_engine(
            max_loras=num_slots,
            max_cpu_loras=room,
            loader=self.loader,
            readers=Inline(),
            num_pages=14,
        )
        self.wanted: dict[str, Registered | None] = {}
        self.got: dict[str, RequestOutput] = {}

    @rule(name=st.none() | names)
    def request(self, name: str | None) -> None:
        key = str(len(self.wanted))
        if name is None or self.try_to(self.engine.add_lora, LoRARequest(name)):
            lora = None if name is None else LoRARequest(name)
            self.engine.add_request(key, [1, 2], greedy(), lora)
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
        registry = self.engine._registry
        assert registry is not None
        return registry._by_name.get(name)

    def try_to(self, change: Any, *arguments: Any) -> bool:
        """False if there is no room on the host, which a change may say where room is limited."""
        try:
            change(*arguments)
        except AdapterCapacityError:
            assert self.room is not None
            return False
        return True


EngineMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30)
test_any_history = EngineMachine.TestCase
