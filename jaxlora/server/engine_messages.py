"""What the server and its engine's process tell each other.

Whatever is asked has a number of its own, by which it is answered: a request with news until the
last, a call with an :class:`Answer`, either also with an error.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
from multiprocessing.connection import Connection, Pipe
from typing import Any, Final

from jaxlora.engine_args import EngineArgs
from jaxlora.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import LoRARequest, SamplingParams, TokensPrompt

SECONDS_TO_END: Final = 30
"""That the engine's process has for the step under way, once it is to end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The first message: what to load."""

    args: EngineArgs
    use_tqdm: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready:
    """The answer to it; or else an error is. What does not change any more."""

    tokenizer: Tokenizer
    max_model_len: int
    vocab_size: int
    kv_pages: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """A request, as :meth:`AsyncLLM.generate` takes it."""

    prompt: TokensPrompt
    params: SamplingParams
    request_id: str
    lora_request: LoRARequest | None
    priority: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A method of :class:`AsyncLLM` to be awaited."""

    method: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Forget:
    """Nobody waits for the answer to a question of this number any more."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """The engine is to end."""


Question = Generate | Call | Forget | Stop


def question_bytes(number: int, question: Question) -> bytes:
    """A question as it is sent: its number, which can always be read, comes first."""
    return number.to_bytes(8) + pickle.dumps(question, pickle.HIGHEST_PROTOCOL)


def number_and_question(data: bytes) -> tuple[int, Question | Exception]:
    """A question that was sent, or why it cannot be read."""
    try:
        question: Question = pickle.loads(memoryview(data)[8:])
    except Exception as error:  # noqa: BLE001  whatever the class of something in it does
        return int.from_bytes(data[:8]), portable(error)
    return int.from_bytes(data[:8]), question


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a call returned, pickled: if that fails, it fails for who called."""

    value: bytes


News = tuple[Any, ...]
"""A request's output, without what the one who asked knows. Plain values, because it is made and
sent for every token: pickle takes several times as long for objects."""

Reply = News | Answer | Exception

_UNREAD_BYTES: Final = 16 << 10


def both_ends() -> tuple[Connection, Connection]:
    """What questions and replies go through: the server's end, and the engine's. Of replies it
    holds about a step's that were not read, so that further ones are joined where they wait."""
    ours, theirs = Pipe()
    with socket.socket(fileno=os.dup(theirs.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
    return ours, theirs


def news_of(output: RequestOutput) -> News:
    """What is sent of an output."""
    metrics = output.metrics
    return (
        [
            (
                each.index,
                each.text,
                each.token_ids,
                each.cumulative_logprob,
                each.logprobs,
                each.finish_reason,
                each.stop_reason,
            )
            for each in output.outputs
        ],
        output.finished,
        (
            metrics.arrival_time,
            metrics.first_scheduled_time,
            metrics.first_token_time,
            metrics.finished_time,
        ),
        output.prompt_logprobs,
        output.num_cached_tokens,
    )


def output_of(news: News, asked: Generate) -> RequestOutput:
    """The output that was sent."""
    completions, finished, times, prompt_logprobs, num_cached_tokens = news
    arrival, first_scheduled, first_token, end = times
    lora_request = asked.lora_request
    return RequestOutput(
        request_id=asked.request_id,
        prompt=asked.prompt.get("prompt"),
        prompt_token_ids=asked.prompt["prompt_token_ids"],
        outputs=[
            CompletionOutput(
                index=index,
                text=text,
                token_ids=token_ids,
                cumulative_logprob=cumulative_logprob,
                logprobs=logprobs,
                finish_reason=finish_reason,
                stop_reason=stop_reason,
                lora_request=lora_request,
            )
            for (
                index,
                text,
                token_ids,
                cumulative_logprob,
                logprobs,
                finish_reason,
                stop_reason,
            ) in completions
        ],
        finished=finished,
        metrics=RequestMetrics(
            arrival_time=arrival,
            first_scheduled_time=first_scheduled,
            first_token_time=first_token,
            finished_time=end,
        ),
        lora_request=lora_request,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=num_cached_tokens,
    )


def portable(error: BaseException) -> Exception:
    """An error that another process can be told: without its traceback and its causes, and of a
    class that can be made again there."""
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever an error's class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return copied if isinstance(copied, Exception) else RuntimeError(repr(error))
