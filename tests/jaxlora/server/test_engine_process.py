"""The server's engine in a process of its own: what comes through, who leaves, what ends.

Most tests have both ends in this process, over the simulated engine; the last ones start it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest.mock import Mock

import psutil
import pytest

import jaxlora
from jaxlora import (
    AdapterNotFoundError,
    AsyncLLM,
    BeamSearchParams,
    EngineDeadError,
    LoRARequest,
    ModelLoadError,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TokensPrompt,
)
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.loop import take_turns_quickly
from jaxlora.engine.scheduler import Plan
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import ConstraintError
from jaxlora.outputs import CompletionOutput, Logprob, RequestMetrics
from jaxlora.server import engine_process, engine_worker
from jaxlora.server.engine_messages import (
    Answer,
    Call,
    Generate,
    News,
    Ready,
    news_of,
    number_and_question,
    output_of,
    portable,
    question_bytes,
)
from jaxlora.server.engine_messages import both_ends as pipe
from jaxlora.server.engine_process import EngineProcess
from jaxlora.server.engine_worker import Inbox, Outbox, Worker
from jaxlora.tokenizer import load_tokenizer
from tests.jaxlora.awaited import awaited
from tests.jaxlora.engine.simulator import (
    Device,
    Gate,
    PieceTokenizer,
    check_nothing_is_held,
    complete,
    make_engine,
)
from tests.jaxlora.limits import OPTIONS
from tests.jaxlora.patience import SECONDS, wait_until
from tests.jaxlora.peft_models import Reference, prompts

DELTA = RequestOutputKind.DELTA
LETTERS = [chr(ord("a") + i) for i in range(64)]


def greedy(max_tokens: int = 5, **params: Any) -> SamplingParams:
    params = {"output_kind": DELTA} | params
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **params)


def tokens(*ids: int) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=list(ids))


class Ends(NamedTuple):
    llm: EngineProcess
    worker: Worker
    ended: Mock
    given_up: Mock


@contextlib.asynccontextmanager
async def ends(engine: LLMEngine) -> AsyncIterator[Ends]:
    """The worker on a thread instead of in a process; asserts that nothing is left at the end."""
    ours, theirs = pipe()
    ready = Ready(tokenizer=PieceTokenizer("a"), max_model_len=32, vocab_size=9, kv_pages=(1, 2))
    begun, ended, given_up = threading.Event(), Mock(), Mock()
    workers: list[Worker] = []

    async def work() -> None:
        workers.append(Worker(AsyncLLM(engine), Outbox(theirs, given_up)))
        await workers[0].run(Inbox(theirs, given_up), begun.set)

    def thread_of_it() -> None:
        with theirs:
            asyncio.run(work())

    thread = threading.Thread(target=thread_of_it)
    thread.start()
    begun.wait(SECONDS)
    with subprocess.Popen([sys.executable, "-c", ""]) as stands_for_it:
        stands_for_it.wait()
        llm = EngineProcess(stands_for_it, ours, ready, asyncio.get_running_loop(), ended)
        try:
            yield Ends(llm, workers[0], ended, given_up)
        finally:
            await asyncio.to_thread(llm.shutdown)
            thread.join(SECONDS)
    assert not thread.is_alive()
    assert ours.closed
    while engine.has_unfinished_requests():
        engine.step()
    check_nothing_is_held(engine)


@contextlib.asynccontextmanager
async def both_ends(engine: LLMEngine) -> AsyncIterator[EngineProcess]:
    """The same, where all goes well."""
    async with ends(engine) as each:
        yield each.llm
    assert not each.ended.called
    assert not each.given_up.called


async def whole(stream: AsyncIterator[RequestOutput]) -> list[int]:
    ids, finished = [], False
    async for output in stream:
        assert not finished
        ids += output.outputs[0].token_ids
        finished = output.finished
    assert finished
    return ids


@awaited
async def test_streams_are_those_of_the_engine() -> None:
    engine, _ = make_engine(max_model_len=64, num_pages=256)
    async with both_ends(engine) as llm:
        asked = [([1, 2, 3][: 1 + i % 3], greedy(3 + i)) for i in range(20)]
        streams = [llm.generate(tokens(*p), s, f"{i}") for i, (p, s) in enumerate(asked)]
        told = await asyncio.gather(*(whole(stream) for stream in streams))
    assert told == [complete(p, s, max_model_len=64) for p, s in asked]


@awaited
async def test_an_output_is_whole_again() -> None:
    engine, _ = make_engine(tokenizer=PieceTokenizer(*LETTERS), max_logprobs=3)
    params = greedy(4, output_kind=RequestOutputKind.FINAL_ONLY, logprobs=2, prompt_logprobs=1)
    prompt = TokensPrompt(prompt_token_ids=[1, 2, 3], prompt="abc")
    async with both_ends(engine) as llm:
        stream = llm.generate(prompt, params, "x")
        (output,) = [each async for each in stream]
    reference, _ = make_engine(tokenizer=PieceTokenizer(*LETTERS), max_logprobs=3)
    reference.add_request("x", copy.deepcopy(prompt), params)
    outputs: list[RequestOutput] = []
    while reference.has_unfinished_requests():
        outputs += reference.step()
    (expected,) = outputs
    metrics = output.metrics
    assert metrics.arrival_time < (metrics.first_token_time or 0) <= (metrics.finished_time or 0)
    expected.metrics = metrics
    assert output == expected
    assert (output.prompt, output.prompt_token_ids) == ("abc", [1, 2, 3])


def test_news_are_an_output_without_its_request() -> None:
    lora = LoRARequest("sql", 3, "/sql")
    completion = CompletionOutput(
        index=1,
        text="text",
        token_ids=[5, 6],
        cumulative_logprob=-1.5,
        logprobs=[{5: Logprob(-1.0, 1, "te")}, {6: Logprob(-0.5, 2, "xt")}],
        finish_reason="stop",
        stop_reason="x",
        lora_request=lora,
    )
    output = RequestOutput(
        request_id="id",
        prompt="p",
        prompt_token_ids=[1, 2] * 1000,
        outputs=[completion],
        finished=True,
        metrics=RequestMetrics(
            arrival_time=1.0, first_scheduled_time=2.0, first_token_time=3.0, finished_time=4.0
        ),
        lora_request=lora,
        prompt_logprobs=[None, {2: Logprob(-2.0)}],
        num_cached_tokens=1,
    )
    prompt = TokensPrompt(prompt_token_ids=output.prompt_token_ids, prompt="p")
    asked = Generate(prompt=prompt, params=greedy(), request_id="id", lora_request=lora, priority=0)
    news = pickle.dumps(news_of(output))
    assert len(news) < 500
    assert output_of(pickle.loads(news), asked) == output


@awaited
async def test_who_is_refused_is_told_and_nobody_else() -> None:
    engine, _ = make_engine(max_loras=1)
    missing = LoRARequest("missing", None, "/nowhere/adapter")
    async with both_ends(engine) as llm:
        beside = asyncio.create_task(whole(llm.generate(tokens(1), greedy(20), "beside")))
        with pytest.raises(RequestError, match=r"100 .*tokens"):
            await whole(llm.generate(tokens(*[1] * 100), greedy(), "long"))
        with pytest.raises(AdapterNotFoundError, match="'missing'"):
            await whole(llm.generate(tokens(1), greedy(), "lora", lora_request=missing))
        with pytest.raises(AdapterNotFoundError, match="'missing'"):
            await llm.add_lora(missing)
        with pytest.raises(ValueError, match="'beside' is in use"):
            await whole(llm.generate(tokens(1), greedy(), "beside"))
        assert await beside == complete([1], greedy(20), max_model_len=32)


class _Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return _fail, ()


def _fail() -> None:
    raise LookupError("nobody knows it here")


@awaited
async def test_what_cannot_be_sent_or_read_concerns_who_asks() -> None:
    engine, _ = make_engine()
    async with both_ends(engine) as llm:
        locked: Any = {"prompt_token_ids": [1], "prompt": threading.Lock()}
        with pytest.raises(TypeError, match="pickle"):
            await whole(llm.generate(locked, greedy(), "a"))
        unreadable: Any = {"prompt_token_ids": [1], "prompt": _Unreadable()}
        with pytest.raises(LookupError, match="nobody knows"):
            await whole(llm.generate(unreadable, greedy(), "b"))
        # What it answers is the engine itself.
        with pytest.raises(AttributeError, match="pickle"):
            await llm._call("_ask", _same)
        with pytest.raises(AttributeError, match="no_such"):
            await llm._call("no_such")
        assert await whole(llm.generate(tokens(1), greedy(), "a"))


def _same(engine: LLMEngine) -> LLMEngine:
    return engine


def test_a_question_can_be_read() -> None:
    question = Call(method="lora_id", arguments=("x",), options={})
    assert number_and_question(question_bytes(7, question)) == (7, question)


@awaited
async def test_calls_are_answered() -> None:
    engine, _ = make_engine(max_loras=2)
    async with both_ends(engine) as llm:
        assert (await llm.get_default_sampling_params()) == SamplingParams()
        assert await llm.get_default_max_tokens() is None
        assert (await llm.get_metrics())["vllm:num_requests_running"] == 0
        assert "vllm:inter_token_latency_seconds" in await llm.get_histograms()
        assert await llm.describe_loras() == []
        assert await llm.lora_id("x") is None
        assert await llm.remove_lora(7) is False
        await llm.check_health()
    assert (llm.max_model_len, llm.vocab_size, llm.kv_pages) == (32, 9, (1, 2))


class Clock:
    """Each step of a simulated device takes a millisecond, and is counted."""

    def __init__(self, device: Device) -> None:
        self.num_steps = 0
        device.fail = self._tick

    def _tick(self, plan: Plan) -> None:
        self.num_steps += 1
        time.sleep(1e-3)


async def until_idle(llm: EngineProcess) -> None:
    while (await llm.get_metrics())["vllm:num_requests_running"]:
        await asyncio.sleep(0.001)


async def until_busy(llm: EngineProcess) -> None:
    while not (await llm.get_metrics())["vllm:num_requests_running"]:
        await asyncio.sleep(0.001)


@awaited
async def test_who_leaves_ends_the_request() -> None:
    engine, device = make_engine(num_pages=1024, max_model_len=2048)
    clock = Clock(device)
    async with both_ends(engine) as llm:
        beside = asyncio.create_task(whole(llm.generate(tokens(1), greedy(30), "beside")))
        left = llm.generate(tokens(1, 2), greedy(2000), "left")
        await anext(left)
        await left.aclose()
        cancelled = asyncio.create_task(whole(llm.generate(tokens(2), greedy(2000), "cancelled")))
        await until_busy(llm)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await beside == complete([1], greedy(30), max_model_len=2048)
        await until_idle(llm)
        assert clock.num_steps < 1900
        assert not llm._waiting
        # Its id may be used again.
        assert len(await whole(llm.generate(tokens(1, 2), greedy(), "left"))) == 5


@awaited
async def test_who_leaves_ends_no_other_request_of_the_id() -> None:
    engine, device = make_engine(num_pages=1024, max_model_len=2048)
    Clock(device)
    async with ends(engine) as (llm, worker, *_):
        first = asyncio.create_task(whole(llm.generate(tokens(1), greedy(200), "same")))
        await until_busy(llm)
        for _ in range(20):
            second = llm.generate(tokens(1), greedy(200), "same")
            asking = asyncio.create_task(anext(second))
            await asyncio.sleep(2e-4)
            asking.cancel()
            # As a rule before the engine has refused it.
            with contextlib.suppress(asyncio.CancelledError, ValueError):
                await asking
        assert await first == complete([1], greedy(200), max_model_len=2048)
        await asyncio.to_thread(wait_until, lambda: not worker._tasks)
        assert not worker._tasks


@awaited
async def test_a_call_can_be_cancelled() -> None:
    engine, _ = make_engine()
    async with ends(engine) as (llm, worker, *_):
        never = asyncio.create_task(llm._call("_until", _never))
        await asyncio.to_thread(wait_until, lambda: worker._tasks)
        assert worker._tasks
        never.cancel()
        with pytest.raises(asyncio.CancelledError):
            await never
        await asyncio.to_thread(wait_until, lambda: not worker._tasks)
        assert not worker._tasks
        assert not llm._waiting


def _never(engine: LLMEngine) -> bool:
    return False


@awaited
async def test_a_slow_event_loop_is_told_what_has_come_together() -> None:
    engine, device = make_engine(num_pages=1024, max_model_len=2048)
    clock = Clock(device)
    async with ends(engine) as (llm, *_):
        stream = llm.generate(tokens(1), greedy(1000), "a")
        await anext(stream)
        began = clock.num_steps
        # It blocks, as a careless resolver may.
        wait_until(lambda: clock.num_steps >= began + 300)
        missed = clock.num_steps - began
        news = [await anext(stream) for _ in range(60)]
        # Some came one by one until the pipe was full, and all the others as one.
        assert max(len(each.outputs[0].token_ids) for each in news) > missed / 2 > 50
        await stream.aclose()


@awaited
async def test_a_reply_that_cannot_be_taken_concerns_who_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken_for_a(news: News, asked: Generate) -> RequestOutput:
        if asked.request_id == "a":
            raise LookupError("broken")
        return output_of(news, asked)

    monkeypatch.setattr(engine_process, "output_of", broken_for_a)
    engine, device = make_engine(num_pages=1024, max_model_len=2048)
    clock = Clock(device)
    async with both_ends(engine) as llm:
        results = await asyncio.gather(
            whole(llm.generate(tokens(1), greedy(2000), "a")),
            whole(llm.generate(tokens(1), greedy(20), "b")),
            return_exceptions=True,
        )
        assert repr(results[0]) == repr(LookupError("broken"))
        assert results[1] == complete([1], greedy(20), max_model_len=2048)
        await until_idle(llm)
        assert clock.num_steps < 1900


def test_what_cannot_be_sent_at_all_ends_the_process() -> None:
    ours, theirs = pipe()
    given_up = threading.Event()
    with ours, theirs:
        outbox = Outbox(theirs, given_up.set)
        outbox.put(1, RequestError(threading.Lock()))
        assert given_up.wait(SECONDS)
        outbox.close()


def test_an_engine_that_loads_ends_with_its_server() -> None:
    ours, theirs = pipe()
    given_up = threading.Event()
    with theirs:
        Inbox(theirs, given_up.set)
        assert not given_up.wait(0.1)
        ours.close()
        assert given_up.wait(SECONDS)


@awaited
async def test_an_engine_that_hangs_ends_with_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_worker, "SECONDS_TO_END", 0.1)
    engine, device = make_engine()
    gate = Gate(device)
    async with ends(engine) as (llm, _, _, given_up):
        hanging = asyncio.create_task(whole(llm.generate(tokens(1), greedy(), "a")))
        await asyncio.to_thread(gate.reached.wait, SECONDS)
        cut(llm)
        await asyncio.to_thread(wait_until, lambda: given_up.called)
        assert given_up.called
        gate.open()
        with pytest.raises(EngineDeadError):
            await hanging


def test_threads_take_turns_quickly() -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(5e-3)
        take_turns_quickly()
        assert sys.getswitchinterval() < 1e-3
        sys.setswitchinterval(1e-5)
        take_turns_quickly()
        assert sys.getswitchinterval() < 2e-5
    finally:
        sys.setswitchinterval(before)


def test_a_server_that_does_not_read_gets_few_long_outputs() -> None:
    ours, theirs = pipe()
    outbox = Outbox(theirs, Mock())

    def output(n: int, *, finished: bool = False) -> RequestOutput:
        return RequestOutput(
            request_id="",
            prompt=None,
            prompt_token_ids=[],
            outputs=[CompletionOutput(index=0, text=f"{n} " + "x" * 5000, token_ids=[n])],
            finished=finished,
            metrics=RequestMetrics(arrival_time=0.0),
        )

    with ours, theirs:
        for n in range(1000):
            outbox.put(1, output(n), adds_up=True)
            outbox.put(2, output(n))
        outbox.put(1, output(1000, finished=True), adds_up=True)
        error = ConstraintError("it does")
        outbox.put(2, error)
        outbox.put(3, Answer(b"value"))
        closing = threading.Thread(target=outbox.close)
        closing.start()
        sent: dict[int, list[Any]] = {1: [], 2: [], 3: []}
        num_messages = 0
        while not sent[3]:
            num_messages += 1
            for number, reply in pickle.loads(ours.recv_bytes()).items():
                sent[number].append(reply)
        closing.join(SECONDS)
    assert num_messages < 20
    assert [i for completions, *_ in sent[1] for i in completions[0][2]] == [*range(1001)]
    assert (sent[1][-1][1], sent[3]) == (True, [Answer(b"value")])
    assert repr(sent[2][-1]) == repr(error)


class _TwoArguments(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class _Local(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return _fail, ()


def test_errors_can_be_told_elsewhere() -> None:
    for error in (RequestError("no"), OSError(2, "gone", "file"), AdapterNotFoundError("none")):
        told = portable(error)
        assert (type(told), str(told)) == (type(error), str(error))
    assert repr(portable(_TwoArguments(1, 2))) == repr(RuntimeError("_TwoArguments: 1 and 2"))
    assert repr(portable(_Local("x"))) == repr(RuntimeError("_Local: x"))
    assert isinstance(portable(KeyboardInterrupt()), RuntimeError)
    try:
        raise RequestError("no") from ValueError("cause")
    except RequestError as error:
        told = portable(error)
    assert (told.__traceback__, told.__cause__) == (None, None)


@awaited
async def test_an_engine_that_stops_is_told_to_all() -> None:
    engine, device = make_engine()
    async with both_ends(engine) as llm:
        await llm.check_health()

        def fail(plan: Plan) -> None:
            raise RuntimeError("a broken device")

        device.fail = fail
        streams = [llm.generate(tokens(1), greedy(20), f"{i}") for i in range(6)]
        results = await asyncio.gather(*(whole(s) for s in streams), return_exceptions=True)
        assert {type(each) for each in results} == {EngineDeadError}
        assert "a broken device" in str(results[0])
        with pytest.raises(EngineDeadError, match="a broken device"):
            await llm.check_health()
        device.fail = lambda plan: None


@awaited
async def test_shutdown_is_told_to_all() -> None:
    engine, _ = make_engine(num_pages=512, max_model_len=512)
    async with both_ends(engine) as llm:
        running = asyncio.create_task(whole(llm.generate(tokens(1), greedy(500), "a")))
        while not (await llm.get_metrics())["vllm:num_requests_running"]:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(llm.shutdown)
        with pytest.raises(EngineDeadError, match="the engine was shut down"):
            await running
        with pytest.raises(EngineDeadError, match="the engine was shut down"):
            await llm.get_metrics()
        with pytest.raises(EngineDeadError, match="the engine was shut down"):
            await whole(llm.generate(tokens(1), greedy(), "b"))


@awaited
async def test_an_engine_ends_with_its_server() -> None:
    engine, _ = make_engine(num_pages=512, max_model_len=512)
    async with ends(engine) as (llm, _, ended, _):
        stream = llm.generate(tokens(1), greedy(500), "a")
        await anext(stream)
        cut(llm)
        with pytest.raises(EngineDeadError, match="ended with status 0 while it served"):
            await whole(stream)
        await asyncio.to_thread(wait_until, lambda: engine.owner is None)
        assert engine.owner is None
        assert ended.called


def cut(llm: EngineProcess) -> None:
    """As the system does when a process is killed."""
    with socket.socket(fileno=os.dup(llm._connection.fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def test_a_tokenizer_is_what_it_was_in_another_process(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    # On a thread, which no other process can have.
    assert asyncio.run(tokenizer.encode_aside("a" * 5000))
    special = tokenizer.decode([tokenizer.eos_token_id or 0], skip_special_tokens=False)
    for split in (False, True):
        tokenizer.hf.split_special_tokens = split
        tokenizer._backend.encode_special_tokens = split
        copied = pickle.loads(pickle.dumps(tokenizer))
        text = f"hello {special} world"
        assert copied.encode(text) == tokenizer.encode(text)
        assert copied.hf.chat_template == tokenizer.hf.chat_template
        assert copied.vocab_size == tokenizer.vocab_size


# From here on with a process.


@pytest.fixture
def args(tiny_model: Path, program_cache: Path) -> EngineArgs:
    return EngineArgs(
        model=str(tiny_model),
        dtype="float32",
        **OPTIONS,
        compilation_cache_dir=str(program_cache),
    )


def start(args: EngineArgs, loop: asyncio.AbstractEventLoop) -> EngineProcess:
    return EngineProcess.start(args, loop, use_tqdm=False, begun=Mock(), ended=Mock())


@contextlib.asynccontextmanager
async def started(args: EngineArgs) -> AsyncIterator[tuple[EngineProcess, psutil.Process]]:
    loop = asyncio.get_running_loop()
    llm = await asyncio.to_thread(start, args, loop)
    process = psutil.Process(llm._process.pid)
    try:
        yield llm, process
    finally:
        await asyncio.to_thread(llm.shutdown)
        assert not psutil.pid_exists(process.pid)


@awaited
async def test_a_process_serves_adapters_as_one_process_does(
    args: EngineArgs, reference: Reference, llm: jaxlora.LLM
) -> None:
    loras = [None, *(LoRARequest(n, None, str(p)) for n, p in [*reference.paths.items()][:2])]
    given = prompts(3)
    params = greedy(8, output_kind=RequestOutputKind.FINAL_ONLY)
    expected = [
        llm.generate([tokens(*prompt)], params, lora_request=lora, use_tqdm=False)[0]
        for prompt, lora in zip(given, loras, strict=True)
    ]
    async with started(args) as (served, process):
        streams = [
            served.generate(tokens(*prompt), greedy(8), f"{i}", lora_request=lora)
            for i, (prompt, lora) in enumerate(zip(given, loras, strict=True))
        ]
        told = await asyncio.gather(*(whole(stream) for stream in streams))
        assert told == [each.outputs[0].token_ids for each in expected]
        beams = BeamSearchParams(beam_width=2, max_tokens=3)
        found = await served.beam_search(tokens(*given[0]), beams, "beams")
        (own,) = llm.beam_search([tokens(*given[0])], beams, use_tqdm=False)
        assert [each.tokens for each in found.sequences] == [each.tokens for each in own.sequences]
        assert {each.lora_name for each in await served.describe_loras()} == {
            lora.lora_name for lora in loras if lora is not None
        }
        # Who ends a service may signal all of its processes.
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert len(await whole(served.generate(tokens(*given[0]), greedy(8), "after"))) == 8
    assert served._process.returncode == 0


def test_what_is_wrong_with_a_model_is_told(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    with pytest.raises(ModelLoadError, match="no-model"):
        start(EngineArgs(model=str(tmp_path / "no-model")), loop)
    loop.close()


def test_what_cannot_be_sent_leaves_no_process() -> None:
    loop, processes = asyncio.new_event_loop(), []
    args = EngineArgs(model="x", hf_overrides=MappingProxyType({"rope_theta": 1.0}))
    with pytest.raises(TypeError, match="mappingproxy"):
        EngineProcess.start(args, loop, use_tqdm=False, begun=processes.append, ended=Mock())
    (process,) = processes
    assert process.returncode is not None
    loop.close()


@awaited
async def test_a_process_that_ends_while_it_loads_is_told(args: EngineArgs) -> None:
    loop = asyncio.get_running_loop()
    killed = threading.Event()

    def begun(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        killed.set()

    with pytest.raises(EngineDeadError, match="killed by signal 9 while it was loading"):
        await asyncio.to_thread(
            EngineProcess.start, args, loop, use_tqdm=False, begun=begun, ended=Mock()
        )
    assert killed.is_set()
