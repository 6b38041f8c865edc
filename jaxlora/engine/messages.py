"""What is sent to the engine's thread, and what comes back.

A message's ``fail`` tells whoever waits for what it asks that there will be nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from jaxlora.adapters.adapter import Adapter
from jaxlora.types import (
    CompletionOutput,
    LoRARequest,
    Prompt,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)

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

    def fail(self, error: Exception) -> None:
        """The request ends with an error."""
        self.sink(error)


@dataclasses.dataclass(eq=False, kw_only=True)
class AddLora:
    """An adapter is to be read and registered."""

    lora_request: LoRARequest
    reply: Future[Any]

    def fail(self, error: Exception) -> None:
        """The answer is an error."""
        self.reply.set_exception(error)


@dataclasses.dataclass(eq=False, kw_only=True)
class Ask:
    """A method of the engine is to be called."""

    method: str
    args: tuple[Any, ...]
    reply: Future[Any]
    wait: bool = False
    """To answer once it has taken effect, for remove_lora and pin_lora."""

    def fail(self, error: Exception) -> None:
        """The answer is an error."""
        self.reply.set_exception(error)


@dataclasses.dataclass(eq=False, kw_only=True)
class Abort:
    """Requests are to end."""

    request_ids: list[str]

    def fail(self, error: Exception) -> None:
        """Nobody waits for it."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Read:
    """An adapter was read, or could not be."""

    asked_by: NeedsAdapter
    result: Future[Adapter]

    def fail(self, error: Exception) -> None:
        """Those who wait for the adapter are told by themselves."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Stop:
    """The loop is to end."""

    def fail(self, error: Exception) -> None:
        """It has stopped."""


NeedsAdapter = Submit | AddLora
"""What waits until an adapter is read."""
Message = Submit | AddLora | Ask | Abort | Read | Stop


def new_reply() -> Future[Any]:
    """A future that its waiter cannot cancel, so that it can always be answered."""
    reply: Future[Any] = Future()
    reply.set_running_or_notify_cancel()
    return reply


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
        prompt_token_ids=prompt if isinstance(prompt, list) else fields.get("prompt_token_ids", []),
        outputs=[completion],
        finished=True,
        metrics=RequestMetrics(arrival_time=0.0),
        lora_request=message.lora_request,
    )
