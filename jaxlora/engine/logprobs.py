"""Log-probabilities of tokens and of the likeliest ones in their place."""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jaxlora.outputs import Logprob, TokenLogprobs
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import SamplingParams


@typing.no_type_check  # leaves are numpy on the host, tracers in a program, shapes in between
class LogprobArrays(NamedTuple):
    """N places in a text; k of the likeliest tokens in each."""

    tokens: Int32[Array, " N"]
    logprobs: Float32[Array, " N"]
    ranks: Int32[Array, " N"]
    top_tokens: Int32[Array, "N k"]
    top_logprobs: Float32[Array, "N k"]


def logprobs_of(
    logits: Float[Array, "N V"], tokens: Int32[Array, " N"], *, num_top: int
) -> LogprobArrays:
    """What ``logits`` make of ``tokens``, and their ``num_top`` likeliest; equal scores share the
    best rank among them."""
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    own = jnp.take_along_axis(scores, tokens[:, None], axis=-1)
    ranks = 1 + jnp.sum(scores > own, axis=-1, dtype=jnp.int32)
    top, top_tokens = lax.top_k(scores, num_top)
    return LogprobArrays(tokens, own[:, 0], ranks, top_tokens.astype(jnp.int32), top)


def no_logprobs(
    logits: Float[Array, "N V"], tokens: Int32[Array, " N"], *, num_top: int
) -> LogprobArrays:
    """Zeros in the shapes of :func:`logprobs_of`."""
    shapes = jax.eval_shape(partial(logprobs_of, num_top=num_top), logits, tokens)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


class TokenTexts:
    """What each token adds to a text. Looking that up takes less time than decoding, and a prompt
    may ask for 20 texts a token."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def of(self, params: SamplingParams) -> Callable[[int], str | None]:
        """A token's text, or nothing where text is not wanted."""
        tokenizer, texts = self._tokenizer, self._texts
        if tokenizer is None or not params.detokenize:
            return lambda token: None

        def text_of(token: int) -> str:
            if token not in texts:
                texts[token] = tokenizer.text_of(token)
            return texts[token]

        return text_of


def token_logprobs(
    arrays: LogprobArrays, place: int, num_top: int, text_of: Callable[[int], str | None]
) -> TokenLogprobs:
    """One place's tokens as the caller is told them: its own first, then ``num_top`` likeliest, or
    all if that is -1."""
    token, logprob = int(arrays.tokens[place]), float(arrays.logprobs[place])
    told = {token: Logprob(logprob, int(arrays.ranks[place]), text_of(token))}
    count = None if num_top == -1 else num_top
    top = zip(
        arrays.top_tokens[place, :count].tolist(),
        arrays.top_logprobs[place, :count].tolist(),
        strict=True,
    )
    for rank, (other, value) in enumerate(top, 1):
        if other != token:
            told[other] = Logprob(value, rank, text_of(other))
    return told
