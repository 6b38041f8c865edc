"""The process that has the engine, see :mod:`engine_process`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from jaxlora.async_llm import AsyncLLM
from jaxlora.engine.mailbox import joined
from jaxlora.engine.messages import Event
from jaxlora.errors import JaxloraError, forget_frames
from jaxlora.outputs import RequestOutput
from jaxlora.server import LOG_FORMAT
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
    news_of,
    number_and_question,
    portable,
)
from jaxlora.types import RequestOutputKind

logger = logging.getLogger(__name__)


def main() -> None:
    """Loads what the first message says, and answers until the server says so or has ended."""
    logging.basicConfig(format=LOG_FORMAT, level="INFO")
    file = int(sys.argv[2])
    # What XLA starts must not keep it open.
    os.set_inheritable(file, False)
    connection = Connection(file)
    try:
        start: Start = connection.recv()
    except EOFError:
        return
    inbox = Inbox(connection, give_up)
    try:
        llm = AsyncLLM.from_engine_args(start.args, use_tqdm=start.use_tqdm)
        tokenizer = llm.get_tokenizer()
    except Exception as error:  # noqa: BLE001  the server ends with its message
        connection.send(portable(error) if isinstance(error, OSError) else _told(error))
        return
    # All of it stays: to look for garbage in it would hold up every step that comes.
    gc.collect()
    gc.freeze()
    ready = Ready(
        tokenizer=tokenizer,
        max_model_len=llm.max_model_len,
        vocab_size=llm.vocab_size,
        kv_pages=llm.kv_pages,
    )
    worker = Worker(llm, Outbox(connection, give_up))
    asyncio.run(worker.run(inbox, partial(connection.send, ready)))
    # Nothing waits for a thread that still downloads, or compiles a grammar.
    _exit(0)


def give_up() -> None:
    """Ends the process at once: it is inside a compiler, or of no use any more."""
    _exit(1)


def _exit(status: int) -> NoReturn:
    logging.shutdown()
    os._exit(status)


class Inbox:
    """Reads what the server asks, on a thread: without the server there is nothing to do, and an
    engine that is still loading ends then, too, by ``give_up()``; one that serves, if it takes more
    than :data:`SECONDS_TO_END` for the step under way."""

    def __init__(self, connection: Connection, give_up: Callable[[], object]) -> None:
        self._connection = connection
        self._give_up = give_up
        self._lock = threading.Lock()
        self._worker: tuple[asyncio.AbstractEventLoop, Worker] | None = None
        threading.Thread(target=self._read, name="jaxlora-inbox", daemon=True).start()

    def hand_over(self, worker: Worker) -> None:
        """From now on whatever comes is for a worker, on its event loop."""
        with self._lock:
            self._worker = asyncio.get_running_loop(), worker

    def _read(self) -> None:
        question: Question | Exception | None = None
        while not isinstance(question, Stop):
            number, question = self._next()
            with self._lock:
                if self._worker is None:
                    self._give_up()
                    return
                loop, worker = self._worker
            if isinstance(question, Stop):
                timer = threading.Timer(SECONDS_TO_END, self._give_up)
                timer.daemon = True
                timer.start()
            with contextlib.suppress(RuntimeError):  # It has ended.
                loop.call_soon_threadsafe(worker.take, number, question)

    def _next(self) -> tuple[int, Question | Exception]:
        try:
            return number_and_question(self._connection.recv_bytes())
        except (EOFError, OSError):
            return 0, Stop()
        except Exception:
            logger.exception("what the server asks cannot be read")
            return 0, Stop()


class Outbox:
    """Sends replies, on a thread. Of each request it holds one event, which stands for all that
    could not be sent yet: a server that is slow costs neither the engine's time nor memory. If
    nothing can be sent any more, ``give_up()``."""

    def __init__(self, connection: Connection, give_up: Callable[[], object]) -> None:
        self._connection = connection
        self._give_up = give_up
        self._changed = threading.Condition()
        self._replies: dict[int, Event | Answer] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._send, name="jaxlora-outbox", daemon=True)
        self._thread.start()

    def put(self, number: int, reply: Event | Answer, *, adds_up: bool = False) -> None:
        """Any thread may call it. For ``adds_up`` see :func:`joined`."""
        with self._changed:
            if not self._replies:
                self._changed.notify()
            self._replies[number] = joined(self._replies.get(number), reply, adds_up=adds_up)

    def close(self) -> None:
        """Returns when all has been sent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _send(self) -> None:
        try:
            while replies := self._next():
                sent: dict[int, Reply] = {
                    number: news_of(reply) if isinstance(reply, RequestOutput) else reply
                    for number, reply in replies.items()
                }
                self._connection.send_bytes(pickle.dumps(sent, pickle.HIGHEST_PROTOCOL))
        except OSError:
            # The server has ended, and the inbox says so.
            return
        except Exception:
            logger.exception("nothing can be told to the server any more")
            self._give_up()

    def _next(self) -> dict[int, Event | Answer]:
        with self._changed:
            self._changed.wait_for(lambda: self._replies or self._is_closed)
            replies, self._replies = self._replies, {}
        return replies


class Worker:
    """Answers questions, on its event loop."""

    def __init__(self, llm: AsyncLLM, outbox: Outbox) -> None:
        self._llm, self._outbox = llm, outbox
        self._stopped = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """By the question's number, until it is answered."""

    async def run(self, inbox: Inbox, tell_ready: Callable[[], object]) -> None:
        """Until it is told to stop; questions may come as soon as the server is told."""
        inbox.hand_over(self)
        tell_ready()
        await self._stopped.wait()
        await asyncio.to_thread(self._llm.shutdown)
        await asyncio.to_thread(self._outbox.close)

    def take(self, number: int, question: Question | Exception) -> None:
        """What the server asks; or why that cannot be read."""
        match question:
            case Generate():
                self._begin(number, self._generate(number, question))
            case Call():
                self._begin(number, self._call(number, question))
            case Forget():
                if number in self._tasks:
                    self._tasks[number].cancel()
            case Stop():
                self._stopped.set()
            case Exception():
                self._outbox.put(number, question)

    def _begin(self, number: int, answering: Coroutine[Any, Any, None]) -> None:
        self._tasks[number] = task = asyncio.create_task(answering)
        task.add_done_callback(lambda _: self._tasks.pop(number))

    async def _generate(self, number: int, asked: Generate) -> None:
        """Ends with the request."""
        loop, outbox = asyncio.get_running_loop(), self._outbox
        adds_up = asked.params.output_kind is RequestOutputKind.DELTA
        ended = asyncio.Event()

        def sink(event: Event) -> None:
            """On the engine's thread."""
            is_last = isinstance(event, Exception) or event.finished
            told = _told(event) if isinstance(event, Exception) else event
            outbox.put(number, told, adds_up=adds_up)
            if is_last:
                loop.call_soon_threadsafe(ended.set)

        try:
            await self._llm.submit(
                asked.prompt,
                asked.params,
                asked.request_id,
                asked.lora_request,
                sink,
                priority=asked.priority,
            )
            await ended.wait()
        except asyncio.CancelledError:
            self._llm.withdraw(asked.request_id, sink)
            raise
        except Exception as error:  # noqa: BLE001  who asked is told
            outbox.put(number, _told(error))

    async def _call(self, number: int, asked: Call) -> None:
        try:
            method = getattr(self._llm, asked.method)
            value = await method(*asked.arguments, **asked.options)
            reply: Answer | Exception = Answer(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
        except Exception as error:  # noqa: BLE001  who asked is told
            reply = _told(error)
        self._outbox.put(number, reply)


def _told(error: Exception) -> Exception:
    """What the server is told of an error; where it came up is told here, if nobody expects it."""
    if not isinstance(error, JaxloraError | ValueError):
        logger.error("unexpected in the engine's process", exc_info=error)
    forget_frames(error)
    return portable(error)
