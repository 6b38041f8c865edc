"""What is sent to the engine's thread, and what comes back.

A message's ``fail`` tells whoever waits for what it asks that there will be nothing. No message
leads to an error that it was told: the error's traceback leads to the message, and to the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.registered import HeldVersion
from jaxlora.engine.engine import LLMEngine
from jaxlora.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxlora.types import LoRARequest, Prompt, SamplingParams

Event = RequestOutput | Exception
"""What becomes of a request: an output (the last one is finished), or the error that ended it."""

Sink = Callable[[Event], None]
"""Where a request's events go. It is called on the engine's thread, so it may not block or raise.
Every request that is submitted gets exactly one last event."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Submit:
    """A request."""

    request_id: str
    prompt: Prompt
    params: SamplingParams | None
    lora_request: LoRARequest | None
    sink: Sink
    priority: int
    held: HeldVersion | None

    def fail(self, error: Exception) -> None:
        """The request ends with an error."""
        self.sink(error)


class _Notice:
    """A message that nobody waits for."""

    def fail(self, error: Exception) -> None:
        """There is nobody to be told."""


class _Question:
    """A message that is answered once."""

    def __init__(self) -> None:
        self._reply: Future[Any] | None = Future()
        # Its waiter cannot cancel it now, so that it can always be answered.
        self._reply.set_running_or_notify_cancel()

    @property
    def reply(self) -> Future[Any]:
        """Where the answer will be; not to be asked for once it is there."""
        assert self._reply is not None, "it was answered"
        return self._reply

    def answer(self, value: Any) -> None:
        """The answer."""
        reply, self._reply = self.reply, None
        reply.set_result(value)

    def fail(self, error: Exception) -> None:
        """The answer is an error."""
        reply, self._reply = self.reply, None
        reply.set_exception(error)


class AddLora(_Question):
    """An adapter is to be read and registered, if ``is_update`` in the place of one there is."""

    def __init__(self, lora_request: LoRARequest, *, is_update: bool) -> None:
        super().__init__()
        self.lora_request = lora_request
        self.is_update = is_update


class Ask(_Question):
    """The engine is to be asked."""

    def __init__(self, question: Callable[[LLMEngine], Any]) -> None:
        super().__init__()
        self.question = question


class Watch(_Question):
    """A condition is to be looked at until it holds; then the answer is True."""

    def __init__(self, condition: Callable[[LLMEngine], bool]) -> None:
        super().__init__()
        self.condition = condition


@dataclasses.dataclass(eq=False, kw_only=True)
class Abort(_Notice):
    """Requests are to end; if there is a sink, only one that has it."""

    request_ids: list[str]
    sink: Sink | None = None


@dataclasses.dataclass(eq=False, kw_only=True)
class Read(_Notice):
    """An adapter was read, or could not be. Those who wait for it are told by themselves."""

    asked_by: NeedsAdapter
    result: Future[Adapter] | None
    """None once it was looked at."""


@dataclasses.dataclass(eq=False, kw_only=True)
class EndHold(_Notice):
    """No further request will share a version of an adapter."""

    held: HeldVersion


class Stop(_Notice):
    """The loop is to end."""


NeedsAdapter = Submit | AddLora
"""What waits until an adapter is read."""
Message = Submit | AddLora | Ask | Watch | Abort | Read | EndHold | Stop


def never_ran(message: Submit) -> RequestOutput:
    """The last output of a request that was aborted before the engine had it."""
    prompt: Any = message.prompt
    fields = prompt if isinstance(prompt, dict) else {}
    completion = CompletionOutput(
        index=0, text="", token_ids=[], finish_reason="abort", lora_request=message.lora_request
    )
    return RequestOutput(
        request_id=message.request_id,
        prompt=prompt if isinstance(prompt, str) else fields.get("prompt"),
        prompt_token_ids=prompt
        if isinstance(prompt, list)
        else fields.get("prompt_token_ids") or [],
        outputs=[completion],
        finished=True,
        metrics=RequestMetrics(arrival_time=0.0),
        lora_request=message.lora_request,
    )
