"""What shapes a row's scores, kept on the device: token counts, biases and bad words.

Each running sequence that asks for any of it owns one row, which is written whole when it gets the
row, from the tokens the host knows by then, and kept up by the sample program from then on: the
host may be behind. Rows of other sequences hold whatever was there before; they are not looked at.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence as Seq

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from jaxlora.engine.sequence import Sequence
from jaxlora.types import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams
from kernels_pallas.leaf import leaf

_NO_TOKEN = -1
"""In the completion's last tokens: there are not so many yet."""
_ANY_TOKEN = -2
"""In a bad word: it is shorter, whatever stands here will do."""


@typing.no_type_check  # leaves are numpy on the host, tracers in a program, shapes in between
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowState:
    """Arrays over rows, the last of which is spare and has no effect; without ``rows``, one row."""

    counts: Int32[Array, "rows V"]
    """Twice the times a token is in the completion, plus one if it is in the prompt."""
    bias: Float32[Array, "rows V"]
    """Added to the scores; -inf for what is not allowed."""
    penalties: Float32[Array, "rows 3"]
    """Repetition, frequency, presence."""
    bad_words: Int32[Array, "rows words tokens"]
    """Token sequences, each at the end of its place; the last token of none is beyond V."""
    last_tokens: Int32[Array, "rows tokens-1"]
    """The end of the completion."""


def empty_state(num_rows: int, vocab_size: int) -> RowState:
    """The state of ``num_rows`` rows and the spare one: without effect."""
    one = _row((), (), SamplingParams(), (), vocab_size)
    return jax.tree.map(lambda leaf: jnp.tile(leaf, (num_rows + 1, *[1] * leaf.ndim)), one)


def row_state(sequence: Sequence, num_tokens: int, vocab_size: int) -> RowState:
    """A sequence's row once it has ``num_tokens`` tokens, all known to the host."""
    prompt = sequence.prompt_token_ids
    completion = sequence.token_ids[len(prompt) : num_tokens]
    return _row(prompt, completion, sequence.params, sequence.bad_words, vocab_size)


def state_bytes(num_rows: int, vocab_size: int) -> int:
    """Bytes of :func:`empty_state`, near enough."""
    return (num_rows + 1) * (8 * vocab_size + 4 * MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS)


def write_row(state: RowState, row: Int32[Array, ""], values: RowState) -> RowState:
    """The state with one row replaced."""
    return jax.tree.map(lambda leaf, value: leaf.at[row].set(value), state, values)


def shape_scores(
    logits: Float[Array, "R V"], state: RowState, rows: Int32[Array, " R"]
) -> Float[Array, "R V"]:
    """Biases, bad words and penalties applied, in this order (vLLM's)."""
    logits = logits + state.bias[rows]
    logits = _ban(logits, state.bad_words[rows], state.last_tokens[rows])
    counts, penalties = state.counts[rows], state.penalties[rows]
    repetition, frequency, presence = (penalties[:, i, None] for i in range(3))
    weaker = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, weaker, logits)
    in_completion = counts >> 1
    return logits - frequency * in_completion - presence * (in_completion > 0)


def record(state: RowState, rows: Int32[Array, " R"], tokens: Int32[Array, " R"]) -> RowState:
    """The state once these tokens were chosen; the spare row may hold anything."""
    last = jnp.concatenate([state.last_tokens[rows][:, 1:], tokens[:, None]], axis=1)
    return dataclasses.replace(
        state,
        counts=state.counts.at[rows, tokens].add(2),
        last_tokens=state.last_tokens.at[rows].set(last),
    )


def _ban(
    logits: Float[Array, "R V"],
    bad_words: Int32[Array, "R words tokens"],
    last_tokens: Int32[Array, "R tokens-1"],
) -> Float[Array, "R V"]:
    begun = (bad_words[:, :, :-1] == last_tokens[:, None]) | (bad_words[:, :, :-1] == _ANY_TOKEN)
    end = jnp.where(jnp.all(begun, axis=-1), bad_words[:, :, -1], logits.shape[1])
    each_row = jnp.arange(logits.shape[0])[:, None]
    return logits.at[each_row, end].set(-jnp.inf, mode="drop")


def _row(
    prompt: Seq[int],
    completion: Seq[int],
    params: SamplingParams,
    bad_words: Seq[Seq[int]],
    vocab_size: int,
) -> RowState:
    counts = 2 * np.bincount(np.asarray(completion, np.int32), minlength=vocab_size)
    counts[np.asarray(prompt, np.int32)] += 1
    bias = np.zeros(vocab_size, np.float32)
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[np.asarray(params.allowed_token_ids)] = 0.0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += value
    words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), _ANY_TOKEN, np.int32)
    words[:, -1] = vocab_size
    for word, ids in zip(words, bad_words, strict=False):
        word[len(word) - len(ids) :] = ids
    last_tokens = np.full(MAX_BAD_WORD_TOKENS - 1, _NO_TOKEN, np.int32)
    end = completion[-len(last_tokens) :]
    last_tokens[len(last_tokens) - len(end) :] = end
    penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
    return RowState(
        counts=leaf(counts, np.int32),
        bias=leaf(bias),
        penalties=leaf(penalties, np.float32),
        bad_words=leaf(words),
        last_tokens=leaf(last_tokens),
    )
