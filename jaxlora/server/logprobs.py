"""Log-probabilities in OpenAI's two shapes, and prompt log-probabilities in vLLM's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jaxlora.outputs import Logprob, TokenLogprobs
from jaxlora.tokenizer import REPLACEMENT, Tokenizer

_LOWEST = -9999.0
"""Instead of what JSON has no number for: -inf, and NaN, which is what an overflow comes to."""


class LogprobsWriter:
    """Writes the log-probabilities of tokens as replies hold them.

    With ``as_ids`` a token is shown as "token_id:7" and not as its text, which several may share.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def completion(
        self,
        token_ids: Sequence[int],
        places: Sequence[TokenLogprobs | None],
        num_top: int,
        offsets: Sequence[int],
    ) -> dict[str, Any]:
        """For /v1/completions: each token, where its text begins, and the ``num_top`` likeliest in
        its place. A place without log-probabilities, as a prompt's first, has none."""
        tokens = [
            self._token(token_id, place[token_id] if place else None)
            for token_id, place in zip(token_ids, places, strict=True)
        ]
        return {
            "text_offset": list(offsets),
            "token_logprobs": [
                _number(place[token_id]) if place else None
                for token_id, place in zip(token_ids, places, strict=True)
            ],
            "tokens": tokens,
            "top_logprobs": [
                {
                    self._token(each, value): _number(value)
                    for each, value in _shown(place, token_id, num_top)
                }
                if place
                else None
                for token_id, place in zip(token_ids, places, strict=True)
            ],
        }

    def chat(
        self, token_ids: Sequence[int], places: Sequence[TokenLogprobs], num_top: int
    ) -> dict[str, Any]:
        """For /v1/chat/completions: each token, and the ``num_top`` likeliest in its place."""
        content = []
        for token_id, place in zip(token_ids, places, strict=True):
            entry = self._entry(token_id, place[token_id])
            top = _likeliest(place, num_top)
            entry["top_logprobs"] = [self._entry(each, value) for each, value in top]
            content.append(entry)
        return {"content": content}

    def _entry(self, token_id: int, value: Logprob) -> dict[str, Any]:
        token = self._token(token_id, value)
        # A part of a character has no text: who joins the bytes gets the character.
        part = self._tokenizer.token_bytes(token_id) if REPLACEMENT in token else None
        bytes_ = list(token.encode() if part is None else part)
        return {"token": token, "logprob": _number(value), "bytes": bytes_}

    def offsets(
        self, token_ids: Sequence[int], places: Sequence[TokenLogprobs | None], begin: int
    ) -> list[int]:
        """Where the text of each token begins, however it is shown, and where that of all ends, the
        first one's being at ``begin``."""
        lengths = (
            len(self._text(token_id, place[token_id] if place else None))
            for token_id, place in zip(token_ids, places, strict=True)
        )
        return list(itertools.accumulate(lengths, initial=begin))

    def _token(self, token_id: int, value: Logprob | None) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._text(token_id, value)

    def _text(self, token_id: int, value: Logprob | None) -> str:
        if value is not None and value.decoded_token is not None:
            return value.decoded_token
        return self._tokenizer.text_of(token_id)


def _likeliest(place: TokenLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """So many; -1 is all."""
    ordered = sorted(place.items(), key=lambda item: -item[1].logprob)
    return ordered if count == -1 else ordered[:count]


def _shown(place: TokenLogprobs, token_id: int, num_top: int) -> list[tuple[int, Logprob]]:
    """The token and the likeliest; beam search tells of more than it was asked for."""
    if num_top == -1 or len(place) <= num_top + 1:
        return list(place.items())
    return list(({token_id: place[token_id]} | dict(_likeliest(place, num_top))).items())


def prompt_logprobs(places: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
    """vLLM's field of that name: id -> log-probability, rank and text, for each prompt token."""
    return [
        {
            str(token_id): {
                "logprob": _number(value),
                "rank": value.rank,
                "decoded_token": value.decoded_token,
            }
            for token_id, value in place.items()
        }
        if place
        else None
        for place in places
    ]


def _number(value: Logprob) -> float:
    # The lowest is first, because nothing is more than NaN.
    return max(_LOWEST, float(value.logprob))
