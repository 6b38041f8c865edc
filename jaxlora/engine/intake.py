"""What a caller asks for, as a request the engine can run, or a refusal that says why not."""

from __future__ import annotations

import dataclasses
import operator
import reprlib
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxlora import checks
from jaxlora.engine.constraint import Constraint
from jaxlora.engine.grammars import Grammar, Grammars
from jaxlora.engine.request import Request
from jaxlora.engine.sequence import Sequence
from jaxlora.errors import RequestError
from jaxlora.outputs import RequestMetrics
from jaxlora.tokenizer import Detokenizer, Tokenizer
from jaxlora.types import (
    MAX_BAD_WORD_CHARACTERS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGPROBS,
    MAX_SALT_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_IDS,
    MAX_STOPS,
    LoRARequest,
    Prompt,
    SamplingParams,
    TokensPrompt,
)

TokenSequences = tuple[tuple[int, ...], ...]


class Intake:
    """Tokenizes and checks. ``seed`` is where requests without one get theirs from."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        seed: int,
        grammars: Grammars | None = None,
        max_logprobs: int = MAX_LOGPROBS,
        stream_interval: int = 1,
    ) -> None:
        self.tokenizer = tokenizer
        self.grammars = grammars
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.max_logprobs = max_logprobs
        self._stream_interval = stream_interval
        self._random = np.random.default_rng(seed)

    def request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        lora_request: LoRARequest | None,
    ) -> Request:
        """The request with its sequences, which have no adapter yet.

        Raises RequestError if it can never run, naming the value and the limit, and ValueError for
        parameters that were changed to what is out of range.
        """
        checks.require("params", params, isinstance(params, SamplingParams), "a SamplingParams")
        # The caller may change them, and may have changed them to what they must not be.
        params = dataclasses.replace(params)
        text, token_ids = self.tokenize(prompt)
        cache_salt = cache_salt_of(prompt) or ""
        self._check(token_ids, params)
        bad_words = self._bad_words(params)
        self._check_choice(params, bad_words)
        grammar = self.grammar(params)
        seed = params.seed
        if seed is None:
            seed = int(self._random.integers(0, 2**63))
        new = params.max_tokens if params.max_tokens is not None else self.max_model_len
        metrics = RequestMetrics(arrival_time=time.monotonic())
        sequences = [
            Sequence(
                request_id=request_id,
                index=index,
                prompt_token_ids=token_ids,
                params=params,
                max_len=min(len(token_ids) + new, self.max_model_len),
                eos_token_ids=self._ends(params),
                seed=(seed + index) % 2**64,
                metrics=metrics,
                lora_request=lora_request,
                detokenizer=self._detokenizer(token_ids, params),
                bad_words=bad_words,
                cache_salt=cache_salt,
            )
            for index in range(params.n)
        ]
        if grammar is not None and self.grammars is not None:
            for sequence in sequences:
                sequence.constraint = Constraint(
                    grammar,
                    self.grammars.executor,
                    vocab_size=self.vocab_size,
                    params=params,
                    bad_words=bad_words,
                    held_back_ids=sequence.held_back_ids,
                )
        return Request(
            request_id=request_id,
            prompt=text,
            # Its outputs show it, and who is given them may change it.
            prompt_token_ids=list(token_ids),
            params=params,
            metrics=metrics,
            lora_request=lora_request,
            sequences=sequences,
            stream_interval=self._stream_interval,
        )

    def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, where it has one, and its ids."""
        given: Any = prompt
        if isinstance(given, dict):
            _check_keys(given)
            if given.get("prompt_token_ids") is not None:
                return given.get("prompt"), _token_ids(given["prompt_token_ids"])
            given = given["prompt"]
        if not isinstance(given, str):
            return None, _token_ids(given)
        if self.tokenizer is None:
            raise RequestError("the engine has no tokenizer: give prompt_token_ids")
        return given, self.tokenizer.encode(given)

    def grammar(self, params: SamplingParams) -> Grammar | None:
        """What the text must be like, compiled; any thread may ask. Raises RequestError."""
        if params.structured_outputs is None:
            return None
        if self.grammars is None:
            raise RequestError(
                "structured_outputs needs a tokenizer, and the engine was started with "
                "skip_tokenizer_init=True"
            )
        return self.grammars.compile(params.structured_outputs)

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        """Ids that end a completion, stop_token_ids aside. The end of a constrained text is not
        ignored: nothing else can come."""
        ignored = params.ignore_eos and params.structured_outputs is None
        return frozenset() if ignored else self.eos_token_ids

    def _detokenizer(self, token_ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None or not params.detokenize:
            return None
        return self.tokenizer.stream(
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            prompt_ids=token_ids,
        )

    def _check(self, token_ids: list[int], params: SamplingParams) -> None:
        if not token_ids:
            raise RequestError("the prompt is empty")
        if len(token_ids) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, which leaves no room for a completion "
                f"within max_model_len={self.max_model_len}"
            )
        stop_ids = params.stop_token_ids or ()
        given = {
            "prompt token": token_ids,
            "stop_token_ids": stop_ids,
            "logit_bias": params.logit_bias or (),
            "allowed_token_ids": params.allowed_token_ids or (),
        }
        for what, ids in given.items():
            bad = next((i for i in ids if not 0 <= i < self.vocab_size), None)
            if bad is not None:
                raise RequestError(
                    f"{what} {bad} is outside the vocabulary of {self.vocab_size} ids"
                )
        held_back = self._ends(params).union(stop_ids)
        if params.min_tokens and len(held_back) > MAX_STOP_IDS:
            raise RequestError(
                f"min_tokens can hold back {MAX_STOP_IDS} ids, end-of-sequence included; with "
                f"stop_token_ids there are {len(held_back)}"
            )
        self._check_stop(params)

    def _check_stop(self, params: SamplingParams) -> None:
        """Every token is searched for them, in the engine's thread."""
        stop = params.stop or ()
        if stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        longest = max(map(len, stop), default=0)
        if len(stop) > MAX_STOPS or longest > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop has {len(stop)} strings of up to {longest} characters; the limits are "
                f"{MAX_STOPS} and {MAX_STOP_CHARACTERS}"
            )

    def _check_choice(self, params: SamplingParams, bad_words: TokenSequences) -> None:
        most = self.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name) or 0
            if most != -1 and not 0 <= asked <= most:
                all_of_them = " (the whole vocabulary)" if asked == -1 else ""
                raise RequestError(
                    f"{name}={asked}{all_of_them} is more than max_logprobs={most}; start the "
                    "engine with a larger one, or with -1 for the whole vocabulary"
                )
        longest = max(map(len, bad_words), default=0)
        if len(bad_words) > MAX_BAD_WORDS or longest > MAX_BAD_WORD_TOKENS:
            raise RequestError(
                f"bad_words come to {len(bad_words)} token sequences of up to {longest} tokens; "
                f"the limits are {MAX_BAD_WORDS} and {MAX_BAD_WORD_TOKENS}"
            )
        if params.allowed_token_ids is not None:
            left = set(params.allowed_token_ids) - {word[-1] for word in bad_words}
            if params.min_tokens:
                left -= self._ends(params).union(params.stop_token_ids or ())
            if not left:
                raise RequestError(
                    "allowed_token_ids may leave nothing to choose: each is the last token of one "
                    "of bad_words, or held back by min_tokens"
                )

    def _bad_words(self, params: SamplingParams) -> TokenSequences:
        """Their tokens, at the beginning of a text, after a space, and where there is none."""
        if not params.bad_words:
            return ()
        if self.tokenizer is None:
            raise RequestError("bad_words need a tokenizer")
        longest = max(map(len, params.bad_words))
        # Not first tokenized: that would hold up the engine.
        if len(params.bad_words) > MAX_BAD_WORDS or longest > MAX_BAD_WORD_CHARACTERS:
            raise RequestError(
                f"bad_words has {len(params.bad_words)} words of up to {longest} characters; the "
                f"limits are {MAX_BAD_WORDS} and {MAX_BAD_WORD_CHARACTERS}"
            )
        encoded: list[list[int]] = []
        for given in params.bad_words:
            word = given.lstrip(" ") or given
            for text in (word, f" {word}"):
                encoded.append(self.tokenizer.encode(text, add_special_tokens=False))
            encoded.append(self.tokenizer.encode_within(word))
        # What has a token that the model does not is never written.
        known = dict.fromkeys(tuple(ids) for ids in encoded if ids and max(ids) < self.vocab_size)
        # Nor is what ends in another of them.
        return tuple(ids for ids in known if not any(ids[i:] in known for i in range(1, len(ids))))


def cache_salt_of(prompt: Prompt) -> str | None:
    """A prompt's salt, None if it has none. Raises RequestError for what cannot be one."""
    salt: Any = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_SALT_CHARACTERS):
        raise RequestError(
            f"cache_salt={reprlib.repr(salt)} must be text of 1 to {MAX_SALT_CHARACTERS} characters"
        )
    return salt


def salted(prompt: TokensPrompt, salt: str | None) -> TokensPrompt:
    """The prompt with the salt, if that is one."""
    if salt is not None:
        prompt["cache_salt"] = salt
    return prompt


def _check_keys(prompt: dict[str, Any]) -> None:
    """Refuses what would be passed over; a key with nothing under it asks for nothing."""
    if prompt.get("prompt") is None and prompt.get("prompt_token_ids") is None:
        raise RequestError(
            f"a prompt has keys {list(prompt)}, it needs 'prompt' or 'prompt_token_ids'"
        )
    for key in prompt.keys() - TokensPrompt.__annotations__.keys():
        value = prompt[key]
        if value is not None and not (isinstance(value, dict) and not value):
            raise RequestError(
                f"a prompt has {key!r}, which is not served: prompts are text or token ids, with "
                f"keys {', '.join(TokensPrompt.__annotations__)}; leave it out"
            )


def _token_ids(given: Iterable[Any]) -> list[int]:
    try:
        if isinstance(given, bytes | bytearray):
            raise TypeError("text in bytes must be decoded")
        return list(map(operator.index, given))
    except TypeError as error:
        raise RequestError(
            f"a prompt must be a text or a list of token ids, got {reprlib.repr(given)}: {error}"
        ) from error
