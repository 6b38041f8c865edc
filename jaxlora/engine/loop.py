"""The engine's thread: requests go in as messages, outputs come out to sinks, nothing is shared.

One thread owns the :class:`LLMEngine`, so the engine needs no locks. Everyone else holds an
:class:`EngineLoop` and sends it messages, which are taken between steps. Adapters are read on
threads of their own and only registered here, so that no step waits for a disk.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from jaxlora.adapters.registered import HeldVersion
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.messages import (
    Abort,
    AddLora,
    Ask,
    EndHold,
    Message,
    NeedsAdapter,
    Read,
    Sink,
    Stop,
    Submit,
    Watch,
    never_ran,
)
from jaxlora.errors import EngineDeadError, forget_frames
from jaxlora.outputs import RequestOutput
from jaxlora.types import LoRARequest, Prompt, SamplingParams

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_NUM_READERS = 4
_RECEIVE_SECONDS = 5e-3
"""After how long the engine steps again although more messages have come: a request may be many
prompts with many completions each, and who runs already does not wait for all of them."""
_SWITCH_SECONDS = 1e-4
"""After how long a thread that runs Python lets another one that waits; Python's 5 ms are a step's
length."""


class EngineLoop:
    """The one door to an engine. Its methods may be called from any thread and never block.

    If a step fails, the loop ends: every request and every question is answered with
    EngineDeadError, chained to the cause, and so is whatever comes later. A request that is refused
    concerns its own sink alone.

    While adapters are read their threads take turns with the engine's; so that it need not wait
    long for its own, the interpreter's switch interval is lowered, for the whole process.
    """

    def __init__(self, engine: LLMEngine) -> None:
        if engine.scheduler.has_work:
            raise ValueError("the engine has requests: step until they have ended, or abort them")
        if engine.owner is not None:
            raise ValueError("the engine is another AsyncLLM's: shut that one down first")
        self._engine = engine
        """Gone with the thread, so that nothing here keeps its memory."""
        self._wake = engine.wake
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        """By request id, for every request that is not finished."""
        self._waiting: dict[str, list[NeedsAdapter]] = {}
        """Adapter name -> what waits until it is read."""
        self._held: set[HeldVersion] = set()
        """Versions that are shared by requests, some of them perhaps to come."""
        self._watched: list[Watch] = []
        self._readers = ThreadPoolExecutor(_NUM_READERS, "jaxlora-adapters")
        self._stopped = False
        self._cause: BaseException | None = None
        take_turns_quickly()
        self._thread = threading.Thread(target=self._run, name="jaxlora-engine", daemon=True)
        engine.owner = self._thread
        self._thread.start()

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None,
        lora_request: LoRARequest | None,
        sink: Sink,
        *,
        priority: int = 0,
        held: HeldVersion | None = None,
    ) -> None:
        """Queues a request; whatever becomes of it, a refusal included, goes to its sink. All that
        share what is ``held`` get one version of the adapter, until :meth:`end_hold`."""
        self._send(
            Submit(
                request_id=request_id,
                prompt=prompt,
                params=params,
                lora_request=lora_request,
                sink=sink,
                priority=priority,
                held=held,
            )
        )

    def abort(self, request_ids: Iterable[str], sink: Sink | None = None) -> None:
        """Ends requests; each sink gets a last output with finish reason "abort". Ids that are
        unknown or finished, or with ``sink`` belong to another one, are passed over."""
        self._send(Abort(request_ids=list(request_ids), sink=sink))

    def end_hold(self, held: HeldVersion) -> None:
        """No further request will share a version of an adapter; each needs this once."""
        self._send(EndHold(held=held))

    def add_lora(self, lora_request: LoRARequest, *, is_update: bool = False) -> Future[bool]:
        """Reads and registers an adapter as :meth:`LLMEngine.add_lora` does. One that
        ``is_update`` is refused with AdapterNotFoundError if there is none of its name any more."""
        message = AddLora(lora_request, is_update=is_update)
        reply = message.reply
        self._send(message)
        return reply

    def ask(self, question: Callable[[LLMEngine], _T]) -> Future[_T]:
        """What the engine answers; it is asked on its thread, between two steps."""
        message = Ask(question)
        reply = message.reply
        self._send(message)
        return reply

    def until(self, condition: Callable[[LLMEngine], bool]) -> Future[bool]:
        """True, as soon as a condition holds after a step; what it raises ends the wait."""
        message = Watch(condition)
        reply = message.reply
        self._send(message)
        return reply

    def check(self) -> None:
        """Raises EngineDeadError unless the loop runs."""
        if self._stopped:
            raise self._error()

    def shutdown(self) -> None:
        """Ends the loop after the step under way; requests that are left get EngineDeadError. The
        engine may be used again, and is gone if nobody else has it."""
        self._send(Stop())
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, message: Message) -> None:
        self._inbox.put(message)
        self._wake()
        # The thread sets the flag before it empties the inbox for the last time, so one of the two
        # finds the message.
        if self._stopped:
            self._empty_inbox()

    def _empty_inbox(self) -> None:
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            message.fail(self._error())

    def _error(self) -> EngineDeadError:
        """A new instance each time: threads that raise it add to its traceback."""
        if self._cause is None:
            return EngineDeadError("the engine was shut down")
        error = EngineDeadError(
            f"the engine stopped after {type(self._cause).__name__}: {self._cause}"
        )
        error.__cause__ = self._cause
        return error

    # On the engine's thread from here on.

    def _run(self) -> None:
        try:
            while self._receive():
                if self._engine.has_work():
                    self._deliver(self._engine.step())
                self._answer_watched()
        except BaseException as cause:
            # Whatever it is, all who wait are told, and nobody is left to raise it to.
            logger.exception("the engine stopped")
            # Logged with its traceback, which holds all that there is of the engine.
            self._cause = cause.with_traceback(None)
        finally:
            self._stopped = True
            self._readers.shutdown(wait=False, cancel_futures=True)
            left = list(self._sinks)
            self._fail_all()
            self._engine.abort_request(left)
            for held in self._held:
                self._engine.adapters.end_hold(held)
            self._engine.owner = None
            self._wake = _wake_nobody
            del self._engine

    def _receive(self) -> bool:
        """Takes the messages that have come, waiting for one if there is nothing else to do; False
        if the loop is to end."""
        idle = not self._engine.has_work()
        end = time.monotonic() + _RECEIVE_SECONDS
        # No more than there are now: senders must not keep the engine from stepping.
        for _ in range(max(self._inbox.qsize(), int(idle))):
            message = self._inbox.get()
            if isinstance(message, Stop):
                return False
            self._handle(message)
            if time.monotonic() >= end and not idle:
                break
        return True

    def _handle(self, message: Message) -> None:
        try:
            match message:
                case Submit():
                    self._submit(message)
                case AddLora():
                    self._add_lora(message)
                case Ask():
                    message.answer(message.question(self._engine))
                case Watch():
                    self._watched.append(message)
                case Abort():
                    self._abort(message)
                case Read():
                    self._read_done(message)
                case EndHold():
                    self._held.discard(message.held)
                    self._engine.adapters.end_hold(message.held)
        except Exception as error:  # noqa: BLE001  who sent the message is told, nobody else
            message.fail(error)

    def _submit(self, message: Submit) -> None:
        request_id, lora_request = message.request_id, message.lora_request
        if request_id in self._sinks:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        held = message.held
        is_held = held is not None and held.entry is not None
        if lora_request is not None and not is_held and not self._engine.adapters.has(lora_request):
            self._read(lora_request, message)
        else:
            if held is not None and not held.is_over:
                self._held.add(held)
            self._engine.add_request(
                request_id,
                message.prompt,
                message.params,
                lora_request,
                priority=message.priority,
                held=held,
            )
        self._sinks[request_id] = message.sink

    def _add_lora(self, message: AddLora) -> None:
        if self._engine.adapters.must_read(message.lora_request):
            self._read(message.lora_request, message)
        else:
            message.answer(False)

    def _answer_watched(self) -> None:
        watched, self._watched = self._watched, []
        for message in watched:
            try:
                if message.condition(self._engine):
                    message.answer(True)
                else:
                    self._watched.append(message)
            except Exception as error:  # noqa: BLE001  who waits for it is told
                message.fail(error)

    def _read(self, lora_request: LoRARequest, message: NeedsAdapter) -> None:
        """Keeps a message until its adapter is read, which begins unless it has begun."""
        adapters = self._engine.adapters
        message.lora_request = lora_request = adapters.names.with_path(lora_request)
        name = lora_request.lora_name
        if name in self._waiting:
            self._waiting[name].append(message)
            return
        result = self._readers.submit(adapters.read, lora_request)
        self._waiting[name] = [message]
        result.add_done_callback(lambda done: self._send(Read(asked_by=message, result=done)))

    def _read_done(self, message: Read) -> None:
        first = message.asked_by
        read = first.lora_request
        result, message.result = message.result, None
        assert read is not None
        assert result is not None
        waiting = self._waiting.pop(read.lora_name)
        error: Exception | None = None
        is_new = False
        try:
            if isinstance(first, AddLora) and first.is_update:
                self._engine.adapters.names.find(read.lora_name)
            is_new = self._engine.adapters.register(read, result.result())
        except Exception as refusal:  # noqa: BLE001  those who asked for this adapter are told
            forget_frames(refusal)
            error = refusal
        finally:
            del result  # It has the error, whose traceback has this frame.
        for each in waiting:
            if isinstance(each, Submit):
                del self._sinks[each.request_id]
            # What came after a read in place had begun may ask for newer content than it found.
            answered = each is first or (each.lora_request == read and not read.load_inplace)
            if answered and error is not None:
                each.fail(error)
            elif answered and isinstance(each, AddLora):
                each.answer(each is first and is_new)
            else:
                # The adapter is known now; or another path under its name, or to be read again.
                if answered:
                    each.lora_request = dataclasses.replace(read, load_inplace=False)
                self._handle(each)
        del error

    def _abort(self, message: Abort) -> None:
        request_ids, sink = message.request_ids, message.sink
        if sink is not None:
            # One that was refused because its id is in use leaves who uses it alone.
            request_ids = [each for each in request_ids if self._sinks.get(each) is sink]
        self._deliver(self._engine.abort_request(request_ids))
        left = {each for each in request_ids if each in self._sinks}
        for name, waiting in self._waiting.items():
            gone = [m for m in waiting if isinstance(m, Submit) and m.request_id in left]
            self._waiting[name] = [message for message in waiting if message not in gone]
            self._deliver([never_ran(message) for message in gone])

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            sink = self._sinks[output.request_id]
            if output.finished:
                del self._sinks[output.request_id]
            sink(output if output.error is None else output.error)

    def _fail_all(self) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(self._error())
        waiting, self._waiting = self._waiting, {}
        for message in (m for messages in waiting.values() for m in messages):
            if isinstance(message, AddLora):
                message.fail(self._error())
        watched, self._watched = self._watched, []
        for unanswered in watched:
            unanswered.fail(self._error())
        self._empty_inbox()


def take_turns_quickly() -> None:
    """Lowers the interpreter's switch interval, for the whole process, so that no thread that is
    needed for each step's tokens waits long for one that runs Python."""
    sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_SECONDS))


def _wake_nobody() -> None:
    """There is no engine any more."""
