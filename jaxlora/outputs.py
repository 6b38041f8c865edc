"""What a caller gets back: completions as far as they have come, and where an adapter is."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from jaxlora.types import LoRARequest

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(kw_only=True)
class RequestMetrics:
    """Seconds on the monotonic clock; None until it happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


class Logprob(NamedTuple):
    """How likely a token was, before sampling parameters had their say."""

    logprob: float
    rank: int | None = None
    """1 is the most likely token of the vocabulary."""
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""The token at one place, then the likeliest ones there, by id."""


@dataclasses.dataclass(kw_only=True)
class CompletionOutput:
    """One completion of a prompt, as far as it has come."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Sum over its tokens so far; None unless ``logprobs`` was asked for."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token id."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end-of-sequence and length."""
    lora_request: LoRARequest | None = None

    def finished(self) -> bool:
        """Whether there is no more of it to come."""
        return self.finish_reason is not None

    def followed_by(self, later: CompletionOutput) -> CompletionOutput:
        """What both add to the completion; its state is that of the later."""
        logprobs = later.logprobs
        if self.logprobs is not None and logprobs is not None:
            logprobs = self.logprobs + logprobs
        return dataclasses.replace(
            later,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            logprobs=logprobs,
        )


@dataclasses.dataclass(kw_only=True)
class RequestOutput:
    """A request's prompt and its completions, in order of their index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    lora_request: LoRARequest | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry per prompt token, None for the first; None unless it was asked for."""
    num_cached_tokens: int | None = None
    """Prompt tokens whose keys and values the first completion found computed; None before it has
    run."""
    error: Exception | None = None
    """Why it ended with finish reason "error"."""

    def followed_by(self, later: RequestOutput) -> RequestOutput:
        """Two outputs of kind DELTA as one: what they add is joined, the rest is that of the
        later."""
        completions = {completion.index: completion for completion in self.outputs}
        for new in later.outputs:
            old = completions.get(new.index)
            completions[new.index] = new if old is None else old.followed_by(new)
        return dataclasses.replace(
            later,
            outputs=[completions[i] for i in sorted(completions)],
            prompt_logprobs=self.prompt_logprobs or later.prompt_logprobs,
        )


@dataclasses.dataclass(kw_only=True)
class BeamSearchSequence:
    """One sequence that beam search found."""

    tokens: list[int]
    """Prompt and completion."""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    """One entry per token of the completion, as every step told them."""
    cum_logprob: float = 0.0
    text: str | None = None
    """Prompt and completion; None without a tokenizer."""
    finish_reason: FinishReason | None = None
    lora_request: LoRARequest | None = None


@dataclasses.dataclass(kw_only=True)
class BeamSearchOutput:
    """The best sequences of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAStatus:
    """A registered adapter, and where it is."""

    lora_name: str
    lora_int_id: int
    rank: int
    tier: Literal["device", "host", "source"]
    """"device" if it is in a slot, "source" if it must be read again before it can be."""
    pinned: bool
    waiting: bool
    """A request that uses it waits to be run."""
