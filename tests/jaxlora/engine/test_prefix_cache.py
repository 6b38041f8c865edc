"""Sharing what was computed changes no token, and computes nothing twice that it need not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlora
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.scheduler import Plan
from jaxlora.errors import RequestError
from jaxlora.outputs import RequestOutput
from jaxlora.types import LoRARequest, SamplingParams
from tests.jaxlora.engine.simulator import (
    Device,
    check_nothing_is_held,
    complete,
    make_adapter,
    make_engine,
    run,
)
from tests.jaxlora.peft_models import Reference

LONG = [1, 2, 3, 4, 5, 6, 7, 8, 9]
"""Two pages of 4 and one token more."""
SOME = ("r8-qv", "r16-all")


def endless(max_tokens: int = 3, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens, **params)


def computed(device: Device) -> dict[str, int]:
    """Tokens that were computed for each request."""
    counts: dict[str, int] = {}
    for row in (row for plan in device.plans for row in plan.rows):
        name = row.sequence.request_id
        counts[name] = counts.get(name, 0) + row.num_tokens
    return counts


def ask(
    engine: LLMEngine,
    name: str,
    prompt: Any,
    lora_request: LoRARequest | None = None,
    max_tokens: int = 3,
) -> RequestOutput:
    """Runs one request, alone, and checks its tokens."""
    engine.add_request(name, prompt, endless(max_tokens), lora_request)
    output = run(engine)[name]
    adapter = lora_request and make_adapter(lora_request.lora_path or lora_request.lora_name)
    ids = prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt
    expected = complete(ids, endless(max_tokens), adapter, max_model_len=32)
    assert output.outputs[0].token_ids == expected
    check_nothing_is_held(engine)
    return output


@pytest.mark.parametrize(
    ("length", "cached"), [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (10, 8), (12, 8)]
)
def test_full_pages_are_found_but_the_last_token_is_computed(length: int, cached: int) -> None:
    engine, device = make_engine(step_sizes=(16,))
    ask(engine, "first", LONG)
    prompt = [*LONG, 1, 1, 1][:length]
    assert ask(engine, "again", prompt).num_cached_tokens == cached
    # Two more of its three tokens are read in the cache.
    assert computed(device)["again"] == length - cached + 2
    metrics = engine.get_metrics()
    assert metrics["vllm:prefix_cache_queries"] == len(LONG) + length
    assert metrics["vllm:prefix_cache_hits"] == cached


def test_a_conversation_finds_its_answers_too() -> None:
    engine, _ = make_engine()
    first = ask(engine, "first", [1, 2, 3], max_tokens=9)
    answer = first.outputs[0].token_ids
    # 11 of these 12 tokens were read by the model, so two pages are full.
    second = ask(engine, "second", [1, 2, 3, *answer, 5, 6])
    assert second.num_cached_tokens == 8
    assert first.num_cached_tokens == 0


@pytest.mark.parametrize(("num_steps", "cached"), [(2, 0), (3, 4)])
def test_what_an_aborted_request_computed_is_found(num_steps: int, cached: int) -> None:
    engine, _ = make_engine()
    engine.add_request("a", [1, 2], endless(9))
    for _ in range(num_steps):
        engine.step()
    engine.abort_request("a")
    following = complete([1, 2], endless(9), max_model_len=32)
    # The last of the steps computed token num_steps, and nobody read the one it sampled.
    assert ask(engine, "b", [1, 2, *following[:8]]).num_cached_tokens == cached


def test_running_sequences_share_a_prompt_that_is_still_being_read() -> None:
    engine, device = make_engine(step_sizes=(16,))
    prompt = [i % 9 + 1 for i in range(20)]
    engine.add_request("first", prompt, endless(6))
    engine.add_request("second", [*prompt, 3], endless(6))
    engine.add_request("other", [7], endless(6))
    outputs = run(engine)
    # Its beginning is computed in the first two steps; then it is there.
    begun = next(i for i, plan in enumerate(device.plans) if "second" in names(plan))
    assert begun == 2
    assert names(device.plans[1]) == {"first", "other"}
    assert outputs["second"].num_cached_tokens == 20
    assert outputs["second"].outputs[0].token_ids == complete(
        [*prompt, 3], endless(6), max_model_len=32
    )
    check_nothing_is_held(engine)


def names(plan: Plan) -> set[str]:
    return {row.sequence.request_id for row in plan.rows}


def test_completions_of_one_prompt_share_its_pages() -> None:
    engine, device = make_engine(num_pages=6, step_sizes=(16,), max_num_seqs=4)
    params = SamplingParams(n=4, seed=3, max_tokens=3, ignore_eos=True)
    engine.add_request("a", LONG, params)
    output = run(engine)["a"]
    for i, completion in enumerate(output.outputs):
        alone = SamplingParams(seed=3 + i, max_tokens=3, ignore_eos=True)
        assert completion.token_ids == complete(LONG, alone, max_model_len=32)
    # Alone each would need 3 pages of the 6; together they need 2 + 4.
    assert max(len(plan.rows) for plan in device.plans) == 4
    assert computed(device)["a"] == len(LONG) + 3 * 1 + 4 * 2
    assert engine.scheduler.num_preemptions == 0


def test_the_base_model_and_each_adapter_have_pages_of_their_own() -> None:
    engine, _ = make_engine(max_loras=2)
    for name in (None, "x", "y"):
        request = LoRARequest(name) if name else None
        assert ask(engine, "first", LONG, request).num_cached_tokens == 0
        assert ask(engine, "again", LONG, request).num_cached_tokens == 8
    # What was evicted from its slot comes back with its pages.
    ask(engine, "z", LONG, LoRARequest("z"))
    assert ask(engine, "again", LONG, LoRARequest("x")).num_cached_tokens == 8
    assert ask(engine, "base", LONG).num_cached_tokens == 8


def test_prompts_of_another_salt_are_not_found() -> None:
    engine, _ = make_engine(max_loras=2)
    for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "\ud800"}):
        prompt: Any = {"prompt_token_ids": LONG, **salt}
        for name in (None, "x"):
            request = LoRARequest(name) if name else None
            assert ask(engine, "first", prompt, request).num_cached_tokens == 0
            assert ask(engine, "again", prompt, request).num_cached_tokens == 8


@pytest.mark.parametrize("salt", ["", 5, "x" * 1025])
@pytest.mark.usefixtures("without_types")
def test_what_can_be_no_salt_is_refused(salt: Any) -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError, match=r"cache_salt=.* must be text of 1 to 1024 characters"):
        engine.add_request("a", {"prompt_token_ids": LONG, "cache_salt": salt}, endless())


def test_pages_of_a_replaced_adapter_are_not_found() -> None:
    engine, _ = make_engine(max_loras=2)
    assert ask(engine, "old", LONG, LoRARequest("x", 1, "old")).num_cached_tokens == 0
    engine.remove_lora(1)
    assert ask(engine, "new", LONG, LoRARequest("x", 1, "new")).num_cached_tokens == 0
    # The same content under another name is the same adapter.
    assert ask(engine, "alias", LONG, LoRARequest("alias", 2, "new")).num_cached_tokens == 8


def test_what_was_preempted_goes_on_from_its_own_pages() -> None:
    # Five pages of 4: both grow until the younger must go, and its first page survives.
    engine, device = make_engine(num_pages=5, max_model_len=20)
    engine.add_request("old", [1, 2, 3], endless(13))
    engine.add_request("young", LONG[:5], endless(9))
    outputs = run(engine)
    assert engine.scheduler.num_preemptions == 1
    back = [row for plan in device.plans for row in plan.rows if row.sequence.request_id == "young"]
    resumed = [row for before, row in itertools.pairwise(back) if row.start < before.kv_len]
    assert [row.start for row in resumed] == [4]
    for name, prompt, count in (("old", [1, 2, 3], 13), ("young", LONG[:5], 9)):
        expected = complete(prompt, endless(count), max_model_len=20)
        assert outputs[name].outputs[0].token_ids == expected
    # Counted once, and as it was when it first ran.
    assert outputs["young"].num_cached_tokens == 0
    assert engine.get_metrics()["vllm:prefix_cache_queries"] == 8


def test_after_a_reset_nothing_is_found() -> None:
    engine, _ = make_engine()
    ask(engine, "a", LONG)
    assert engine.reset_prefix_cache()
    assert ask(engine, "b", LONG).num_cached_tokens == 0
    assert ask(engine, "c", LONG).num_cached_tokens == 8
    # What runs goes on, and what it adds is not found either.
    engine.add_request("running", LONG, endless(9))
    engine.step()
    engine.reset_prefix_cache()
    answer = run(engine)["running"].outputs[0].token_ids
    assert ask(engine, "d", [*LONG, *answer]).num_cached_tokens == 0


def test_after_a_reset_who_waits_finds_nothing_that_was_begun_before() -> None:
    engine, _ = make_engine(num_pages=3)
    engine.add_request("first", [1, 2, 3], endless(5))
    engine.step()
    answer = complete([1, 2, 3], endless(5), max_model_len=32)
    # There are no pages for it, which is known once it was looked for in the cache.
    engine.add_request("second", [1, 2, 3, *answer, 1], endless())
    engine.step()
    engine.reset_prefix_cache()
    # The page that was begun before the reset is completed.
    assert run(engine)["second"].num_cached_tokens == 0
    check_nothing_is_held(engine)


def test_after_a_failed_step_nothing_is_found() -> None:
    engine, device = make_engine(step_sizes=(16,))

    def fail(plan: Plan) -> None:
        raise RuntimeError("out of memory")

    accept, device.fail = device.fail, fail
    engine.add_request("a", LONG, endless())
    with pytest.raises(RuntimeError):
        engine.step()
    device.fail = accept
    assert ask(engine, "b", LONG).num_cached_tokens == 0


def test_prompts_whose_logprobs_are_wanted_are_computed() -> None:
    engine, device = make_engine(num_pages=12, step_sizes=(16,))
    ask(engine, "first", LONG)
    params = endless(prompt_logprobs=0)
    engine.add_request("scored", LONG, params)
    assert run(engine)["scored"].num_cached_tokens == 0
    assert computed(device)["scored"] == len(LONG) + 2
    assert engine.get_metrics()["vllm:prefix_cache_queries"] == len(LONG)


def test_off_means_nothing_is_shared() -> None:
    engine, device = make_engine(enable_prefix_caching=False)
    for name in ("a", "b"):
        assert ask(engine, name, LONG).num_cached_tokens == 0
        assert computed(device)[name] == len(LONG) + 2
    assert engine.get_metrics()["vllm:prefix_cache_queries"] == 0


@st.composite
def workloads(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Few ids, few beginnings, tiny pools."""
    page_size = draw(st.integers(1, 3))
    max_num_seqs = draw(st.integers(1, 5))
    sizes = {
        "num_pages": -(-16 // page_size) + draw(st.integers(0, 6)),
        "page_size": page_size,
        "max_num_seqs": max_num_seqs,
        "step_sizes": (max_num_seqs + draw(st.integers(0, 8)),),
        "max_model_len": 16,
        "max_loras": draw(st.integers(1, 2)),
    }
    beginnings = draw(st.lists(st.lists(st.integers(1, 3), max_size=10), min_size=1, max_size=2))
    ends = st.lists(st.integers(1, 2), min_size=1, max_size=4)
    request = st.fixed_dictionaries(
        {
            "step": st.integers(0, 20),
            "prompt": st.builds(list.__add__, st.sampled_from(beginnings), ends),
            "n": st.sampled_from([1, 1, 3]),
            "seed": st.integers(0, 2),
            "max_tokens": st.integers(1, 8),
            "ignore_eos": st.booleans(),
            "adapter": st.sampled_from([None, None, "x", "y", "z"]),
            "abort_after": st.sampled_from([None, None, None, 0, 2, 5]),
        }
    )
    return sizes, draw(st.lists(request, min_size=2, max_size=8))


def play(sizes: dict[str, int], requests: list[dict[str, Any]]) -> dict[tuple[str, int], list[int]]:
    engine, _ = make_engine(**sizes)
    seen: dict[tuple[str, int], list[int]] = {}
    for step in range(1000):
        for i, request in enumerate(requests):
            if request["step"] == step:
                names = ("n", "seed", "max_tokens", "ignore_eos")
                params = SamplingParams(**{name: request[name] for name in names})
                lora_request = LoRARequest(request["adapter"]) if request["adapter"] else None
                engine.add_request(str(i), request["prompt"], params, lora_request)
            after = request["abort_after"]
            if after is not None and step == request["step"] + after:
                engine.abort_request(str(i))
        for output in engine.step():
            for completion in output.outputs:
                seen[output.request_id, completion.index] = completion.token_ids
        if step > 20 and not engine.has_unfinished_requests():
            check_nothing_is_held(engine)
            return seen
    raise AssertionError("still unfinished")


@settings(max_examples=100)
@given(workloads())
def test_any_workload_yields_what_each_request_yields_alone(
    workload: tuple[dict[str, Any], list[dict[str, Any]]],
) -> None:
    sizes, requests = workload
    seen = play(sizes, requests)
    for i, request in enumerate(requests):
        adapter = request["adapter"] and make_adapter(request["adapter"])
        for index in range(request["n"]):
            params = SamplingParams(
                seed=request["seed"] + index,
                max_tokens=request["max_tokens"],
                ignore_eos=request["ignore_eos"],
            )
            expected = complete(request["prompt"], params, adapter, max_model_len=16)
            tokens = seen.get((str(i), index), [])
            assert tokens == expected[: len(tokens)]
            assert tokens == expected or request["abort_after"] is not None


def test_a_real_model_says_the_same_with_and_without(
    llm: jaxlora.LLM, reference: Reference
) -> None:
    cache = llm.llm_engine.scheduler.prefix_cache
    beginning = [i * 7 % 90 + 3 for i in range(40)]
    prompts = [[*beginning, *end] for end in ([7], [8, 9], [10, 11, 12])] * 2
    adapters = [None, *(LoRARequest(name, None, reference.paths[name]) for name in SOME)]
    params = [endless(24), endless(24), SamplingParams(seed=1, max_tokens=24, ignore_eos=True)]

    def tokens() -> list[list[int]]:
        outputs = [
            output
            for adapter in adapters
            for output in llm.generate(prompts, params * 2, lora_request=adapter, use_tqdm=False)
        ]
        hits.append([output.num_cached_tokens for output in outputs])
        return [output.outputs[0].token_ids for output in outputs]

    hits: list[list[int | None]] = []
    before = llm.get_metrics()["vllm:prefix_cache_hits"]
    try:
        cache.enabled = False
        alone = tokens()
        cache.enabled = True
        llm.reset_prefix_cache()
        assert tokens() == alone
    finally:
        cache.enabled = True
    size = llm.llm_engine.scheduler.pool.page_size
    # Of each six, five find the full pages of what the first computes.
    found = 40 // size * size
    assert hits == [[0] * 18, [0, *[found] * 5] * 3]
    assert llm.get_metrics()["vllm:prefix_cache_hits"] - before == 15 * found
