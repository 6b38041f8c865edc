"""Ctrl-C anywhere in a call of LLM: adapters are there or not, and nothing is held or kept.

It does not come to two of the places where Ctrl-C is held back: the tests of pieces and of blocks
of memory see to those.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import jaxlora
from jaxlora import LLM, LLMEngine, LoRARequest, SamplingParams, interrupts
from jaxlora.engine.scheduler import Plan
from tests.jaxlora.engine.simulator import check_nothing_is_held
from tests.jaxlora.test_llm import expected, make_llm, tokens_of

# Checking the types of whatever is passed takes longer than the calls.
pytestmark = pytest.mark.usefixtures("without_types")

PARAMS = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
SOURCES = str(Path(jaxlora.__file__).parent)
LEAST_LINES = 20
"""Of a call."""
LIMIT = 120
"""Seconds for a call and all that is looked at after it, which take some hundredths of one."""


def tensors(content: str) -> Any:
    return {"content": content}


def add_and_abort(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.add_request("one", [1], PARAMS, LoRARequest("goes"))
    engine.add_request("two", [1], PARAMS, LoRARequest("new"))
    engine.step()
    engine.abort_request(["one", "two"])


CALLS: dict[str, Callable[[LLM], object]] = {
    "add_lora": lambda llm: llm.add_lora(LoRARequest("new")),
    "update_lora": lambda llm: llm.update_lora("changes", tensors("new"), {}),
    "remove_lora": lambda llm: llm.remove_lora(1, wait=True),
    "pin_lora": lambda llm: llm.pin_lora(2, wait=True),
    "generate": lambda llm: llm.generate(
        [[1], [2], [3]],
        PARAMS,
        use_tqdm=False,
        lora_request=[LoRARequest("goes"), LoRARequest("new"), None],
    ),
    "abort_request": add_and_abort,
}


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails where the block waits for what will never come: a guard that is missing may leave an
    adapter for ever on its way."""

    def fail(number: int, frame: Any) -> None:
        pytest.fail(f"it is not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    # Again, should what is tidied up after the first wait, too.
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupted(
    call: Callable[[], object], at: int, counts: Callable[[str], bool] = lambda filename: True
) -> bool:
    """Whether the call ran so many lines of ours, in functions that ``counts`` says count when they
    are entered; Ctrl-C came before the last of them, when it was run for the first time."""
    seen: set[tuple[str, int]] = set()
    came = False

    def of_ours(frame: Any, event: str, argument: Any) -> Any:
        nonlocal came
        line = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and not came and line not in seen:
            seen.add(line)
            if len(seen) == at:
                came = True
                signal.raise_signal(signal.SIGINT)
        return of_ours

    def trace(frame: Any, event: str, argument: Any) -> Any:
        filename = frame.f_code.co_filename
        return of_ours if filename.startswith(SOURCES) and counts(filename) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        assert came
    finally:
        sys.settrace(before)
    return came


def drain(engine: LLMEngine) -> None:
    for _ in range(100):
        if engine.has_work():
            engine.step()
    assert not engine.has_work()
    check_nothing_is_held(engine)


def check(llm: LLM, call: str) -> None:
    engine, registry = llm.llm_engine, llm.llm_engine.adapters
    # LLM's next call begins with an empty queue; the engine's requests go on.
    assert not engine._requests or call == "abort_request"
    drain(engine)
    assert not engine._requests
    names = {entry.name for entry in registry.names.entries()}
    assert {"goes", "stays", "changes", "new"} >= names >= {"stays", "changes"}
    assert "goes" in names or call == "remove_lora"
    adapters = [LoRARequest(name) for name in ("goes", "stays", "new", "changes")]
    *others, changed = tokens_of(llm, [[5]] * 4, PARAMS, lora_request=adapters)
    assert others == [expected([5], PARAMS, name) for name in ("goes", "stays", "new")]
    contents = ("old", "new") if call == "update_lora" else ("old",)
    assert changed in [expected([5], PARAMS, content) for content in contents]
    for lora_int_id in llm.list_loras():
        llm.remove_lora(lora_int_id)
    drain(engine)
    assert not registry._pinned
    assert not registry._replacing
    assert not registry.slots.entries()
    assert len(registry.host) == 0


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_in_a_call_leaves_adapters_whole(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    llm, _ = make_llm(monkeypatch, max_loras=2)
    for at in itertools.count(1):
        with within(LIMIT):
            llm.add_lora(LoRARequest("goes", 1))
            llm.add_lora(LoRARequest("stays", 2))
            llm.add_lora(LoRARequest.from_tensors("changes", tensors("old"), {}))
            tokens_of(llm, [[1]], PARAMS, lora_request=LoRARequest("goes"))
            if not interrupted(lambda: CALLS[call](llm), at):
                assert at > LEAST_LINES
                break
            check(llm, call)


def test_a_second_ctrl_c_leaves_nothing_of_a_step_that_was_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt, adapter, first_came = [1, 2, 3, 4, 5, 6, 7, 8, 9], LoRARequest("x"), False

    def press(plan: Plan) -> None:
        nonlocal first_came
        first_came = True
        raise KeyboardInterrupt

    def generate(llm: LLM) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            llm.generate(prompt, PARAMS, use_tqdm=False, lora_request=adapter)

    # In the lines of what holds it back it is not held yet.
    def counts(filename: str) -> bool:
        return first_came and filename != interrupts.__file__

    for at in itertools.count(1):
        llm, device = make_llm(monkeypatch, max_loras=1)
        first_came, device.fail = False, press
        with within(LIMIT):
            second_came = interrupted(partial(generate, llm), at, counts)
            device.fail = lambda plan: None
            drain(llm.llm_engine)
            # The pages of its prompt were not written.
            assert tokens_of(llm, [prompt], PARAMS, lora_request=adapter) == [
                expected(prompt, PARAMS, "x")
            ]
        if not second_came:
            assert at > LEAST_LINES
            break
