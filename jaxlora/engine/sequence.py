"""One completion in the making: its tokens, what it holds, and when it ends."""

from __future__ import annotations

import dataclasses
import enum
from array import array

from jaxlora.adapters.registered import Registered
from jaxlora.engine.constraint import Constraint
from jaxlora.outputs import CompletionOutput, FinishReason, RequestMetrics, TokenLogprobs
from jaxlora.tokenizer import Detokenizer
from jaxlora.types import LoRARequest, SamplingParams


class Status(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False, kw_only=True)
class Sequence:
    """A prompt and the tokens that followed it.

    ``token_ids`` are those the host knows; a sampled token is *in flight* from the moment its step
    is planned until the host has read it.
    """

    request_id: str
    index: int = 0
    """Which of the request's completions it is."""
    prompt_token_ids: list[int]
    params: SamplingParams
    max_len: int
    """Tokens, prompt included, after which it ends with "length"."""
    eos_token_ids: frozenset[int]
    """Ids that end it; empty when they are ignored."""
    seed: int
    metrics: RequestMetrics
    lora_request: LoRARequest | None = None
    adapter: Registered | None = None
    detokenizer: Detokenizer | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not come to be in the completion."""
    constraint: Constraint | None = None
    cache_salt: str = ""
    """It shares pages with sequences of the same salt only."""

    priority: int = 0
    """Lower comes first."""
    arrival: int = 0
    """Its number in the order of arrival, given by the scheduler."""

    status: Status = Status.WAITING
    token_ids: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in the cache once all planned steps have run."""
    num_in_flight: int = 0
    num_at_admission: int = 0
    """Tokens it had when it was last given a row."""
    last_token_time: float | None = None
    """When its last token was read, in seconds on the monotonic clock; None before the first."""
    num_cached_tokens: int | None = None
    """Prompt tokens it found computed when it was first admitted; None before."""
    pages: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    """An array, because numpy copies it to a step's table without looking at each."""
    num_pages_with_key: int = 0
    """Of its pages, how many others can find."""
    page_keys: list[bytes] = dataclasses.field(default_factory=list)
    """The prefix cache's: where its chain of keys begins, then a key for each full page so far."""
    row: int = -1
    """Its row in the device's table of last tokens, while it runs."""
    slot: int = -1
    """Its adapter's slot while it runs, -1 for the base model."""
    text: str = ""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    """One entry per sampled token, if the caller wants them."""
    cumulative_logprob: float = 0.0
    prompt_logprobs: list[TokenLogprobs | None] = dataclasses.field(default_factory=list)
    """One entry per prompt token so far, None for the first, if the caller wants them."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    wants_only_greedy: bool = False
    """Its parameters ask for the most likely tokens and nothing else, but for min_tokens."""
    _stop_ids: frozenset[int] = frozenset()
    _num_searched: int = 0
    """Characters of the text in which no stop string ends."""
    _num_shown_tokens: int = 0
    _num_shown_characters: int = 0
    _end_is_shown: bool = False

    def __post_init__(self) -> None:
        params = self.params
        # None of it changes, and steps ask it of every row.
        plain = params.greedy and params.logprobs is None
        self.wants_only_greedy = plain and not params.shapes_logits
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self.token_ids = list(self.prompt_token_ids)
        self.prompt_logprobs = [None]

    @property
    def place(self) -> tuple[int, int]:
        """Sorts sequences: by priority, and in order of arrival among equals."""
        return self.priority, self.arrival

    @property
    def num_known(self) -> int:
        """Tokens that exist, in flight ones included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_to_compute(self) -> int:
        """Tokens not yet in the cache: 1 while decoding, more while its prompt is read."""
        return len(self.token_ids) + self.num_in_flight - self.num_computed

    @property
    def num_generated(self) -> int:
        """Sampled tokens, in flight ones included."""
        return self.num_known - len(self.prompt_token_ids)

    @property
    def decodes(self) -> bool:
        """Its next step, if it runs, is one token."""
        known = len(self.token_ids) + self.num_in_flight
        if known - self.num_computed > 1 or known >= self.max_len:
            return False
        if self.constraint is None or self.num_in_flight:
            return True
        # What it allows may have come too late for the step it was planned for, and not be there.
        return not self.constraint.is_pending

    @property
    def held_back_ids(self) -> tuple[int, ...]:
        """Ids that must not be sampled before min_tokens have been."""
        return tuple(sorted(self.eos_token_ids | set(self.params.stop_token_ids or ())))

    @property
    def misses_prompt_logprobs(self) -> bool:
        """The prompt's log-probabilities are wanted of it, and not all are there."""
        wanted = self.params.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.prompt_logprobs) < len(self.prompt_token_ids)

    def scores_prompt(self, start: int) -> bool:
        """Whether its tokens from ``start`` on, once computed, tell log-probabilities of the prompt
        that it misses. That of a token takes the hidden state of the one before it."""
        return self.misses_prompt_logprobs and start + 1 < len(self.prompt_token_ids)

    def add_prompt_logprobs(self, position: int, entries: list[TokenLogprobs]) -> None:
        """Takes those of prompt tokens from ``position`` on; some may be there already, computed
        before it was preempted."""
        self.prompt_logprobs = [*self.prompt_logprobs[:position], *entries]

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Takes one sampled token, which is no longer in flight, and decides whether to end."""
        self.token_ids.append(token_id)
        self.num_in_flight -= 1
        if logprobs is not None:
            self.logprobs.append(logprobs)
            self.cumulative_logprob += logprobs[token_id].logprob
        by_id = token_id in self._stop_ids
        if token_id in self.eos_token_ids or by_id:
            self._finish("stop", token_id if by_id else None)
            if self.params.include_stop_str_in_output:
                self._push(token_id)
        else:
            self._push(token_id)
            self._check_stop_strings()
        if self.finish_reason is None and len(self.token_ids) >= self.max_len:
            self._finish("length", None)
        if self.finish_reason is not None and not isinstance(self.stop_reason, str):
            self._flush()

    def has_news(self, num_tokens: int = 1) -> bool:
        """There are so many tokens, or the first, or an end, that no :meth:`completion` has
        shown."""
        if self.finish_reason is not None and not self._end_is_shown:
            return True
        shown = self._num_shown_tokens
        least = num_tokens if shown else 1
        return len(self.token_ids) - len(self.prompt_token_ids) - shown >= least

    def completion(self, *, only_news: bool = False) -> CompletionOutput:
        """What there is of it now, or what was added since this was last called."""
        text, num_prompt = self._settled_text(), len(self.prompt_token_ids)
        shown, shown_characters = 0, 0
        if only_news:
            # No copy of what was shown: this is done for every token of a stream.
            shown, shown_characters = self._num_shown_tokens, self._num_shown_characters
        self._num_shown_tokens = len(self.token_ids) - num_prompt
        self._num_shown_characters = len(text)
        self._end_is_shown = self.finish_reason is not None
        return CompletionOutput(
            index=self.index,
            text=text[shown_characters:],
            token_ids=self.token_ids[num_prompt + shown :],
            cumulative_logprob=None if self.params.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.params.logprobs is None else self.logprobs[shown:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            lora_request=self.lora_request,
        )

    def _finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason

    def _push(self, token_id: int) -> None:
        if self.detokenizer is not None:
            self.text += self.detokenizer.push([token_id])

    def _flush(self) -> None:
        """The unfinished tail becomes text; it may be what completes a stop string."""
        if self.detokenizer is not None:
            tail = self.detokenizer.flush()
            if tail:
                self.text += tail
                self._check_stop_strings()

    def _check_stop_strings(self) -> None:
        stops = self.params.stop
        if not stops:
            return
        searched, self._num_searched = self._num_searched, len(self.text)
        if len(self.token_ids) - len(self.prompt_token_ids) < self.params.min_tokens:
            return
        # What earlier searches did not find ends in text that is new since.
        found = [(self.text.find(stop, max(0, searched - len(stop) + 1)), stop) for stop in stops]
        found = [(at, stop) for at, stop in found if at >= 0]
        if found:
            at, stop = min(found)
            end = at + len(stop) if self.params.include_stop_str_in_output else at
            self.text = self.text[:end]
            self._finish("stop", stop)

    def _settled_text(self) -> str:
        """The text without an end that a stop string may begin with, and take away later."""
        stops = self.params.stop or ()
        ends = self.finish_reason is not None or self.params.include_stop_str_in_output
        if ends or not stops:
            return self.text
        return self.text[: len(self.text) - max(_begun(stop, self.text) for stop in stops)]


def _begun(stop: str, text: str) -> int:
    """The most characters that a text ends with and a longer stop string begins with."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0:
        if stop.startswith(text[at:]):
            return len(text) - at
        at = text.find(stop[0], at + 1)
    return 0
