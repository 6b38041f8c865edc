"""What an engine holds goes with the last reference to it: nothing waits for the garbage collector,
which may not come before the next engine wants the memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import jax
import pytest

import benchmarks.engines
from jaxlora import (
    AdapterError,
    AsyncLLM,
    EngineDeadError,
    LoRARequest,
    RequestError,
    SamplingParams,
)
from jaxlora.engine import loop
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.scheduler import Plan
from jaxlora.engine_args import LORA_EXTRAS
from jaxlora.llm import LLM
from tests.jaxlora.conftest import engine_with_extras
from tests.jaxlora.engine.simulator import Loader, Reader, make_engine, make_staging
from tests.jaxlora.patience import wait_until
from tests.jaxlora.peft_models import Reference

GREEDY = SamplingParams(temperature=0, max_tokens=4)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_device_arrays_go_with_their_engine(extras_reference: Reference) -> None:
    before = {id(array) for array in jax.live_arrays()}
    paths = list(extras_reference.paths.items())[:3]
    llm = engine_with_extras(extras_reference, max_num_seqs=4, lora_extras=LORA_EXTRAS)
    loras = [LoRARequest(name, None, path) for name, path in paths]
    params = SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1)
    llm.generate([[1, 2, 3]] * 3, params, lora_request=loras, use_tqdm=False)
    with contextlib.suppress(AdapterError):
        llm.generate([1], lora_request=LoRARequest("none", None, "/none"), use_tqdm=False)
    # A version that is staged ahead of its first request.
    assert llm.add_lora(LoRARequest(paths[0][0], None, paths[1][1], load_inplace=True))
    forgotten, engine = weakref.ref(llm), llm.llm_engine
    del llm
    assert forgotten() is None

    served = AsyncLLM(engine)
    asyncio.run(anext(served.generate([1], GREEDY, "a")))
    served.shutdown()
    # Requests that never end.
    for name, _ in paths:
        engine.add_request(name, [1, 2, 3], GREEDY, LoRARequest(name))
    engine.step()
    arrays = [weakref.ref(each) for each in jax.live_arrays() if id(each) not in before]
    assert len(arrays) > 20
    del engine, served
    # Of host memory that it has sent to a GPU, JAX lets go with the next call.
    jax.device_put(0)
    # A thread that brings an adapter to the device has the bank until it is done.
    wait_until(lambda: all(each() is None for each in arrays))
    assert not [each for each in arrays if each() is not None]


def test_a_refusal_does_not_keep_an_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine(max_loras=1)
    monkeypatch.setattr(LLMEngine, "from_engine_args", lambda *args, **kwargs: engine)
    llm = LLM("model", use_tqdm=False)
    for name in ("missing", "a"):
        with contextlib.suppress(AdapterError, RequestError):
            llm.generate([[1], []], lora_request=LoRARequest(name), use_tqdm=False)
    forgotten = weakref.ref(llm)
    del llm
    assert forgotten() is None


async def in_generate(llm: AsyncLLM) -> None:
    await anext(llm.generate([1], GREEDY, "a", lora_request=LoRARequest("missing")))


async def in_a_question(llm: AsyncLLM) -> None:
    await llm.update_lora("unknown", {})


async def in_reading(llm: AsyncLLM) -> None:
    await llm.add_lora(LoRARequest("missing"))


async def in_registering(llm: AsyncLLM) -> None:
    # Its id is taken by the time it has been read.
    await asyncio.gather(llm.add_lora(LoRARequest("a", 1)), llm.add_lora(LoRARequest("b", 1)))


async def in_waiting(llm: AsyncLLM) -> None:
    await llm.add_lora(LoRARequest("a", 1))
    await asyncio.gather(llm.pin_lora(1, wait=True), llm.remove_lora(1))


async def in_a_pin(llm: AsyncLLM) -> None:
    for name in ("fades", "b", "c"):
        await llm.add_lora(LoRARequest(name))
    await llm.pin_lora(1, wait=True)


async def in_a_step(llm: AsyncLLM) -> None:
    await anext(llm.generate([3, 3], GREEDY, "a"))


async def when_stopped(llm: AsyncLLM) -> None:
    llm.shutdown()
    await llm.list_loras()


@pytest.mark.parametrize(
    "fails",
    [
        in_generate,
        in_a_question,
        in_reading,
        in_registering,
        in_waiting,
        in_a_pin,
        in_a_step,
        when_stopped,
    ],
)
def test_an_error_keeps_nothing(
    fails: Callable[[AsyncLLM], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # pytest would keep the traceback that is logged.
    monkeypatch.setattr(loop.logger, "disabled", True)

    class Fading(Loader):
        def __call__(self, request: LoRARequest) -> Any:
            if request.lora_name == "fades" and "fades" in self.loaded:
                raise OSError("it is gone")
            return super().__call__(request)

    # Nothing is ever staged.
    options = {"max_loras": 2, "max_cpu_loras": 2, "staging": make_staging(Reader())}
    engine, device = make_engine(loader=Fading(), **options)

    def fail(plan: Plan) -> None:
        if plan.num_tokens == 2:
            raise RuntimeError("device lost")

    device.fail = fail
    llm = AsyncLLM(engine)
    objects = [weakref.ref(llm), weakref.ref(engine), weakref.ref(device)]
    del engine, device, fail
    told: list[str] = []

    async def main(llm: AsyncLLM) -> None:
        try:
            await fails(llm)
        except (AdapterError, EngineDeadError, ValueError, OSError) as error:
            told.append(str(error))

    asyncio.run(main(llm))
    assert told
    llm.shutdown()
    # Of the engine nothing is left, though the object is.
    assert [each() for each in objects[1:]] == [None] * 2
    del llm
    assert objects[0]() is None


def test_a_benchmarks_engine_is_gone_though_its_llm_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[weakref.ref[LLMEngine]] = []

    def start(*args: Any, **options: Any) -> LLMEngine:
        engine, _ = make_engine(max_loras=1)
        engines.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(LLMEngine, "from_engine_args", start)
    for _ in range(2):
        assert [each() for each in engines] == [None] * len(engines)
        options = {"slots": 1, "rank": 4, "max_num_seqs": 2}
        with benchmarks.engines.dummy_engine("tiny", **options) as (llm, _):
            assert engines[-1]() is llm.llm_engine
    assert len(engines) == 2
