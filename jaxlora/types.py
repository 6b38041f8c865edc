"""What a caller hands in and gets back: sampling parameters, adapter requests, outputs.

Names, defaults and ranges are vLLM's, so that scripts move over by changing an import.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

GREEDY_BELOW = 1e-5
MAX_STOP_IDS = 32
"""Most ids that min_tokens can hold back for one request (end-of-sequence ids included)."""

FinishReason = Literal["stop", "length", "abort"]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, and as the text they came from if the output is to show it."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


Prompt = str | list[int] | TextPrompt | TokensPrompt


class RequestOutputKind(enum.Enum):
    """What each output of a request holds: all so far, what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends.

    ``temperature`` below 1e-5 is greedy. ``top_k`` 0 or -1, ``top_p`` 1 and ``min_p`` 0 are off.
    With a ``seed`` the same request gives the same tokens whatever else runs; completion ``i`` of
    ``n`` is that of seed + i. ``max_tokens=None`` means up to the model's length.
    ``spaces_between_special_tokens=False`` matters only if special tokens are not skipped. Raises
    ValueError naming field, value and range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        _require("n", self.n, self.n >= 1, "at least 1")
        _require("temperature", self.temperature, 0 <= self.temperature <= 2, "in [0, 2]")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _require("top_k", self.top_k, self.top_k >= -1, "-1 or 0 (off), or at least 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        if self.max_tokens is not None:
            _require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
            within = 0 <= self.min_tokens <= self.max_tokens
            _require("min_tokens", self.min_tokens, within, f"in [0, {self.max_tokens}]")
        _require("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0")
        if self.seed is not None:
            in_range = -(2**63) <= self.seed < 2**64
            _require("seed", self.seed, in_range, "a 64-bit integer")
        _require("stop", stop, all(stop), "without an empty string")
        _require("stop", stop, self.detokenize or not stop, "empty when detokenize is off")
        _require("n", self.n, self.n == 1 or not self.greedy, "1 when sampling is greedy")

    @property
    def greedy(self) -> bool:
        """The most likely token, always."""
        return self.temperature < GREEDY_BELOW


def _require(field: str, value: Any, condition: bool, expected: str) -> None:
    if isinstance(value, float) and math.isnan(value):
        condition = False
    if not condition:
        raise ValueError(f"{field}={value!r} must be {expected}")


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """Asks for an adapter by name; ``lora_path`` is where its PEFT folder is.

    Positional as ``LoRARequest("sql", 1, path)``. ``lora_int_id`` may be left out: the name alone
    identifies the adapter.
    """

    lora_name: str
    lora_int_id: int | None = None
    lora_path: str = ""
    base_model_name: str | None = None

    def __post_init__(self) -> None:
        if not self.lora_name:
            raise ValueError("lora_name must not be empty")
        if self.lora_int_id is not None and self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")


@dataclasses.dataclass(kw_only=True)
class RequestMetrics:
    """Seconds on the monotonic clock; None until it happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclasses.dataclass(kw_only=True)
class CompletionOutput:
    """One completion of a prompt, as far as it has come."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end-of-sequence and length."""
    lora_request: LoRARequest | None = None

    def followed_by(self, later: CompletionOutput) -> CompletionOutput:
        """What both add to the completion; its state is that of the later."""
        return dataclasses.replace(
            later, text=self.text + later.text, token_ids=self.token_ids + later.token_ids
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

    def followed_by(self, later: RequestOutput) -> RequestOutput:
        """Two outputs of kind DELTA as one: what they add is joined, the rest is that of the
        later."""
        completions = {completion.index: completion for completion in self.outputs}
        for new in later.outputs:
            old = completions.get(new.index)
            completions[new.index] = new if old is None else old.followed_by(new)
        return dataclasses.replace(later, outputs=[completions[i] for i in sorted(completions)])
