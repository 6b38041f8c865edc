"""AsyncLLM: streams, cancellation, slow consumers, failure; simulated, then the tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from llguidance import LLParserLimits

import jaxlora
from jaxlora import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    EngineDeadError,
    GenerationError,
    LoRARequest,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from jaxlora.engine import adapter_calls
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.scheduler import Plan
from jaxlora.errors import ConfigError, RequestError
from jaxlora.outputs import LoRAStatus
from tests.jaxlora.awaited import awaited
from tests.jaxlora.engine.simulator import (
    Gate,
    PieceTokenizer,
    check_nothing_is_held,
    complete,
    letter_grammars,
    make_adapter,
    make_engine,
    saying,
)
from tests.jaxlora.patience import SECONDS
from tests.jaxlora.peft_models import KINDS, Reference, prompts

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


def greedy(max_tokens: int = 5, **params: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)


@contextlib.asynccontextmanager
async def serving(engine: LLMEngine) -> AsyncIterator[AsyncLLM]:
    """Asserts that nothing is left at the end."""
    llm = AsyncLLM(engine)
    try:
        yield llm
        while (await llm.get_metrics())["vllm:num_requests_running"]:
            await asyncio.sleep(0.001)
    finally:
        llm.shutdown()
    while engine.has_unfinished_requests():
        engine.step()
    check_nothing_is_held(engine)


async def last(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    outputs = [output async for output in stream]
    assert outputs[-1].finished
    return outputs[-1]


@awaited
async def test_a_stream_grows_to_the_whole_completion() -> None:
    engine, _ = make_engine()
    async with serving(engine) as llm:
        seen = [output async for output in llm.generate([1, 2], greedy(), "a")]
    expected = complete([1, 2], greedy(), max_model_len=32)
    tokens = [output.outputs[0].token_ids for output in seen]
    assert all(expected[: len(each)] == each for each in tokens)
    assert [len(each) for each in tokens] == sorted({len(each) for each in tokens})
    assert tokens[-1] == expected
    assert [o.outputs[0].finished() for o in seen] == [output.finished for output in seen]
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    assert {output.request_id for output in seen} == {"a"}


@awaited
async def test_structured_outputs_are_compiled_beside_the_engine() -> None:
    grammars = letter_grammars()
    threads: set[str] = set()
    compiles = grammars.compile

    def watched(params: StructuredOutputsParams) -> Any:
        if params not in grammars._kept:
            threads.add(threading.current_thread().name)
        return compiles(params)

    grammars.compile = watched  # type: ignore[method-assign]
    engine, _ = make_engine(grammars=grammars)
    good = StructuredOutputsParams(regex="[a-c]{4}")
    bad = StructuredOutputsParams(regex="a(b")
    async with serving(engine) as llm:
        free = asyncio.create_task(last(llm.generate([1, 2], greedy(20), "free")))
        params = SamplingParams(structured_outputs=good, temperature=0)
        constrained = asyncio.create_task(last(llm.generate([1], params, "good")))
        with pytest.raises(RequestError, match="unclosed group"):
            await last(llm.generate([1], SamplingParams(structured_outputs=bad), "bad"))
        outputs = await asyncio.gather(free, constrained)
    assert outputs[0].outputs[0].token_ids == complete([1, 2], greedy(20), max_model_len=32)
    assert outputs[1].outputs[0].token_ids == complete([1], params, max_model_len=32)
    assert threads
    assert "jaxlora-engine" not in threads


@awaited
async def test_what_a_grammar_costs_later_is_told_to_its_caller() -> None:
    limits = LLParserLimits(max_items_in_row=4, verbose_errors=False)
    engine, _ = make_engine(grammars=letter_grammars(limits=limits))
    costly = StructuredOutputsParams(grammar="start: x\nx: x x | /[a-e]/")
    async with serving(engine) as llm:
        free = asyncio.create_task(last(llm.generate([1, 2], greedy(20), "free")))
        params = SamplingParams(structured_outputs=costly)
        with pytest.raises(GenerationError, match="structured_outputs: "):
            await last(llm.generate([1], params, "costly"))
        tokens = (await free).outputs[0].token_ids
    assert tokens == complete([1, 2], greedy(20), max_model_len=32)


@awaited
async def test_many_streams_at_once() -> None:
    engine, _ = make_engine(max_loras=3, num_pages=24)
    names = [None, "v", "w", "x", "y", "z"]

    async def one(llm: AsyncLLM, i: int) -> None:
        name = names[i % len(names)]
        lora = LoRARequest(name) if name else None
        prompt = [1 + i % 7, 2 + i % 5]
        output = await last(llm.generate(prompt, greedy(i % 9 + 1), str(i), lora_request=lora))
        adapter = make_adapter(name) if name else None
        expected = complete(prompt, greedy(i % 9 + 1), adapter, max_model_len=32)
        assert output.outputs[0].token_ids == expected

    async with serving(engine) as llm:
        await asyncio.gather(*(one(llm, i) for i in range(200)))
        assert await llm.list_loras() == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("how", ["cancel", "break", "drop"])
@awaited
async def test_leaving_a_stream_aborts_its_request(how: str) -> None:
    engine, _ = make_engine(max_model_len=4096, num_pages=1024)
    async with serving(engine) as llm:
        endless = greedy(4000)
        if how == "cancel":
            task = asyncio.create_task(last(llm.generate([1], endless, "a")))
            while not (await llm.get_metrics())["vllm:num_requests_running"]:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            stream = llm.generate([1], endless, "a")
            await anext(stream)
            if how == "break":
                await stream.aclose()
            else:
                del stream
                gc.collect()
        while (await llm.get_metrics())["vllm:num_requests_running"]:
            await asyncio.sleep(0.001)
        # The id may be used again at once.
        assert (await last(llm.generate([1], greedy(), "a"))).outputs[0].token_ids
        assert (await llm.get_metrics())["vllm:generation_tokens"] < 4000


@awaited
async def test_leaving_a_stream_whose_id_is_in_use_leaves_its_owner_alone() -> None:
    engine, _ = make_engine(max_model_len=4096, num_pages=1024)
    async with serving(engine) as llm:
        first = llm.generate([1], greedy(200), "a")
        await anext(first)
        second = asyncio.create_task(last(llm.generate([2], greedy(200), "a")))
        # It has asked, and was not told yet.
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        output = await last(first)
        assert output.outputs[0].token_ids == complete([1], greedy(200), max_model_len=4096)


@awaited
async def test_what_a_caller_does_to_parameters_is_for_later_requests() -> None:
    engine, _ = make_engine()
    async with serving(engine) as llm:
        params = greedy(3)
        streams = [llm.generate([1, 2], params, "a")]
        params.max_tokens = 5
        streams.append(llm.generate([1, 2], params, "b"))
        params.max_tokens = 1
        for stream, count in zip(streams, (3, 5), strict=True):
            assert len((await last(stream)).outputs[0].token_ids) == count
        params.temperature = 3.0
        with pytest.raises(ValueError, match=r"temperature=3.0 must be in \[0, 2\]"):
            llm.generate([1, 2], params, "d")


@awaited
async def test_what_a_caller_does_to_an_output_is_the_callers() -> None:
    engine, _ = make_engine()
    async with serving(engine) as llm:
        tokens: list[int] = []
        async for output in llm.generate([1, 2], greedy(6), "a"):
            tokens = output.outputs[0].token_ids
            output.prompt_token_ids += tokens
        assert tokens == complete([1, 2], greedy(6), max_model_len=32)


@awaited
async def test_an_update_does_not_bring_back_what_is_removed_meanwhile() -> None:
    engine, _ = make_engine(max_loras=2)
    async with serving(engine) as llm:
        await llm.add_lora(LoRARequest("x", 1))
        calls = (llm.update_lora("x", {"content": "new"}), llm.remove_lora(1))
        refusal, removed = await asyncio.gather(*calls, return_exceptions=True)
        assert removed is True
        assert isinstance(refusal, jaxlora.AdapterNotFoundError)
        assert await llm.list_loras() == set()


@awaited
async def test_an_llm_leaves_the_engine_to_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine()
    monkeypatch.setattr(LLMEngine, "from_engine_args", lambda *args, **kwargs: engine)
    llm = LLM("model", use_tqdm=False)
    (expected,) = llm.generate([[1, 2]], greedy(), use_tqdm=False)
    async with serving(engine) as served:
        calls = (
            lambda: llm.generate([[1, 2]], greedy(), use_tqdm=False),
            lambda: llm.add_lora(LoRARequest("a")),
            lambda: engine.add_request("mine", [1, 2], greedy()),
            engine.step,
        )
        for call in calls:
            with pytest.raises(ValueError, match=r"the engine is an AsyncLLM's.*shut it down"):
                call()
        output = await last(served.generate([1, 2], greedy(), "theirs"))
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    (again,) = llm.generate([[1, 2]], greedy(), use_tqdm=False)
    assert again.outputs[0].token_ids == expected.outputs[0].token_ids


@awaited
async def test_an_engine_has_one_owner_and_can_have_another_later() -> None:
    engine, _ = make_engine(max_model_len=4096, num_pages=1024)
    engine.add_request("before", [1], greedy())
    with pytest.raises(ValueError, match="the engine has requests: step until"):
        AsyncLLM(engine)
    engine.abort_request("before")
    first = AsyncLLM(engine)
    with pytest.raises(ValueError, match="another AsyncLLM's: shut that one down first"):
        AsyncLLM(engine)
    left = asyncio.create_task(last(first.generate([1], greedy(4000), "left")))
    while not (await first.get_metrics())["vllm:num_requests_running"]:
        await asyncio.sleep(0.001)
    first.shutdown()
    with pytest.raises(EngineDeadError):
        await left
    async with serving(engine) as second:
        output = await last(second.generate([1], greedy(), "left"))
    assert output.outputs[0].token_ids == complete([1], greedy(), max_model_len=4096)


@awaited
async def test_abort_ends_a_stream_with_an_output() -> None:
    engine, _ = make_engine(max_model_len=4096, num_pages=1024)
    async with serving(engine) as llm:
        stream = llm.generate([1], greedy(4000), "a")
        await anext(stream)
        await llm.abort("a")
        output = await last(stream)
        assert output.outputs[0].finish_reason == "abort"
        await llm.abort(["a", "nobody"])


@pytest.mark.parametrize("kind", [RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA])
@awaited
async def test_a_slow_consumer_holds_up_nobody_and_gets_the_newest(kind: RequestOutputKind) -> None:
    engine, _ = make_engine(max_model_len=1024, num_pages=512)
    async with serving(engine) as llm:
        slow = llm.generate([1], greedy(500, output_kind=kind), "slow")
        first = await anext(slow)
        quick = await last(llm.generate([2], greedy(500), "quick"))
        assert len(quick.outputs[0].token_ids) == 500
        while (await llm.get_metrics())["vllm:num_requests_running"]:
            await asyncio.sleep(0.001)
        rest = [output async for output in slow]
        assert len(rest) == 1, "it kept one output, not 499"
        expected = complete([1], greedy(500), max_model_len=1024)
        got = rest[0].outputs[0].token_ids
        if kind is RequestOutputKind.DELTA:
            got = first.outputs[0].token_ids + got
        assert got == expected


@awaited
async def test_text_is_streamed_and_long_prompts_keep_theirs() -> None:
    tokenizer = PieceTokenizer(*"abcdefghijklmno")
    engine, _ = make_engine(model=saying(2, 3, 4), tokenizer=tokenizer)
    async with serving(engine) as llm:
        output = await last(llm.generate("a", greedy(3), "short"))
        assert (output.prompt, output.outputs[0].text) == ("a", "bcd")
        assert llm.get_tokenizer() is tokenizer
    engine, _ = make_engine(
        max_model_len=6000, num_pages=2000, step_sizes=(6000,), tokenizer=tokenizer
    )
    async with serving(engine) as llm:
        text = "ab" * 2500
        prompts: list[Any] = [text, {"prompt": text}, {"prompt": text, "prompt_token_ids": None}]
        for prompt in prompts:
            output = await last(llm.generate(prompt, greedy(1), "long"))
            assert output.prompt == text
            assert output.prompt_token_ids == [1, 2] * 2500
        image: Any = {"prompt": "a", "multi_modal_data": {"image": "b"}}
        with pytest.raises(RequestError, match="'multi_modal_data', which is not served"):
            await last(llm.generate(image, greedy(1), "image"))
        search = BeamSearchParams(beam_width=1, max_tokens=1)
        with pytest.raises(RequestError, match="'multi_modal_data', which is not served"):
            await llm.beam_search(image, search, "images")


@awaited
async def test_refusals_are_raised_where_the_request_was_made() -> None:
    engine, _ = make_engine(max_loras=1)
    async with serving(engine) as llm:
        beside = asyncio.create_task(last(llm.generate([1], greedy(20), "beside")))
        with pytest.raises(RequestError, match="the prompt is empty"):
            await last(llm.generate([], greedy(), "empty"))
        lora = LoRARequest("missing")
        with pytest.raises(jaxlora.AdapterNotFoundError):
            await last(llm.generate([1], greedy(), "x", lora_request=lora))
        with pytest.raises(jaxlora.AdapterNotFoundError):
            await llm.add_lora(lora)
        with pytest.raises(ConfigError):
            llm.get_tokenizer()
        assert len((await beside).outputs[0].token_ids) == 20
        await llm.check_health()


@pytest.mark.usefixtures("without_types")
@awaited
async def test_an_id_that_abort_would_not_take_is_refused() -> None:
    async with serving(make_engine()[0]) as llm:
        given: Any = uuid.uuid4()
        with pytest.raises(ValueError, match=r"request_id=UUID.* must be a text"):
            llm.generate([1], greedy(), given)
        assert len((await last(llm.generate([1], greedy(5), str(given)))).outputs) == 1


@awaited
async def test_what_takes_longer_the_more_adapters_there_are_is_not_done_by_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: set[str] = set()

    def noted(**fields: Any) -> LoRAStatus:
        threads.add(threading.current_thread().name)
        return LoRAStatus(**fields)

    monkeypatch.setattr(adapter_calls, "LoRAStatus", noted)
    engine, _ = make_engine(max_loras=2)
    async with serving(engine) as llm:
        for name in ("x", "y"):
            await llm.add_lora(LoRARequest(name))
        await last(llm.generate([1], greedy(), "a", lora_request=LoRARequest("y")))
        statuses = await llm.describe_loras()
        found = [(each.lora_name, each.lora_int_id, each.tier) for each in statuses]
        assert found == [("x", 1, "host"), ("y", 2, "device")]
        assert threads
        assert "jaxlora-engine" not in threads
        assert (await llm.lora_id("y"), await llm.lora_id("z")) == (2, None)
        # These ask for no list of all.
        names = engine.adapters.names
        monkeypatch.setattr(names, "entries", None)
        monkeypatch.setattr(names, "ids", None)
        metrics = await llm.get_metrics()
        assert metrics["jaxlora:adapters_registered"] == 2
        assert metrics["jaxlora:adapters_resident"] == 1
        monkeypatch.undo()


@awaited
async def test_a_failure_of_the_engine_fails_every_waiter() -> None:
    engine, device = make_engine()

    def fail(plan: Plan) -> None:
        if len(device.plans) == 3:
            raise RuntimeError("device lost")

    device.fail = fail
    llm = AsyncLLM(engine)
    await llm.check_health()
    streams = [last(llm.generate([i + 1], greedy(20), str(i))) for i in range(9)]
    results = await asyncio.gather(*streams, return_exceptions=True)
    assert [type(result) for result in results] == [EngineDeadError] * 9
    with pytest.raises(EngineDeadError, match="RuntimeError: device lost"):
        await llm.check_health()
    for late in (last(llm.generate([1], greedy(), "late")), llm.list_loras()):
        with pytest.raises(EngineDeadError):
            await late
    llm.shutdown()


@awaited
async def test_shutdown_fails_who_waits_and_a_second_one_does_nothing() -> None:
    engine, _ = make_engine(max_model_len=4096, num_pages=1024)
    llm = AsyncLLM(engine)
    task = asyncio.create_task(last(llm.generate([1], greedy(4000), "a")))
    while not (await llm.get_metrics())["vllm:num_requests_running"]:
        await asyncio.sleep(0.001)
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        await task


@contextlib.contextmanager
def forgetting(held: list[AsyncLLM]) -> Iterator[threading.Thread]:
    """Drops the only reference to an object, which is gone at the end; yields its thread. Nothing
    is left to the garbage collector, which would come at a time and on a thread of its own."""
    gone, thread = weakref.ref(held[0]), held[0]._loop._thread
    assert thread.is_alive()
    gc.disable()
    try:
        held.clear()
        yield thread
        assert gone() is None
    finally:
        gc.enable()


def test_the_thread_ends_when_the_object_is_forgotten() -> None:
    engine, _ = make_engine()
    held = [AsyncLLM(engine)]
    asyncio.run(last(held[0].generate([1], greedy(), "a")))
    with forgetting(held) as thread:
        assert not thread.is_alive()


def test_a_refusal_does_not_keep_the_object() -> None:
    async def main(llm: AsyncLLM) -> None:
        with contextlib.suppress(RequestError):
            await last(llm.generate([], greedy(), "empty"))

    engine, _ = make_engine()
    held = [AsyncLLM(engine)]
    asyncio.run(main(held[0]))
    with forgetting(held) as thread:
        # It may hold the refusal, and with it the traceback, a moment longer than who was told.
        thread.join(SECONDS)
        assert not thread.is_alive()


def test_a_request_that_the_engine_still_holds_does_not_keep_the_object() -> None:
    engine, device = make_engine()
    gate = Gate(device)

    async def main(llm: AsyncLLM) -> None:
        task = asyncio.create_task(last(llm.generate([1], greedy(), "a")))
        assert await asyncio.to_thread(gate.reached.wait, SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    held = [AsyncLLM(engine)]
    asyncio.run(main(held[0]))
    # Callbacks come last one first: the thread is awaited after it.
    opens = weakref.ref(held[0], lambda _: gate.open())
    try:
        with forgetting(held) as thread:
            assert not thread.is_alive()
    finally:
        gate.open()
    assert opens() is None


def test_a_consumer_whose_event_loop_ended_is_given_up() -> None:
    engine, _ = make_engine(max_model_len=4096, num_pages=1024)
    llm = AsyncLLM(engine)
    event_loop = asyncio.new_event_loop()
    stream = llm.generate([1], greedy(4000), "a")
    event_loop.run_until_complete(anext(stream))
    event_loop.close()

    async def until_idle() -> None:
        while (await llm.get_metrics())["vllm:num_requests_running"]:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(until_idle(), SECONDS))
    llm.shutdown()
    check_nothing_is_held(engine)


# On the tiny model


@pytest.fixture
def real(llm: jaxlora.LLM) -> Iterator[AsyncLLM]:
    """The shared engine behind an AsyncLLM for one test."""
    each = AsyncLLM(llm.llm_engine)
    yield each
    each.shutdown()
    llm.llm_engine.abort_request(list(llm.llm_engine._requests))


def test_streams_equal_the_offline_api(
    real: AsyncLLM, llm: jaxlora.LLM, reference: Reference
) -> None:
    many = prompts(12)
    names: list[Any] = [None, *KINDS]
    requests = [
        LoRARequest(name, None, reference.paths[name]) if name else None
        for name in (names[i % len(names)] for i in range(len(many)))
    ]

    async def main() -> list[RequestOutput]:
        before = (await real.get_metrics()).get("jaxlora:compilations_total")
        streams = (
            last(real.generate(prompt, greedy(12), str(i), lora_request=lora))
            for i, (prompt, lora) in enumerate(zip(many, requests, strict=True))
        )
        outputs = await asyncio.gather(*streams)
        assert (await real.get_metrics()).get("jaxlora:compilations_total") == before
        assert len(await real.list_loras()) == len(KINDS)
        return list(outputs)

    outputs = asyncio.run(main())
    for prompt, lora, output in zip(many, requests, outputs, strict=True):
        name = lora.lora_name if lora else None
        reference.check_greedy(prompt, output.outputs[0].token_ids, name)
    real.shutdown()
    offline = llm.generate(many, greedy(12), lora_request=requests, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in offline]
