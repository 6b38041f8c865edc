"""The server's engine, in a process of its own.

A token over HTTP takes some 40 us of Python, and a step of 128 rows 2 to 3 ms of it, on one lock if
they were in one process: together about as long as such a step takes on the device. So the engine
has a process to itself, and the server another, which hears of all tokens of a step at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from multiprocessing.connection import Connection
from typing import Any

from jaxlora.async_llm import AsyncLLM
from jaxlora.engine.histogram import Histogram
from jaxlora.engine.loop import take_turns_quickly
from jaxlora.engine.mailbox import Stream
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import EngineDeadError
from jaxlora.outputs import BeamSearchOutput, LoRAStatus, RequestOutput
from jaxlora.server.engine_messages import (
    SECONDS_TO_END,
    Answer,
    Call,
    Forget,
    Generate,
    Question,
    Ready,
    Reply,
    Start,
    Stop,
    both_ends,
    output_of,
    portable,
    question_bytes,
)
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import (
    BeamSearchParams,
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
    TokensPrompt,
)

logger = logging.getLogger(__name__)

# Who ends a service may signal all of its processes: it is the server that says when this one ends.
_SCRIPT = (
    "from signal import *; signal(SIGTERM, SIG_IGN); signal(SIGINT, SIG_IGN); "
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from jaxlora.server.engine_worker import main; main()"
)
_SECONDS_TO_READ = 10
"""Until the last of what a process has sent was read, if nothing else has the pipe's other end."""
_MESSAGES_AHEAD = 2
"""That are read before the event loop has taken those in front: what has to wait then is joined by
who sends it."""


class EngineProcess:
    """What the server needs of an :class:`AsyncLLM`, by the same names. For one event loop, on
    which ``ended()`` is called if the process ends by itself, after all who wait were told.

    As with an engine in this process, the interpreter's switch interval is lowered.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        connection: Connection,
        ready: Ready,
        event_loop: asyncio.AbstractEventLoop,
        ended: Callable[[], object],
    ) -> None:
        take_turns_quickly()
        self._process = process
        self._connection = connection
        self._ready = ready
        self._event_loop = event_loop
        self._ended = ended
        self._numbers = itertools.count()
        self._waiting: dict[int, Callable[[Reply], None]] = {}
        """Who is told of what is answered, by number."""
        self._end: EngineDeadError | None = None
        self._is_shut_down = False
        self._questions: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(_MESSAGES_AHEAD)
        self._writer = threading.Thread(target=self._write, name="jaxlora-questions", daemon=True)
        self._reader = threading.Thread(target=self._read, name="jaxlora-replies", daemon=True)
        self._writer.start()
        self._reader.start()

    @classmethod
    def start(
        cls,
        args: EngineArgs,
        event_loop: asyncio.AbstractEventLoop,
        *,
        use_tqdm: bool,
        begun: Callable[[subprocess.Popen[bytes]], object],
        ended: Callable[[], object],
    ) -> EngineProcess:
        """Loads the model and compiles everything, in the process, which is told to ``begun()`` as
        soon as there is one. Raises what :meth:`AsyncLLM.from_engine_args` does, or EngineDeadError
        if the process ends."""
        ours, theirs = both_ends()
        with theirs:
            # What is imported here is imported there, and nothing that lies about.
            path = json.dumps([*map(str, sys.path)])
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SCRIPT, path, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C is for the server, which lets requests finish.
                start_new_session=True,
            )
        begun(process)
        try:
            ready = _first_answer(process, ours, Start(args=args, use_tqdm=use_tqdm))
            if isinstance(ready, Exception):
                raise ready
        except BaseException:
            # It has nothing more to do, or was never told what.
            ours.close()
            process.kill()
            process.wait()
            raise
        return cls(process, ours, ready, event_loop, ended)

    async def generate(
        self,
        prompt: TokensPrompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """See :meth:`AsyncLLM.generate`."""
        self._check()
        stream = Stream(adds_up=sampling_params.output_kind is RequestOutputKind.DELTA)
        number = next(self._numbers)
        asked = Generate(
            prompt=prompt,
            params=sampling_params,
            request_id=request_id,
            lora_request=lora_request,
            priority=priority,
        )

        def tell(reply: Reply) -> None:
            stream.put(output_of(reply, asked) if isinstance(reply, tuple) else _error(reply))

        self._waiting[number] = tell
        finished = False
        try:
            self._ask(number, asked)
            while not finished:
                output = await stream.get()
                finished = output.finished
                yield output
        finally:
            del self._waiting[number]
            if not finished:
                self._ask(number, Forget())

    async def beam_search(
        self,
        prompt: TokensPrompt,
        params: BeamSearchParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> BeamSearchOutput:
        """See :meth:`AsyncLLM.beam_search`."""
        options = {"lora_request": lora_request, "priority": priority}
        return await self._call("beam_search", prompt, params, request_id, **options)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """See :meth:`AsyncLLM.add_lora`."""
        return await self._call("add_lora", lora_request)

    async def remove_lora(self, lora_int_id: int) -> bool:
        """See :meth:`AsyncLLM.remove_lora`."""
        return await self._call("remove_lora", lora_int_id)

    async def lora_id(self, lora_name: str) -> int | None:
        """See :meth:`AsyncLLM.lora_id`."""
        return await self._call("lora_id", lora_name)

    async def describe_loras(self) -> list[LoRAStatus]:
        """See :meth:`AsyncLLM.describe_loras`."""
        return await self._call("describe_loras")

    async def get_metrics(self) -> dict[str, float]:
        """See :meth:`AsyncLLM.get_metrics`."""
        return await self._call("get_metrics")

    async def get_histograms(self) -> dict[str, Histogram]:
        """See :meth:`AsyncLLM.get_histograms`."""
        return await self._call("get_histograms")

    async def get_default_sampling_params(self) -> SamplingParams:
        """See :meth:`AsyncLLM.get_default_sampling_params`."""
        return await self._call("get_default_sampling_params")

    async def get_default_max_tokens(self) -> int | None:
        """See :meth:`AsyncLLM.get_default_max_tokens`."""
        return await self._call("get_default_max_tokens")

    async def check_health(self) -> None:
        """See :meth:`AsyncLLM.check_health`."""
        await self._call("check_health")

    def get_tokenizer(self) -> Tokenizer:
        """See :meth:`AsyncLLM.get_tokenizer`."""
        return self._ready.tokenizer

    @property
    def max_model_len(self) -> int:
        """See :meth:`AsyncLLM.max_model_len`."""
        return self._ready.max_model_len

    @property
    def vocab_size(self) -> int:
        """See :meth:`AsyncLLM.vocab_size`."""
        return self._ready.vocab_size

    @property
    def kv_pages(self) -> tuple[int, int]:
        """See :meth:`AsyncLLM.kv_pages`."""
        return self._ready.kv_pages

    def shutdown(self) -> None:
        """Ends the process after the step under way; whoever still waits gets EngineDeadError. Not
        to be called on the event loop's thread."""
        self._is_shut_down = True
        self._ask(next(self._numbers), Stop())
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            logger.warning("the engine's process does not end, and is killed")
            self._process.kill()
            self._process.wait()
        self._reader.join(_SECONDS_TO_READ)
        self._writer.join(_SECONDS_TO_READ)
        if not (self._reader.is_alive() or self._writer.is_alive()):
            self._connection.close()

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        self._check()
        number = next(self._numbers)
        told: asyncio.Future[Reply] = self._event_loop.create_future()

        def tell(reply: Reply) -> None:
            if not told.done():
                told.set_result(reply)

        self._waiting[number] = tell
        try:
            asked = Call(method=method, arguments=arguments, options=options)
            # On a thread, as it may hold an adapter's tensors.
            self._questions.put(await asyncio.to_thread(question_bytes, number, asked))
            reply = await told
        except asyncio.CancelledError:
            self._ask(number, Forget())
            raise
        finally:
            del self._waiting[number]
        if isinstance(reply, Answer):
            return pickle.loads(reply.value)
        raise _error(reply)

    def _ask(self, number: int, question: Question) -> None:
        # It is pickled here, where an error concerns who asks.
        self._questions.put(question_bytes(number, question))

    def _check(self) -> None:
        if self._end is not None:
            raise EngineDeadError(str(self._end))

    def _take(self, data: bytes) -> None:
        """On the event loop."""
        self._room.release()
        replies: dict[int, Reply] = pickle.loads(data)
        for number, reply in replies.items():
            tell = self._waiting.get(number)
            if tell is None:
                continue  # Nobody waits for it any more.
            try:
                tell(reply)
            except Exception as error:
                logger.exception("a reply of the engine's process could not be taken")
                tell(portable(error))

    def _take_end(self, why: str) -> None:
        self._end = EngineDeadError(why)
        for tell in list(self._waiting.values()):
            tell(EngineDeadError(why))
        if not self._is_shut_down:
            self._ended()

    def _read(self) -> None:
        """On its own thread."""
        call = self._event_loop.call_soon_threadsafe
        # Raised if the event loop is closed: nobody is left to be told.
        with contextlib.suppress(RuntimeError):
            while (data := self._received()) is not None:
                while not self._room.acquire(timeout=1):
                    if self._event_loop.is_closed():
                        break
                call(self._take, data)
            why = "the engine was shut down"
            if not self._is_shut_down:
                why = _end_of(self._process, "while it served")
                logger.error("%s", why)
            call(self._take_end, why)
        self._questions.put(None)

    def _received(self) -> bytes | None:
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            return None

    def _write(self) -> None:
        """On its own thread, since the engine's process may be slow to read."""
        try:
            while (question := self._questions.get()) is not None:
                self._connection.send_bytes(question)
        except OSError:
            # It has ended, and the thread that reads says so.
            return


def _first_answer(
    process: subprocess.Popen[bytes], connection: Connection, start: Start
) -> Ready | Exception:
    try:
        connection.send(start)
        answer: Ready | Exception = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise EngineDeadError(_end_of(process, "while it was loading")) from error
    return answer


def _error(reply: Reply) -> Exception:
    assert isinstance(reply, Exception)
    return reply


def _end_of(process: subprocess.Popen[bytes], when: str) -> str:
    try:
        status = process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"the engine's process {how} {when}"


ServedLLM = AsyncLLM | EngineProcess
"""What a server may be of."""
