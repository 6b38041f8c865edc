"""Compiles what a text is constrained to, for one tokenizer, with llguidance."""

from __future__ import annotations

import functools
import json
import os
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag, grammar_from

from jaxlora.checks import some
from jaxlora.errors import RequestError
from jaxlora.structured_outputs import StructuredOutputsParams
from jaxlora.tokenizer import Tokenizer

_MAX_THREADS = 8
_MAX_KEPT = 128
"""Most compiled grammars that are kept for later requests."""
_MAX_CHARACTERS = 1 << 20
"""Most characters of one, which takes seconds and a gigabyte to compile or to refuse."""
_MAX_ROW = 1000
"""Alternatives beside each other in Lark's notation, of which llguidance takes 2000."""
_NO_TOKEN = "NoExtensionBias"
"""How llguidance says that nothing can come, and a text cannot end."""


class Grammar:
    """A compiled grammar. Any thread may take matchers from it."""

    def __init__(self, matcher: LLMatcher, params: StructuredOutputsParams) -> None:
        self._matcher, self._params = matcher, params
        self._lock = threading.Lock()

    def matcher(self) -> LLMatcher:
        """One at the beginning of a text, for the caller alone; this takes well under 1 ms."""
        with self._lock:
            return self._matcher.deep_copy()

    def reason_of(self, matcher: LLMatcher) -> str:
        """Why one of its matchers failed, without the state it was in."""
        reason: str = matcher.get_error().partition("\n<")[0].strip()
        if reason != _NO_TOKEN:
            return reason
        kind = self._params.kind
        value = reprlib.repr(getattr(self._params, kind))
        return f"{kind}={value}: the tokenizer has no token for what must come next"


class Grammars:
    """Compiles constraints and keeps the latest. Any thread may use it.

    ``tokenizer`` says what tokens read as and which end a text; without one, ``refusal`` says why.
    ``special`` is what its special tokens are called.
    ``executor`` runs what goes on beside the engine, ``limits`` are llguidance's on what a grammar
    may cost.
    """

    def __init__(
        self,
        tokenizer: LLTokenizer | None,
        *,
        refusal: str = "",
        special: frozenset[str] = frozenset(),
        executor: Executor | None = None,
        limits: LLParserLimits | None = None,
    ) -> None:
        # Its threads start when they are needed.
        self.executor = executor or ThreadPoolExecutor(
            min(_MAX_THREADS, os.cpu_count() or 1), "jaxlora-masks"
        )
        self._tokenizer, self._refusal, self._special = tokenizer, refusal, special
        self._limits = limits or LLParserLimits(verbose_errors=False)
        self._lock = threading.Lock()
        self._kept: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> Grammars:
        """For texts of a tokenizer that end with any of ``eos_token_ids``, of a model with
        ``vocab_size`` ids.

        This holds the interpreter lock for 0.2 to 1 s, so it is done at the start. A tokenizer that
        llguidance does not know refuses constraints, and nothing else.
        """
        if not eos_token_ids:
            return cls(
                None,
                refusal=f"neither it nor the model has an eos_token_id among the {vocab_size} ids "
                "of the vocabulary, which would end a text; hf_overrides can set one",
            )
        try:
            text = tokenizer.hf.backend_tokenizer.to_str()
            if len(tokenizer) > vocab_size:
                text = _without_added_tokens(text, vocab_size)
            llguidance = LLTokenizer(text, n_vocab=vocab_size, eos_token=sorted(eos_token_ids))
        except ValueError as error:
            return cls(None, refusal=str(error))
        # To llguidance all added tokens are special, whatever they are to the tokenizer.
        added = tokenizer.added_tokens.items()
        return cls(llguidance, special=frozenset(name for i, name in added if i < vocab_size))

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The grammar of a constraint, which takes milliseconds, or 0.1 s if it is large; most of
        it without the interpreter lock.

        Raises RequestError with llguidance's reason if it cannot be.
        """
        if self._tokenizer is None:
            raise RequestError(
                f"structured_outputs cannot be served with this tokenizer: {self._refusal}"
            )
        with self._lock:
            if params in self._kept:
                self._kept.move_to_end(params)
                return self._kept[params]
        try:
            text = _llguidance(params, self._special)
        except ValueError as error:
            raise RequestError(f"structured_outputs: {error}") from error
        if len(text) > _MAX_CHARACTERS:
            raise RequestError(
                f"structured_outputs come to {len(text)} characters, more than {_MAX_CHARACTERS}"
            )
        if _may_spell(params, self._special):
            text = _unforced(text)
        self._check_choice(params.choice or ())
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=self._limits)
        grammar = Grammar(matcher, params)
        if not matcher.is_error():
            # What is too costly, or has no text at all, may not be found out before it begins.
            matcher = grammar.matcher()
            matcher.compute_logit_bias()
        if matcher.is_error():
            raise RequestError(f"structured_outputs: {grammar.reason_of(matcher)}")
        with self._lock:
            self._kept[params] = grammar
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _check_choice(self, choice: Sequence[str]) -> None:
        """One that cannot be written would be begun, and end its request half-way."""
        tokenizer = self._tokenizer
        assert tokenizer is not None

        @functools.cache
        def is_written(text: str) -> bool:
            try:
                return bool(
                    tokenizer.decode_bytes(tokenizer.greedy_tokenize(text)) == text.encode()
                )
            except UnicodeEncodeError:
                return False  # Half a character.

        for each in choice:
            # Few texts have other characters than tokens of their own.
            missing = [letter for letter in dict.fromkeys(each) if not is_written(letter)]
            if missing and not is_written(each):
                raise RequestError(
                    f"structured_outputs: choice {reprlib.repr(each)} cannot be written: the "
                    f"tokenizer has no tokens for {some(list(map(repr, missing)))}"
                )


def _without_added_tokens(text: str, vocab_size: int) -> str:
    """A tokenizer.json without those that a model of ``vocab_size`` ids does not have."""
    fields = json.loads(text)
    # With them a text that must come would be written in them, and in no other way.
    fields["added_tokens"] = [each for each in fields["added_tokens"] if each["id"] < vocab_size]
    return json.dumps(fields)


def _llguidance(params: StructuredOutputsParams, special: frozenset[str]) -> str:
    """The constraint in llguidance's notation."""
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {_any_of(params.choice)}")
    if params.grammar is not None:
        return grammar_from("grammar", params.grammar)
    if params.structural_tag is not None:
        tags = _tags(json.loads(str(params.structural_tag)))
        # A special token is not its text: one of them cannot be taken for the other.
        is_special = any(tag.trigger in special for tag in tags)
        return StructTag.to_grammar(tags, assume_special=is_special)
    schema = '{"type": "object"}' if params.json_object else str(params.json)
    if params.disable_any_whitespace:
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    if params.whitespace_pattern is not None:
        pattern = params.whitespace_pattern
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": pattern})
    return LLMatcher.grammar_from_json_schema(schema)


def _may_spell(params: StructuredOutputsParams, special: frozenset[str]) -> bool:
    """Whether a constraint has what a special token is called, escaped or not."""
    given = getattr(params, params.kind)
    if params.kind == "json" and isinstance(given, str):
        given = json.dumps(json.loads(given), ensure_ascii=False)
    text = str(given).replace("\\", "")
    names = (name for each in special for name in (each, json.dumps(each)[1:-1]))
    return any(name.replace("\\", "") in text for name in names)


def _unforced(grammar: str) -> str:
    """A grammar without llguidance's choice of tokens where only one text can come: in that text
    it takes what special tokens are called for these tokens."""
    inner = json.loads(grammar)["grammars"][0] if grammar[0] == "{" else {"lark_grammar": grammar}
    outer = {"lark_grammar": '%llguidance {"no_forcing": true}\nstart: @inner'}
    return json.dumps({"grammars": [outer, {**inner, "name": "inner"}]})


def _any_of(texts: Sequence[str]) -> str:
    """A terminal of Lark's notation, in which an alternation is short, but may be of others."""
    quoted = list(map(json.dumps, texts))
    groups = (quoted[i : i + _MAX_ROW] for i in range(0, len(quoted), _MAX_ROW))
    return " | ".join(f"({' | '.join(group)})" for group in groups)


def _tags(fields: Mapping[str, Any]) -> list[StructTag]:
    return [
        StructTag(
            trigger=next(each for each in fields["triggers"] if tag["begin"].startswith(each)),
            begin=tag["begin"],
            grammar=tag["schema"],
            end=tag["end"],
        )
        for tag in fields["structures"]
    ]
