"""Choosing the next tokens, on the device.

The greedy choice ends every forward pass; one program has everything else, and skips what no row
of the step asks for. Random choice is by Gumbel noise drawn from a key made of the request's seed
and the count of its tokens, so it depends on nothing else in the batch.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jaxlora.engine.batch import SampleInputs
from jaxlora.engine.logprobs import LogprobArrays, logprobs_of, no_logprobs
from jaxlora.engine.row_state import RowState, record, shape_scores
from jaxlora.parallel import TENSOR, joined
from jaxlora.types import GREEDY_BELOW

OVERFLOWED: Final = -1
"""In the place of the token of a row whose scores are no numbers."""


def greedy(logits: Float[Array, "R V"]) -> Int32[Array, " R"]:
    """The most likely token of each row, the lowest id among equals."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def greedy_of_parts(logits: Float[Array, "R part"]) -> Int32[Array, " R"]:
    """:func:`greedy` where each device has some columns of the scores, and OVERFLOWED for a row
    that has any NaN."""
    best = greedy(logits)[:, None]
    # NaN counts as more than any number.
    scores = jnp.take_along_axis(logits, best, axis=1)
    if lax.axis_size(TENSOR) > 1:
        ids = joined(best + lax.axis_index(TENSOR) * logits.shape[1], axis=1)
        scores = joined(scores, axis=1)
        best = jnp.take_along_axis(ids, greedy(scores)[:, None], axis=1)
    return jnp.where(jnp.isnan(scores).any(axis=1), OVERFLOWED, best[:, 0])


def sample(
    logits: Float[Array, "R V"],
    inputs: SampleInputs,
    state: RowState,
    masks: UInt32[Array, "R words"],
    *,
    num_top: int,
) -> tuple[Int32[Array, " R"], LogprobArrays, RowState]:
    """One token a row, their log-probabilities if any row wants them, and the state with them.

    Scores are shaped by the row's state, ids held back by min_tokens are ruled out, and where a row
    is masked those without a bit in ``masks``; of the rest one is chosen, greedily or at random.
    Log-probabilities are those of the scores as they came, ``num_top`` in each place.
    """
    spare = state.counts.shape[0] - 1
    rows = jnp.arange(logits.shape[0])[:, None]
    shaped = lax.cond(
        jnp.any(inputs.state_rows < spare),
        lambda x: shape_scores(x, state, inputs.state_rows),
        lambda x: x,
        logits,
    )
    shaped = shaped.at[rows, inputs.held_back_ids].set(-jnp.inf, mode="drop")
    shaped = lax.cond(jnp.any(inputs.is_masked), lambda x: _masked(x, masks), lambda x: x, shaped)
    tokens = lax.cond(
        jnp.any(inputs.temperature >= GREEDY_BELOW),
        lambda x: choose(x, inputs),
        greedy,
        shaped,
    )
    logprobs = lax.cond(
        jnp.any(inputs.tells_logprobs),
        partial(logprobs_of, num_top=num_top),
        partial(no_logprobs, num_top=num_top),
        logits,
        tokens,
    )
    return tokens, logprobs, record(state, inputs.state_rows, tokens)


def _masked(logits: Float[Array, "R V"], masks: UInt32[Array, "R words"]) -> Float[Array, "R V"]:
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    allowed = bits.reshape(masks.shape[0], -1)[:, : logits.shape[1]] == 1
    return jnp.where(allowed, logits, -jnp.inf)


def choose(logits: Float[Array, "R V"], inputs: SampleInputs) -> Int32[Array, " R"]:
    """One token a row, at random from what :func:`candidates` leaves; greedy rows as in
    :func:`greedy`."""
    noise = jax.vmap(_noise, in_axes=(0, 0, None))(
        inputs.seeds, inputs.num_generated, logits.shape[1]
    )
    chosen = jnp.argmax(candidates(logits, inputs) + noise, axis=-1).astype(jnp.int32)
    return jnp.where(inputs.temperature < GREEDY_BELOW, greedy(logits), chosen)


def candidates(logits: Float[Array, "R V"], inputs: SampleInputs) -> Float[Array, "R V"]:
    """Scores over temperature, -inf where min-p, top-k or top-p, in this order (vLLM's), rule a
    token out.

    Tokens of equal score stay or go together.
    """
    is_greedy = inputs.temperature < GREEDY_BELOW
    scaled = logits / jnp.where(is_greedy, 1.0, inputs.temperature)[:, None]
    floor = jnp.max(scaled, axis=-1) + jnp.log(inputs.min_p)
    likely = jnp.where(scaled >= floor[:, None], scaled, -jnp.inf)
    likely = lax.cond(
        jnp.any(inputs.top_k > 0), lambda x: _top_k(x, inputs.top_k), lambda x: x, likely
    )
    return lax.cond(
        jnp.any(inputs.top_p < 1), lambda x: _top_p(x, inputs.top_p), lambda x: x, likely
    )


def _noise(seed: UInt32[Array, " 2"], count: Int32[Array, ""], vocab: int) -> Float[Array, " V"]:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), count)
    return jax.random.gumbel(key, (vocab,), jnp.float32)


def _top_k(logits: Float[Array, "R V"], top_k: Int32[Array, " R"]) -> Float[Array, "R V"]:
    """Keeps the k largest of each row (and what equals the k-th); k = 0 keeps all."""
    order = _sortable(logits)

    def enough(least: UInt32[Array, " R"]) -> Bool[Array, " R"]:
        return jnp.sum(order >= least[:, None], axis=-1) >= top_k

    kept = order >= _largest(enough, logits.shape[0])[:, None]
    return jnp.where(kept | (top_k == 0)[:, None], logits, -jnp.inf)


def _top_p(logits: Float[Array, "R V"], top_p: Float[Array, " R"]) -> Float[Array, "R V"]:
    """Keeps the fewest most likely tokens of each row whose probabilities reach p."""
    order = _sortable(logits)
    probability = jax.nn.softmax(logits, axis=-1)

    def enough(least: UInt32[Array, " R"]) -> Bool[Array, " R"]:
        mass = jnp.sum(jnp.where(order >= least[:, None], probability, 0.0), axis=-1)
        return mass >= top_p

    kept = order >= _largest(enough, logits.shape[0])[:, None]
    return jnp.where(kept | (top_p >= 1)[:, None], logits, -jnp.inf)


def _sortable(logits: Float[Array, "R V"]) -> UInt32[Array, "R V"]:
    """Integers in the order of the floats: flip all bits of negatives, the sign of the rest."""
    # Both zeros are equal.
    logits = jnp.where(logits == 0, 0.0, logits.astype(jnp.float32))
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(enough, num_rows: int) -> UInt32[Array, " R"]:  # type: ignore[no-untyped-def]
    """Per row, the largest threshold for which ``enough`` still holds, by its 32 bits.

    Thirty-two passes over the logits cost a fraction of sorting a vocabulary.
    """

    def try_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        candidate = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(candidate), candidate, least)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(num_rows, jnp.uint32))
