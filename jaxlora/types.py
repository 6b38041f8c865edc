"""What a caller hands in: prompts, sampling parameters, adapter requests.

Names, defaults and ranges are vLLM's, so that scripts move over by changing an import.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from jaxlora import checks
from jaxlora.checks import convert, require
from jaxlora.structured_outputs import StructuredOutputsParams

GREEDY_BELOW = 1e-5
MAX_STOP_IDS = 32
"""Most ids that min_tokens can hold back for one request (end-of-sequence ids included)."""
MAX_COMPLETIONS = 1 << 14
"""Most completions of one prompt: all of them are queued at once."""
MAX_LOGPROBS = 20
"""Most alternatives to a token whose log-probabilities are told, unless an engine's max_logprobs
says otherwise."""
MAX_BEAM_WIDTH = MAX_LOGPROBS // 2
"""Most beams of a search, whose steps ask for twice as many alternatives."""
MAX_BAD_WORDS = 64
"""Most token sequences that bad_words may come to for one request."""
MAX_BAD_WORD_TOKENS = 16
"""Most tokens in each of them."""
MAX_BAD_WORD_CHARACTERS = 4096
"""Most characters in each of bad_words, before it is known how many tokens they are."""
MAX_STOPS = 256
"""Most stop strings of one request."""
MAX_STOP_CHARACTERS = 4096
"""Most characters in each of them."""
MAX_SALT_CHARACTERS = 1024
"""Most characters in a cache salt, as in vLLM."""
_FLAGS = """include_stop_str_in_output ignore_eos detokenize skip_special_tokens
    spaces_between_special_tokens""".split()
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_LEAST, _MOST = 1e-30, 1e30
"""Factors and summands of scores that are told from 0 and from infinity as 32-bit floats."""


class TextPrompt(TypedDict):
    """A prompt as text. Prompts share what was computed of their beginning with those of the same
    ``cache_salt`` only, so that nobody who does not know it can tell what others asked."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt as token ids, and as the text they came from if the output is to show it."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


Prompt = str | list[int] | TextPrompt | TokensPrompt


class RequestOutputKind(enum.Enum):
    """What each output of a request holds: all so far, what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclasses.dataclass(kw_only=True, slots=True, unsafe_hash=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends.

    May be changed as in vLLM's scripts; a request is given what they are when it is made.

    ``temperature`` below 1e-5 is greedy. ``top_k`` 0 or -1, ``top_p`` 1 and ``min_p`` 0 are off.
    With a ``seed`` the same request gives the same tokens whatever else runs, as far as this is
    rounded alike (docs/sampling.md); completion ``i`` of ``n`` is that of seed + i; -1 is none.
    ``max_tokens=None`` means up to the model's length.

    ``repetition_penalty`` divides positive scores of tokens in prompt or completion and multiplies
    negative ones (arXiv:1909.05858); ``frequency_penalty`` is taken off for each time a token is in
    the completion, ``presence_penalty`` once. ``bad_words`` never come to be in the completion,
    neither at the beginning of a word nor within one. ``logprobs`` and ``prompt_logprobs`` tell the
    log-probability of each token and of so many of the likeliest in its place, as the model gives
    them before any of the other parameters. ``structured_outputs`` constrains the text; its end is
    that of the completion, whatever ``min_tokens`` and ``ignore_eos`` are.

    ``spaces_between_special_tokens=False`` matters only if special tokens are not skipped. Raises
    ValueError naming field, value and range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        convert(self, checks.integer, "n", "top_k", "min_tokens")
        optional = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
        convert(self, checks.integer, *optional, optional=True)
        convert(self, checks.number, "temperature", "top_p", "min_p", *_PENALTIES)
        convert(self, checks.boolean, *_FLAGS)
        convert(self, checks.strings, "stop", "bad_words", optional=True)
        convert(self, checks.integers, "stop_token_ids", "allowed_token_ids", optional=True)
        convert(self, checks.numbers_by_id, "logit_bias", optional=True)
        for name in ("stop", "bad_words", "stop_token_ids"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, ())
        self._check_choice()
        self._check_extent()

    def _check_choice(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(name, value, -2 <= value <= 2, "in [-2, 2]")
        penalty = self.repetition_penalty
        in_range = _LEAST <= penalty <= _MOST
        require("repetition_penalty", penalty, in_range, f"in [{_LEAST}, {_MOST}]")
        require("temperature", self.temperature, 0 <= self.temperature <= 2, "in [0, 2]")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        require("top_k", self.top_k, self.top_k >= -1, "-1 or 0 (off), or at least 1")
        require("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        if self.seed == -1:
            self.seed = None
        if self.seed is not None:
            in_range = -(2**63) <= self.seed < 2**64
            require("seed", self.seed, in_range, "a 64-bit integer")
        for token, value in (self.logit_bias or {}).items():
            # The first that is wrong, of what may be many.
            in_range = abs(value) <= _MOST
            require("logit_bias", {token: value}, in_range, f"of values in [{-_MOST}, {_MOST}]")
        require(
            "allowed_token_ids", self.allowed_token_ids, self.allowed_token_ids != (), "not empty"
        )
        require("bad_words", self.bad_words, all(self.bad_words or ()), "without an empty string")
        constraint = self.structured_outputs
        kind = self.output_kind
        require("output_kind", kind, isinstance(kind, RequestOutputKind), "a RequestOutputKind")
        is_one = constraint is None or isinstance(constraint, StructuredOutputsParams)
        require("structured_outputs", constraint, is_one, "a StructuredOutputsParams")

    def _check_extent(self) -> None:
        require("n", self.n, 1 <= self.n <= MAX_COMPLETIONS, f"in [1, {MAX_COMPLETIONS}]")
        require("n", self.n, self.n == 1 or not self.greedy, "1 when sampling is greedy")
        if self.max_tokens is not None:
            require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
            within = 0 <= self.min_tokens <= self.max_tokens
            require("min_tokens", self.min_tokens, within, f"in [0, {self.max_tokens}]")
        require("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0")
        stop = list(self.stop or ())
        require("stop", stop, all(stop), "without an empty string")
        require("stop", stop, self.detokenize or not stop, "empty when detokenize is off")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(name, value, value is None or value >= -1, "-1 (all) or at least 0")

    @property
    def greedy(self) -> bool:
        """The most likely token, always."""
        return self.temperature < GREEDY_BELOW

    @property
    def shapes_logits(self) -> bool:
        """Scores depend on more than the model, the temperature and what ends a completion."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        lists = (self.logit_bias, self.allowed_token_ids, self.bad_words)
        return any(penalties) or any(lists)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How :meth:`LLM.beam_search` goes about it.

    A sequence's score is its log-probability over its length, prompt included, to the power of
    ``length_penalty``. Raises ValueError naming field, value and range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        convert(self, checks.integer, "beam_width", "max_tokens")
        convert(self, checks.number, "temperature", "length_penalty")
        convert(self, checks.boolean, "ignore_eos")
        widest = MAX_BEAM_WIDTH
        require("beam_width", self.beam_width, 1 <= self.beam_width <= widest, f"in [1, {widest}]")
        require("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        require("temperature", self.temperature, 0 <= self.temperature <= 2, "in [0, 2]")
        # Of the longest text, to that power, there is still a float.
        penalty = self.length_penalty
        require("length_penalty", penalty, -50 <= penalty <= 50, "in [-50, 50]")


@dataclasses.dataclass(frozen=True)
class LoRATensors:
    """An adapter's weights in memory, under PEFT's names, and its configuration. Equal only to
    itself."""

    tensors: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)
    config: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)
    number: int = dataclasses.field(default_factory=itertools.count(1).__next__)

    def __post_init__(self) -> None:
        tensors, config = self.tensors, self.config
        require("tensors", tensors, isinstance(tensors, Mapping), "a mapping of names to arrays")
        for name in tensors:
            require("tensors", name, isinstance(name, str), "named by strings")
        is_mapping = isinstance(config, Mapping)
        require("config", config, is_mapping, "a mapping, as adapter_config.json holds")

    def emptied(self) -> LoRATensors:
        """What stands for it, and is equal to it, without the weights."""
        return dataclasses.replace(self, tensors={}, config={})


@dataclasses.dataclass(frozen=True)
class LoRARequest:
    """Asks for an adapter by name; ``lora_path`` is where its PEFT folder is.

    Positional as ``LoRARequest("sql", 1, path)``. ``lora_int_id`` may be left out: the name alone
    identifies the adapter. With ``load_inplace`` it is read again although its name is known: if
    its content is new, later requests get the new version, and earlier ones finish on the old.
    """

    lora_name: str
    lora_int_id: int | None = None
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    tensors: LoRATensors | None = None
    """Weights in memory, instead of a path; see :meth:`from_tensors`."""

    def __post_init__(self) -> None:
        require("lora_name", self.lora_name, isinstance(self.lora_name, str), "a string")
        if not self.lora_name:
            raise ValueError("lora_name must not be empty")
        convert(self, checks.integer, "lora_int_id", optional=True)
        if self.lora_int_id is not None and self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        convert(self, checks.boolean, "load_inplace")
        is_path = isinstance(self.lora_path, str | os.PathLike)
        require("lora_path", self.lora_path, is_path, "a path or a hub id")
        object.__setattr__(self, "lora_path", os.fspath(self.lora_path))
        require("lora_path", self.lora_path, isinstance(self.lora_path, str), "text, not bytes")
        base = self.base_model_name
        require("base_model_name", base, base is None or isinstance(base, str), "a string")
        given = self.tensors
        is_made = given is None or isinstance(given, LoRATensors)
        require("tensors", given, is_made, "left to LoRARequest.from_tensors")
        if self.tensors is not None and self.lora_path:
            raise ValueError(f"an adapter of tensors has no lora_path, got {self.lora_path!r}")

    @classmethod
    def from_tensors(
        cls,
        lora_name: str,
        tensors: Mapping[str, Any],
        config: Mapping[str, Any],
        *,
        lora_int_id: int | None = None,
        load_inplace: bool = False,
    ) -> LoRARequest:
        """An adapter of numpy or jax arrays under PEFT's names; ``config`` is what its
        adapter_config.json would hold.

        The arrays are copied when the adapter is added, and must not change until then.
        """
        weights = LoRATensors(tensors=tensors, config=config)
        return cls(lora_name, lora_int_id, load_inplace=load_inplace, tensors=weights)
