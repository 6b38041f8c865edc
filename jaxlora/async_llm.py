"""Generation for asyncio: many requests at once, each an async iterator of its outputs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar, cast

from jaxlora.adapters.registered import HeldVersion, Registered
from jaxlora.checks import require
from jaxlora.engine.beam_search import BeamSearch
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.histogram import Histogram
from jaxlora.engine.loop import EngineLoop
from jaxlora.engine.mailbox import Mailbox, Sink, Stream
from jaxlora.engine.messages import Event
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import ConfigError
from jaxlora.outputs import BeamSearchOutput, LoRAStatus, RequestOutput
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import (
    BeamSearchParams,
    LoRARequest,
    Prompt,
    RequestOutputKind,
    SamplingParams,
    TokensPrompt,
)

_T = TypeVar("_T")


class AsyncLLM:
    """One model, with its adapters, for an asyncio program; the engine runs in its own thread.

    Use it from any number of event loops. It ends with :meth:`shutdown`, or when it is forgotten.

    With a model loaded, a full collection of garbage holds all requests up for 0.1 to 0.2 s: a
    program that serves for long may call ``gc.collect()`` and ``gc.freeze()`` after the start, as
    ``jaxlora serve`` does.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._tokenizer = engine.tokenizer
        self._max_model_len = engine.max_model_len
        self._vocab_size = engine.vocab_size
        self._eos_token_ids = engine.eos_token_ids
        # What is shut down keeps no engine.
        self._compile_grammar = weakref.WeakMethod(engine.compile_grammar)
        pool = engine.scheduler.pool
        self._kv_pages = (pool.num_pages, pool.page_size)
        self._loop = EngineLoop(engine)
        self._mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = (
            weakref.WeakKeyDictionary()
        )
        # Also at exit: the interpreter must not be torn down under a running step.
        self._finalizer = weakref.finalize(self, self._loop.shutdown)

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, use_tqdm: bool = True) -> AsyncLLM:
        """Loads the model and compiles everything, as :meth:`LLMEngine.from_engine_args` does."""
        return cls(LLMEngine.from_engine_args(args, use_tqdm=use_tqdm))

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes a prompt; outputs are of the parameters' kind, the last one is finished.
        Requests of lower ``priority`` value are served first.

        A consumer slower than the engine gets fewer, longer outputs. Leaving the iterator early, by
        cancellation too, aborts the request; :meth:`abort` ends it with finish reason "abort".
        Raises RequestError or AdapterError if the request cannot be served, ValueError if the id
        is no text or in use, EngineDeadError if the engine stopped.
        """
        require("request_id", request_id, isinstance(request_id, str), "a text")
        is_one = sampling_params is None or isinstance(sampling_params, SamplingParams)
        require("sampling_params", sampling_params, is_one, "a SamplingParams")
        params = None if sampling_params is None else dataclasses.replace(sampling_params)
        return self._generate(prompt, params, request_id, lora_request, priority=priority)

    async def _generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        lora_request: LoRARequest | None,
        *,
        priority: int,
        held: HeldVersion | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        self._loop.check()
        mailbox = self._mailbox()
        kind = RequestOutputKind.CUMULATIVE
        if sampling_params is not None:
            kind = sampling_params.output_kind
        stream = Stream(adds_up=kind is RequestOutputKind.DELTA)
        loop = self._loop
        # The engine's thread holds it: with self in it, a request would keep the object alive.
        sink = Sink(loop, request_id, mailbox, stream)
        finished = False
        try:
            await self.submit(
                prompt,
                sampling_params,
                request_id,
                lora_request,
                sink,
                priority=priority,
                held=held,
            )
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            if not finished:
                loop.abort([request_id], sink)

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str,
        lora_request: LoRARequest | None,
        sink: Callable[[Event], None],
        *,
        priority: int = 0,
        held: HeldVersion | None = None,
    ) -> None:
        """Queues a request once it is tokenized and its grammar compiled: for callers that are no
        coroutines of their own for each request, as :meth:`generate` is.

        Raises what comes up until then, and nothing is queued; EngineDeadError if the engine
        stopped. Whatever becomes of the request later, a refusal included, is told to its sink, on
        the engine's thread, which that may not block. Who is no longer interested calls
        :meth:`withdraw`.
        """
        self._loop.check()
        prompt = await self._tokenize(prompt)
        if sampling_params is not None and sampling_params.structured_outputs is not None:
            compile_grammar = self._compile_grammar()
            if compile_grammar is not None:
                await asyncio.to_thread(compile_grammar, sampling_params)
            del compile_grammar
        self._loop.submit(
            request_id,
            prompt,
            sampling_params,
            lora_request,
            sink,
            priority=priority,
            held=held,
        )

    def withdraw(self, request_id: str, sink: Callable[[Event], None]) -> None:
        """Ends a request that was submitted with this sink, unless it is over; one of another's of
        the same id goes on."""
        self._loop.abort([request_id], sink)

    async def beam_search(
        self,
        prompt: Prompt,
        params: BeamSearchParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> BeamSearchOutput:
        """See :meth:`LLM.beam_search`; for one prompt. Cancelling it aborts what it asked for. An
        adapter that changes or is removed meanwhile stays what it was."""
        prompt = await self._tokenize(prompt)
        tokens = await self._ask(lambda engine: engine.token_prompt(prompt))
        search = BeamSearch([tokens], params, self._eos_token_ids, self._max_model_len)
        # What is to be loaded in place is read for the first of its requests alone.
        held = None if lora_request is None else HeldVersion()
        try:
            for number, asked in enumerate(search.steps()):
                streams = [
                    self._generate(
                        beam,
                        search.sampling_params,
                        f"{request_id}-{number}-{i}",
                        lora_request,
                        priority=priority,
                        held=held,
                    )
                    for i, (_, beam) in enumerate(asked)
                ]
                search.take(await _only_outputs(streams))
        finally:
            if held is not None:
                self._loop.end_hold(held)
        if lora_request is not None:
            lora_request = dataclasses.replace(lora_request, load_inplace=False)
        (found,) = search.found([lora_request], self._tokenizer)
        return found

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Ends requests; ids that are unknown or finished are passed over."""
        self._loop.abort([request_id] if isinstance(request_id, str) else request_id)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """See :meth:`LLMEngine.add_lora`; running requests do not wait while it is read."""
        return await _answer(self._loop.add_lora(lora_request))

    async def remove_lora(self, lora_int_id: int, *, wait: bool = False) -> bool:
        """See :meth:`LLMEngine.remove_lora`; with ``wait`` it returns when no request uses the
        adapter any more, and its slot and memory are free."""

        def remove(engine: LLMEngine) -> list[Registered] | None:
            versions = engine.adapters.versions(lora_int_id)
            return versions if engine.remove_lora(lora_int_id) else None

        versions = await self._ask(remove)
        if versions and wait:
            await self._until(lambda _: not any(version.num_holders for version in versions))
        return versions is not None

    async def list_loras(self) -> set[int]:
        """See :meth:`LLMEngine.list_loras`."""
        return await self._ask(LLMEngine.list_loras)

    async def describe_loras(self) -> list[LoRAStatus]:
        """See :meth:`LLMEngine.describe_loras`."""
        describe = await self._ask(LLMEngine.observe_loras)
        return await asyncio.to_thread(describe)

    async def lora_id(self, lora_name: str) -> int | None:
        """See :meth:`LLMEngine.lora_id`."""
        return await self._ask(lambda engine: engine.lora_id(lora_name))

    async def pin_lora(self, lora_int_id: int, *, wait: bool = False) -> bool:
        """See :meth:`LLMEngine.pin_lora`; with ``wait`` it returns when the adapter is in its slot.
        Raises AdapterError then if it is removed before, or cannot be read again."""
        pinned = await self._ask(lambda engine: engine.pin_lora(lora_int_id))
        if wait:
            await self._until(lambda engine: engine.adapters.is_placed(lora_int_id))
        return pinned

    async def reset_prefix_cache(self) -> bool:
        """See :meth:`LLMEngine.reset_prefix_cache`."""
        return await self._ask(LLMEngine.reset_prefix_cache)

    async def update_lora(
        self, name: str, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None
    ) -> bool:
        """See :meth:`LLMEngine.update_lora`; running requests do not wait for it."""
        request = await self._ask(lambda engine: engine.update_request(name, tensors, config))
        return await _answer(self._loop.add_lora(request, is_update=True))

    async def get_metrics(self) -> dict[str, float]:
        """Counters and gauges by Prometheus name."""
        return await self._ask(LLMEngine.get_metrics)

    async def get_histograms(self) -> dict[str, Histogram]:
        """See :meth:`LLMEngine.get_histograms`."""
        return await self._ask(LLMEngine.get_histograms)

    async def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return await self._ask(LLMEngine.get_default_sampling_params)

    async def get_default_max_tokens(self) -> int | None:
        """See :meth:`LLMEngine.get_default_max_tokens`."""
        return await self._ask(LLMEngine.get_default_max_tokens)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError if it was not loaded."""
        if self._tokenizer is None:
            raise ConfigError("the engine was started with skip_tokenizer_init=True")
        return self._tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of a request, prompt and completion together."""
        return self._max_model_len

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._vocab_size

    @property
    def kv_pages(self) -> tuple[int, int]:
        """The number of KV pages, and the tokens each holds."""
        return self._kv_pages

    async def check_health(self) -> None:
        """Raises EngineDeadError if the engine stopped."""
        self._loop.check()

    def shutdown(self) -> None:
        """Stops the engine after the step under way; whoever still waits gets EngineDeadError. Its
        memory is free then, if nobody else has the engine."""
        self._finalizer()

    async def _ask(self, question: Callable[[LLMEngine], _T]) -> _T:
        return await _answer(self._loop.ask(question))

    async def _until(self, condition: Callable[[LLMEngine], bool]) -> None:
        await _answer(self._loop.until(condition))

    async def _tokenize(self, prompt: Prompt) -> Prompt:
        given: Any = prompt
        text = given.get("prompt") if isinstance(given, dict) else given
        if self._tokenizer is None or not isinstance(text, str):
            return prompt
        if isinstance(given, dict) and given.get("prompt_token_ids") is not None:
            return prompt
        ids = await self._tokenizer.encode_aside(text)
        # The engine looks at whatever else there is.
        fields = given if isinstance(given, dict) else {"prompt": text}
        return cast("TokensPrompt", {**fields, "prompt_token_ids": ids})

    def _mailbox(self) -> Mailbox:
        event_loop = asyncio.get_running_loop()
        if event_loop not in self._mailboxes:
            self._mailboxes[event_loop] = Mailbox(event_loop)
        return self._mailboxes[event_loop]


AsyncLLMEngine = AsyncLLM
"""vLLM's other name for it."""


async def _only_outputs(streams: list[AsyncGenerator[RequestOutput, None]]) -> list[RequestOutput]:
    """Of requests that have one output each."""

    async def only(stream: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
        output = await anext(stream)
        await stream.aclose()
        return output

    tasks = [asyncio.ensure_future(only(stream)) for stream in streams]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _answer(reply: Future[_T]) -> _T:
    """What a future of another thread yields. asyncio's own way to wait for one leaves a reference
    cycle that holds the answer: an error, whose traceback holds who asked."""
    event_loop = asyncio.get_running_loop()
    told = event_loop.create_future()

    def tell() -> None:
        if not told.done():
            told.set_result(None)

    def done(_: Future[Any]) -> None:
        # Raised if who asked has gone, and the event loop with it.
        with contextlib.suppress(RuntimeError):
            event_loop.call_soon_threadsafe(tell)

    reply.add_done_callback(done)
    try:
        await told
        return reply.result()
    finally:
        del reply
