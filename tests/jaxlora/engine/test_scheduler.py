"""Promises of the scheduler, seen in its plans and in the tokens of a simulated device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.scheduler import Plan
from jaxlora.engine.turns import SlotTurns
from jaxlora.structured_outputs import StructuredOutputsParams
from jaxlora.types import LoRARequest, SamplingParams
from tests.jaxlora.engine.simulator import (
    GRAMMARS,
    VOCAB_SIZE,
    Device,
    check_nothing_is_held,
    check_ownership,
    complete,
    make_adapter,
    make_engine,
    run,
)


def endless(max_tokens: int | None = None, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens, **params)


def shape(plan: Plan) -> dict[str, int]:
    """Tokens of each request in a plan."""
    return {row.sequence.request_id: row.num_tokens for row in plan.rows}


def test_decoding_goes_on_while_a_long_prompt_is_read_in_chunks() -> None:
    engine, device = make_engine(step_sizes=(8,))
    for name in "abc":
        engine.add_request(name, [1, 2], endless(12))
    engine.step()
    engine.add_request("long", [3] * 22, endless(4))
    outputs = run(engine)
    # Two full chunks of what three decoding requests leave, and so on to the prompt's end.
    decoding = {"a": 1, "b": 1, "c": 1}
    assert shape(device.plans[0]) == {"a": 2, "b": 2, "c": 2}
    for plan in device.plans[1:5]:
        assert shape(plan) == {**decoding, "long": 5}
    assert shape(device.plans[5]) == {**decoding, "long": 2}
    assert [row.samples for row in device.plans[4].rows] == [True, True, True, False]
    assert [row.samples for row in device.plans[5].rows] == [True, True, True, True]
    assert outputs["long"].outputs[0].token_ids == complete([3] * 22, endless(4), max_model_len=32)


def test_prompts_that_leave_much_of_a_step_empty_are_read_in_smaller_ones() -> None:
    engine, device = make_engine(step_sizes=(8, 32), max_num_seqs=4)
    for i, name in enumerate("abcd"):
        engine.add_request(name, [i] * 5, endless(9))
    run(engine)
    read = [{"a": 5, "b": 3}, {"a": 1, "b": 2, "c": 5}, {"a": 1, "b": 1, "c": 1, "d": 5}]
    assert [shape(plan) for plan in device.plans[:3]] == read
    # Four steps of 8 are no less than one of 32, and who waits for a row is not counted.
    for i, name in enumerate("efgh"):
        engine.add_request(name, [4, i] * 3 + [4], endless(9))
    engine.add_request("i", [5] * 20, endless(1))
    before = len(device.plans)
    run(engine)
    assert shape(device.plans[before]) == dict.fromkeys("efgh", 7)


@pytest.mark.parametrize(
    ("caching", "read"), [(True, {"a": 4, "b": 4}), (False, {"a": 20, "b": 6})]
)
def test_what_is_cached_of_a_prompt_makes_no_step_larger(
    caching: bool, read: dict[str, int]
) -> None:
    engine, device = make_engine(step_sizes=(8, 32), enable_prefix_caching=caching)
    prompt = [i % 9 + 1 for i in range(20)]
    engine.add_request("before", prompt, endless(1))
    run(engine)
    before = len(device.plans)
    # 4 of these 20 tokens are not in a full page that is found.
    engine.add_request("a", prompt, endless(2))
    engine.add_request("b", [7] * 6, endless(2))
    run(engine)
    assert shape(device.plans[before]) == read


def test_who_waits_for_another_s_pages_makes_no_step_larger() -> None:
    engine, device = make_engine(step_sizes=(8, 32))
    for name in "abcd":
        engine.add_request(name, [1, 2, 3] * 3, endless(2))
    run(engine)
    assert [shape(plan) for plan in device.plans[:2]] == [{"a": 8}, dict.fromkeys("abcd", 1)]


def test_who_waits_for_a_running_one_s_pages_makes_no_step_larger() -> None:
    engine, device = make_engine(step_sizes=(8, 32))
    engine.add_request("a", [1, 2, 3] * 8, endless(2))
    engine.step()
    engine.add_request("b", [1, 2, 3] * 8, endless(2))
    run(engine)
    assert [shape(plan) for plan in device.plans[:3]] == [{"a": 8}] * 3


def test_nobody_waits_for_the_pages_of_one_behind_it() -> None:
    engine, device = make_engine(step_sizes=(8, 32))
    engine.add_request("a", [1, 2, 3] * 8, endless(2))
    engine.step()
    engine.add_request("urgent", [1, 2, 3] * 8, endless(2), priority=-1)
    run(engine)
    assert shape(device.plans[1]) == {"a": 16, "urgent": 16}


def test_pages_that_are_found_are_not_free_for_others() -> None:
    engine, device = make_engine(step_sizes=(8, 32), num_pages=12)
    engine.add_request("before", [1, 2, 3, 4] * 5, endless(1))
    run(engine)
    before = len(device.plans)
    # It takes 8 of the pages, 5 of them with what was computed; the other would need 6.
    engine.add_request("a", [1, 2, 3, 4] * 5 + [5] * 9, endless(2))
    engine.add_request("b", [2] * 22, endless(2))
    run(engine)
    assert shape(device.plans[before]) == {"a": 8}


def test_who_has_no_pages_makes_no_step_larger() -> None:
    engine, device = make_engine(step_sizes=(8, 32), num_pages=6)
    engine.add_request("a", [1] * 10, endless(2))
    engine.add_request("b", [2] * 22, endless(2))
    run(engine)
    assert shape(device.plans[0]) == {"a": 8}


def test_who_has_no_pages_makes_no_step_smaller_for_those_before_it() -> None:
    engine, device = make_engine(step_sizes=(8, 32), num_pages=11, max_loras=1)
    engine.add_request("x", [2], endless(2), lora("x"))
    engine.step()
    engine.add_request("small", [2] * 9, endless(2), lora("x"))
    engine.add_request("base", [1] * 20, endless(2))
    engine.add_request("big", [2] * 30, endless(2), lora("x"))
    run(engine)
    assert {"x": 1, "small": 9, "base": 20} in map(shape, device.plans)


def test_a_prompt_whose_adapter_has_no_slot_makes_no_step_larger() -> None:
    engine, device = make_engine(step_sizes=(8, 32), max_loras=1)
    engine.add_request("x", [2], endless(20), lora_request=LoRARequest("x", None, "x"))
    engine.step()
    engine.add_request("base", [1] * 9, endless(2))
    engine.add_request("y", [1] * 20, endless(2), lora_request=LoRARequest("y", None, "y"))
    run(engine)
    assert shape(device.plans[1]) == {"x": 1, "base": 7}


def test_decoding_sequences_come_before_prompts_when_the_budget_is_tight() -> None:
    engine, device = make_engine(max_num_seqs=4, step_sizes=(4,))
    for name in "abcd":
        engine.add_request(name, [1, 2, 3, 4, 5, 6], endless(20))
    run(engine)
    starts = {
        name: min(i for i, p in enumerate(device.plans) if name in shape(p)) for name in "abcd"
    }
    for plan, after in zip(device.plans, device.plans[1:], strict=False):
        decoding = {row.sequence.request_id for row in plan.rows if row.samples}
        ended = {row.sequence.request_id for row in plan.rows if row.kv_len == 25}
        assert decoding - ended <= set(shape(after))
    assert list(starts) == sorted(starts, key=starts.__getitem__)


@pytest.mark.parametrize("budget", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9, 16, 17])
def test_prompts_end_anywhere_in_a_chunk(length: int, budget: int) -> None:
    engine, device = make_engine(max_num_seqs=1, step_sizes=(budget,))
    prompt = [i % 5 + 1 for i in range(length)]
    engine.add_request("a", prompt, endless(6))
    outputs = run(engine)
    assert outputs["a"].outputs[0].token_ids == complete(prompt, endless(6), max_model_len=32)
    chunks = [row.num_tokens for plan in device.plans for row in plan.rows]
    full, rest = divmod(length, budget)
    assert chunks == [budget] * full + [rest] * (rest > 0) + [1] * 5


def test_the_youngest_is_preempted_and_computed_again() -> None:
    # Three pages of 4: two sequences grow until one must go.
    engine, device = make_engine(num_pages=3, max_model_len=12)
    prompts = {"old": [1, 2, 3], "young": [4, 5, 6]}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, endless())
    outputs = run(engine)
    assert engine.get_metrics()["vllm:num_preemptions"] == 1
    for name, prompt in prompts.items():
        assert outputs[name].outputs[0].token_ids == complete(prompt, endless(), max_model_len=12)
    shapes = [shape(plan) for plan in device.plans]
    gone = shapes.index({"old": 1})
    back = next(i for i in range(gone, len(shapes)) if "young" in shapes[i])
    # It had 3 + 2 tokens when it went, one of them in flight, and comes back with all of them.
    assert shapes[gone - 1] == {"old": 1, "young": 1}
    assert shapes[back] == {"young": 5}
    check_nothing_is_held(engine)


def test_a_preempted_sequence_is_first_in_the_queue() -> None:
    engine, _ = make_engine(num_pages=3, max_model_len=12)
    for name in ("old", "young"):
        engine.add_request(name, [1, 2, 3], endless())
    engine.step()
    engine.add_request("later", [1] * 8, endless())
    while not engine.scheduler.num_preemptions:
        engine.step()
    assert [s.request_id for s in engine.scheduler.waiting] == ["young", "later"]
    outputs = run(engine)
    ends = {name: output.metrics.finished_time for name, output in outputs.items()}
    assert sorted(ends, key=lambda name: ends[name] or 0) == ["old", "young", "later"]


def test_a_sequence_can_end_while_it_waits_to_be_computed_again() -> None:
    # The last token of "young" is in flight when it is preempted.
    engine, _ = make_engine(num_pages=3, max_model_len=12)
    engine.add_request("old", [1, 2, 3], endless())
    engine.add_request("young", [4, 5, 6], endless(3))
    outputs = run(engine)
    assert engine.scheduler.num_preemptions == 1
    expected = complete([4, 5, 6], endless(3), max_model_len=12)
    assert outputs["young"].outputs[0].token_ids == expected
    check_nothing_is_held(engine)


def test_what_waits_for_pages_is_not_overtaken() -> None:
    engine, device = make_engine(num_pages=8, step_sizes=(32,))
    engine.add_request("first", [1] * 14, endless(6))
    engine.add_request("big", [2] * 20, endless(2))
    engine.add_request("small", [1], endless(2))
    run(engine)
    firsts = [min(i for i, p in enumerate(device.plans) if n in shape(p)) for n in ("big", "small")]
    assert firsts[0] == firsts[1] > 0


def test_admission_leaves_room_for_the_next_token() -> None:
    # A page is free, which "b" fills to the last token: it would be preempted at once.
    engine, device = make_engine(num_pages=3, max_model_len=12)
    engine.add_request("a", [1] * 5, endless(2))
    engine.add_request("b", [1] * 4, endless(2))
    run(engine)
    assert set(shape(device.plans[0])) == {"a"}
    assert engine.scheduler.num_preemptions == 0


def lora(name: str) -> LoRARequest:
    return LoRARequest(name)


def test_waiting_for_a_slot_holds_up_nobody_else() -> None:
    engine, device = make_engine(max_loras=1, step_sizes=(16,))
    engine.add_request("a1", [1, 2], endless(6), lora("a"))
    engine.add_request("b1", [1, 2], endless(2), lora("b"))
    engine.add_request("base", [1, 2], endless(2))
    engine.add_request("a2", [1, 2], endless(2), lora("a"))
    engine.add_request("b2", [1, 2], endless(2), lora("b"))
    run(engine)
    assert set(shape(device.plans[0])) == {"a1", "base", "a2"}
    first = next(i for i, plan in enumerate(device.plans) if "b1" in shape(plan))
    # a1's last token is sampled in step 5, which has been read when step 7 is planned.
    assert first == 6
    assert set(shape(device.plans[first])) == {"b1", "b2"}
    assert [slot for plan in device.plans for slot, _ in plan.loads] == [0, 0]


def test_waiting_for_a_slot_holds_up_nobody_even_if_pages_are_short() -> None:
    engine, device = make_engine(num_pages=8, max_model_len=32, max_loras=1, step_sizes=(32,))
    engine.add_request("a", [1] * 10, endless(8), lora("a"))
    engine.add_request("big", [1] * 24, endless(2), lora("b"))
    engine.add_request("base", [1, 2], endless(2))
    run(engine)
    assert set(shape(device.plans[0])) == {"a", "base"}


# Priorities


def test_lower_priorities_are_admitted_first_and_equals_in_order() -> None:
    engine, device = make_engine(max_num_seqs=1)
    for name, priority in (("a", 0), ("b", 2), ("c", -1), ("d", 2), ("e", -1), ("f", 0)):
        engine.add_request(name, [1, 2], endless(2), priority=priority)
    run(engine)
    order = [name for plan in device.plans for name in shape(plan)]
    assert list(dict.fromkeys(order)) == list("ceafbd")


def test_nobody_is_preempted_to_admit_another() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    engine.add_request("first", [1, 2], endless(6), priority=9)
    engine.step()
    engine.add_request("urgent", [1, 2], endless(2), priority=-9)
    assert list(run(engine)) == ["first", "urgent"]
    assert engine.scheduler.num_preemptions == 0


def test_the_last_by_priority_is_preempted_then_the_youngest() -> None:
    def preempted(priorities: dict[str, int]) -> list[str]:
        engine, _ = make_engine(num_pages=6, max_model_len=24)
        for i, (name, priority) in enumerate(priorities.items()):
            engine.add_request(name, [i + 1, 2, 3], endless(12), priority=priority)
        while not engine.scheduler.num_preemptions:
            engine.step()
        waiting = [sequence.request_id for sequence in engine.scheduler.waiting]
        run(engine)
        check_nothing_is_held(engine)
        return waiting

    assert preempted({"a": 0, "b": 0, "c": 0}) == ["c"]
    assert preempted({"a": 1, "b": 0, "c": 0}) == ["a"]
    assert preempted({"a": 0, "b": 7, "c": -2}) == ["b"]


def test_prompts_are_read_by_priority() -> None:
    engine, device = make_engine(step_sizes=(8,))
    engine.add_request("a", [1] * 14, endless(2))
    engine.step()
    engine.add_request("b", [2] * 14, endless(2), priority=-1)
    run(engine)
    assert [shape(plan) for plan in device.plans[:3]] == [
        {"a": 8},
        {"a": 6, "b": 2},
        {"a": 1, "b": 7},
    ]
    engine, device = make_engine(step_sizes=(8,))
    engine.add_request("a", [1] * 20, endless(2))
    engine.add_request("b", [2] * 14, endless(2), priority=-1)
    run(engine)
    assert [shape(plan) for plan in device.plans[:3]] == [
        {"b": 8},
        {"b": 6, "a": 2},
        {"b": 1, "a": 7},
    ]


def test_a_step_that_scores_a_prompt_is_a_small_one() -> None:
    """Beside others, as far as there is room. What has no room waits for the next step, and nobody
    goes ahead of it meanwhile."""
    engine, device = make_engine(step_sizes=(16,), max_scored_step=8)
    scored = endless(2, prompt_logprobs=0)
    engine.add_request("a", [1] * 20, endless(8))
    engine.add_request("scored", [2] * 12, scored)
    engine.add_request("last of it", [3], scored)
    engine.add_request("b", [4] * 18, endless(2))
    run(engine)
    assert [shape(plan) for plan in device.plans[:5]] == [
        {"a": 16},
        {"a": 4, "scored": 4},
        {"a": 1, "scored": 7},
        {"a": 1, "scored": 1, "last of it": 1, "b": 13},
        {"a": 1, "scored": 1, "last of it": 1, "b": 5},
    ]
    # What was there before it took more than it may.
    engine, device = make_engine(step_sizes=(16,), max_scored_step=8)
    engine.add_request("a", [1] * 10, endless(8))
    engine.add_request("scored", [2] * 12, scored)
    engine.add_request("b", [4] * 10, endless(2))
    run(engine)
    assert [shape(plan) for plan in device.plans[:4]] == [
        {"a": 10},
        {"a": 1, "scored": 7},
        {"a": 1, "scored": 5, "b": 2},
        {"a": 1, "scored": 1, "b": 8},
    ]


def test_rows_are_ordered_by_slot_with_the_base_model_last() -> None:
    engine, device = make_engine(max_num_seqs=8, max_loras=3, step_sizes=(64,))
    for i, name in enumerate("-cab-cab"):
        engine.add_request(str(i), [1, 2], endless(3), None if name == "-" else lora(name))
    engine.step()
    slots = [row.sequence.slot for row in device.plans[0].rows]
    assert slots == [0, 0, 1, 1, 2, 2, -1, -1]
    # First come, first served within a slot.
    assert [row.sequence.request_id for row in device.plans[0].rows] == list("15263704")
    run(engine)


def workload(engine: LLMEngine) -> dict[str, list[int]]:
    """Requests that together wait, read prompts in chunks, decode and are preempted; and what
    they must yield."""
    requests = {
        "a": ([1, 2, 3], endless(7), "x"),
        "b": ([4, 5, 6, 7], endless(6), None),
        "c": ([3] * 7, endless(3), "y"),
        "d": ([2, 2], endless(3), "x"),
    }
    for request_id, (prompt, params, name) in requests.items():
        engine.add_request(request_id, prompt, params, lora(name) if name else None)
    return {
        request_id: complete(prompt, params, name and make_adapter(name), max_model_len=12)
        for request_id, (prompt, params, name) in requests.items()
    }


def small_engine() -> tuple[LLMEngine, Device]:
    return make_engine(
        num_pages=6,
        page_size=2,
        max_num_seqs=3,
        step_sizes=(4,),
        max_model_len=12,
        max_loras=1,
    )


def test_the_workload_covers_every_moment() -> None:
    engine, device = small_engine()
    expected = workload(engine)
    outputs = run(engine)
    assert {name: output.outputs[0].token_ids for name, output in outputs.items()} == expected
    assert engine.scheduler.num_preemptions
    assert any(not row.samples for plan in device.plans for row in plan.rows)
    assert len([load for plan in device.plans for load in plan.loads]) >= 2


@pytest.mark.parametrize("aborted", ["a", "b", "c", "d"])
def test_an_abort_at_any_moment_leaks_nothing_and_changes_nothing(aborted: str) -> None:
    at = 0
    unfinished = True
    while unfinished:
        engine, _ = small_engine()
        expected = workload(engine)
        outputs = {}
        for _ in range(at):
            outputs.update({output.request_id: output for output in engine.step()})
        unfinished = engine.has_unfinished_requests()
        engine.abort_request(aborted)
        check_ownership(engine.scheduler)
        outputs.update(run(engine))
        for name, tokens in expected.items():
            if name != aborted:
                assert outputs[name].outputs[0].token_ids == tokens
        check_nothing_is_held(engine)
        at += 1
    assert at > 15


@dataclasses.dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    sampling: dict[str, Any]
    """Keywords of SamplingParams: beartype draws random numbers, which strategies must not."""
    adapter: str | None
    abort_after: int | None
    priority: int


CONSTRAINTS = [
    StructuredOutputsParams(regex="[a-h]{2,9}"),
    StructuredOutputsParams(regex="(ab|[c-f]*o)+"),
    StructuredOutputsParams(choice=["abc", "abcdefg", "o"]),
    StructuredOutputsParams(grammar='start: "a" start "b" | "c"'),
]


@st.composite
def sampling(draw: st.DrawFn) -> dict[str, Any]:
    max_tokens = draw(st.integers(1, 12))
    return {
        "temperature": draw(st.sampled_from([0, 0, 1, 0.5])),
        "top_k": draw(st.sampled_from([0, 5])),
        "top_p": draw(st.sampled_from([1.0, 0.5])),
        "seed": draw(st.integers(0, 2**64 - 1)),
        "max_tokens": max_tokens,
        "min_tokens": draw(st.sampled_from([0, 0, max_tokens // 2, max_tokens])),
        "stop_token_ids": draw(st.lists(st.integers(1, 3), max_size=1)),
        "ignore_eos": draw(st.booleans()),
        "prompt_logprobs": draw(st.sampled_from([None, None, 0])),
        "structured_outputs": draw(st.sampled_from([None, None, None, *CONSTRAINTS])),
    }


ARRIVALS = st.builds(
    Arrival,
    step=st.integers(0, 15),
    prompt=st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=15),
    sampling=sampling(),
    adapter=st.sampled_from([None, "x", "y", "z"]),
    abort_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
)


@st.composite
def engine_sizes(draw: st.DrawFn) -> dict[str, Any]:
    page_size = draw(st.integers(1, 5))
    max_num_seqs = draw(st.integers(1, 5))
    largest = max_num_seqs + draw(st.integers(0, 8))
    return {
        # As few as hold one sequence, up to a few more.
        "num_pages": -(-16 // page_size) + draw(st.integers(0, 5)),
        "page_size": page_size,
        "max_num_seqs": max_num_seqs,
        "step_sizes": (
            *sorted(draw(st.sets(st.integers(1, largest - 1 or 1), max_size=2))),
            largest,
        ),
        "max_scored_step": draw(st.integers(max_num_seqs, largest)),
        "max_model_len": 16,
        "max_loras": draw(st.integers(1, 2)),
        "enable_prefix_caching": draw(st.booleans()),
        "patience": draw(st.sampled_from([0, 2, 64])),
        "residency": draw(st.sampled_from([0, 3])),
    }


@settings(max_examples=100)
@given(engine_sizes(), st.lists(ARRIVALS, min_size=1, max_size=8))
def test_any_workload_yields_what_each_request_yields_alone(
    sizes: dict[str, Any], arrivals: list[Arrival]
) -> None:
    turns = SlotTurns(patience=sizes.pop("patience"), min_residency=sizes.pop("residency"))
    engine, _ = make_engine(**sizes, turns=turns, grammars=GRAMMARS)
    params = [SamplingParams(**arrival.sampling) for arrival in arrivals]
    expected = [
        complete(
            arrival.prompt,
            params[i],
            arrival.adapter and make_adapter(arrival.adapter),
            max_model_len=16,
        )
        for i, arrival in enumerate(arrivals)
    ]
    seen: dict[str, list[int]] = {str(i): [] for i in range(len(arrivals))}
    for step in range(600):
        for i, arrival in enumerate(arrivals):
            if arrival.step == step:
                request = arrival.adapter and lora(arrival.adapter)
                engine.add_request(
                    str(i), arrival.prompt, params[i], request or None, priority=arrival.priority
                )
            if arrival.abort_after is not None and step == arrival.step + arrival.abort_after:
                engine.abort_request(str(i))
        for output in engine.step():
            tokens = output.outputs[0].token_ids
            assert tokens[:-1] == seen[output.request_id], "a token was lost or came twice"
            seen[output.request_id] = tokens
        if step > 15 and not engine.has_unfinished_requests():
            break
    for i, arrival in enumerate(arrivals):
        tokens = seen[str(i)]
        assert tokens == expected[i][: len(tokens)]
        assert tokens == expected[i] or arrival.abort_after is not None
    check_nothing_is_held(engine)
