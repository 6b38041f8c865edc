"""The sample program on its own: its distributions against numpy, and what rows share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxlora.engine.batch import SampleInputs, mask_array
from jaxlora.engine.constraint import TokenMask
from jaxlora.engine.logprobs import logprobs_of
from jaxlora.engine.row_state import RowState, empty_state, row_state, write_row
from jaxlora.engine.sampling import sample
from jaxlora.engine.sequence import Sequence
from jaxlora.outputs import RequestMetrics
from jaxlora.types import MAX_LOGPROBS, MAX_STOP_IDS, SamplingParams

VOCAB = 40
ROWS = 2048
SPARE = 3
LOGITS = np.random.default_rng(0).normal(0, 2, VOCAB).astype(np.float32)
_run = jax.jit(sample, static_argnames="num_top")


def run(logits: Any, given: SampleInputs, state: RowState, masks: np.ndarray | None = None) -> Any:
    """The sample program; without masks as a step runs it in which nothing is constrained."""
    if masks is None:
        masks = mask_array({}, num_rows=logits.shape[0], vocab_size=logits.shape[1])
    return _run(logits, given, state, masks, num_top=min(MAX_LOGPROBS, logits.shape[1]))


def inputs(num_rows: int = ROWS, first_seed: int = 0, **params: Any) -> SampleInputs:
    """Rows that differ in seed and number of tokens only."""
    fields: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
    number = np.arange(num_rows)
    return SampleInputs(
        table_rows=np.full(num_rows, SPARE, np.int32),
        state_rows=np.full(num_rows, SPARE, np.int32),
        is_masked=np.zeros(num_rows, bool),
        tells_logprobs=np.zeros(num_rows, bool),
        temperature=np.full(num_rows, fields["temperature"], np.float32),
        top_k=np.full(num_rows, fields["top_k"], np.int32),
        top_p=np.full(num_rows, fields["top_p"], np.float32),
        min_p=np.full(num_rows, fields["min_p"], np.float32),
        seeds=np.stack([number % 7, first_seed + number], 1).astype(np.uint32),
        num_generated=(number % 13).astype(np.int32),
        held_back_ids=np.full((num_rows, MAX_STOP_IDS), VOCAB, np.int32),
    )


def tiled(num_rows: int = ROWS) -> np.ndarray:
    return np.tile(LOGITS, (num_rows, 1))


def probabilities(logits: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """By their definitions, one token at a time."""
    p = scipy.special.softmax(logits.astype(np.float64) / params.get("temperature", 1.0))
    p = np.where(p >= params.get("min_p", 0) * p.max(), p, 0)
    p /= p.sum()
    order = np.argsort(-p)
    keep = set(order[: params["top_k"]] if params.get("top_k", 0) > 0 else order)
    p = np.where([i in keep for i in range(len(p))], p, 0)
    p /= p.sum()
    kept, mass = [], 0.0
    for token in np.argsort(-p):
        if mass < params.get("top_p", 1.0) or params.get("top_p", 1.0) == 1:
            kept.append(token)
            mass += p[token]
    p = np.where(np.isin(np.arange(len(p)), kept), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_p": 0.01},
        {"min_p": 0.2},
        # Of 0.9 of what min_p leaves it keeps fewer than of 0.9 of all.
        {"min_p": 0.1, "top_p": 0.9},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_are_distributed_as_asked(params: dict[str, Any]) -> None:
    state = empty_state(SPARE, VOCAB)
    counts = np.zeros(VOCAB)
    for turn in range(8):
        tokens, _, _ = run(tiled(), inputs(first_seed=turn * ROWS, **params), state)
        counts += np.bincount(np.asarray(tokens), minlength=VOCAB)
    expected = probabilities(LOGITS, params) * counts.sum()
    assert (counts[expected == 0] == 0).all()
    # Chi-squared needs cells that are not nearly empty: the rarest are taken together.
    order = np.argsort(-expected)
    counts, expected = counts[order], expected[order]
    rare = expected < 10
    if rare.any() and expected[rare].sum() > 0:
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    used = expected > 0
    if used.sum() > 1:
        assert scipy.stats.chisquare(counts[used], expected[used]).pvalue > 1e-4


def test_draws_of_one_request_are_independent() -> None:
    """Consecutive tokens under one seed, and the same place under consecutive seeds."""
    state = empty_state(SPARE, 2)
    logits = np.zeros((ROWS, 2), np.float32)
    given = inputs()
    fair = np.full((ROWS, MAX_STOP_IDS), 2, np.int32)
    for changes in (
        {"num_generated": np.arange(ROWS, dtype=np.int32), "seeds": np.zeros((ROWS, 2), np.uint32)},
        {"num_generated": np.zeros(ROWS, np.int32)},
    ):
        tokens, _, _ = run(logits, dataclasses.replace(given, held_back_ids=fair, **changes), state)
        pairs = np.asarray(tokens).reshape(-1, 2) @ [2, 1]
        assert scipy.stats.chisquare(np.bincount(pairs, minlength=4)).pvalue > 1e-4


def mixed_rows() -> tuple[np.ndarray, SampleInputs, RowState]:
    """Eight rows of which no two ask for the same."""
    random = np.random.default_rng(1)
    logits = random.normal(0, 2, (8, VOCAB)).astype(np.float32)
    given = inputs(8)
    state = empty_state(SPARE, VOCAB)
    for row, options in enumerate(
        ({"presence_penalty": 2.0}, {"repetition_penalty": 1.5, "logit_bias": {3: 5.0}})
    ):
        sequence = Sequence(
            request_id="r",
            prompt_token_ids=[1, 2, 3],
            params=SamplingParams(**options),
            max_len=50,
            eos_token_ids=frozenset(),
            seed=0,
            metrics=RequestMetrics(arrival_time=0.0),
        )
        sequence.token_ids += [4, 4, 5]
        state = jax.jit(write_row)(state, jnp.int32(row), row_state(sequence, 6, VOCAB))
    state_rows = given.state_rows.copy()
    state_rows[[1, 6]] = 0, 1
    held_back = given.held_back_ids.copy()
    held_back[2, :3] = np.argsort(-logits[2])[:3]
    return (
        logits,
        dataclasses.replace(
            given,
            state_rows=state_rows,
            tells_logprobs=np.asarray([0, 0, 0, 1, 0, 0, 1, 0], bool),
            temperature=np.asarray([0, 0, 0, 0, 1, 1, 1, 1], np.float32),
            top_k=np.asarray([0, 0, 0, 0, 0, 4, 0, 0], np.int32),
            top_p=np.asarray([1, 1, 1, 1, 1, 1, 1, 0.5], np.float32),
            held_back_ids=held_back,
        ),
        state,
    )


def test_a_rows_token_is_its_own_affair() -> None:
    logits, given, state = mixed_rows()
    together, logprobs, _ = run(logits, given, state)
    for row in range(8):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], given)
        token, one, _ = run(logits[row : row + 1], alone, state)
        assert int(token[0]) == int(together[row])
        if given.tells_logprobs[row]:
            np.testing.assert_array_equal(one.top_tokens[0], logprobs.top_tokens[row])
    shuffled = np.random.default_rng(2).permutation(8)
    reordered = jax.tree.map(lambda leaf: leaf[shuffled], given)
    tokens, _, _ = run(logits[shuffled], reordered, state)
    np.testing.assert_array_equal(tokens, np.asarray(together)[shuffled])


def test_logprobs_are_of_the_scores_as_they_came() -> None:
    logits, given, state = mixed_rows()
    tokens, told, _ = run(logits, given, state)
    expected = scipy.special.log_softmax(logits, axis=-1)
    rows = np.arange(8)
    np.testing.assert_allclose(told.logprobs, expected[rows, tokens], atol=1e-5)
    ranks = (expected > expected[rows, tokens][:, None]).sum(-1) + 1
    np.testing.assert_array_equal(told.ranks, ranks)
    np.testing.assert_array_equal(told.top_tokens, np.argsort(-expected, axis=-1)[:, :20])
    nobody = dataclasses.replace(given, tells_logprobs=np.zeros(8, bool))
    assert not np.asarray(run(logits, nobody, state)[1].logprobs).any()


def test_equal_scores_share_the_best_rank() -> None:
    told = logprobs_of(jnp.zeros((1, VOCAB)), jnp.asarray([7], jnp.int32), num_top=20)
    assert told.ranks.tolist() == [1]
    assert told.top_tokens.tolist() == [list(range(20))]


def test_the_state_counts_what_was_chosen() -> None:
    logits, given, state = mixed_rows()
    tokens, _, after = run(logits, given, state)
    before, new = np.asarray(state.counts), np.asarray(after.counts)
    for row, at in ((0, 1), (1, 6)):
        assert new[row, int(tokens[at])] == before[row, int(tokens[at])] + 2
        assert (new[row] != before[row]).sum() == 1
        assert after.last_tokens[row].tolist() == [*[-1] * 11, 4, 4, 5, int(tokens[at])]
    assert (before[0][[1, 2, 3, 4, 5]] == [1, 1, 1, 4, 2]).all()
    np.testing.assert_array_equal(new[2], before[2])


def test_masked_rows_choose_among_what_they_may() -> None:
    logits, given, state = mixed_rows()
    random = np.random.default_rng(3)
    allowed = {row: random.choice(VOCAB, 3, replace=False) for row in (0, 1, 3, 4, 5, 7)}
    masks = {}
    for row, tokens in allowed.items():
        flags = np.zeros(64, np.uint8)
        flags[tokens] = 1
        masks[row] = TokenMask(np.packbits(flags, bitorder="little").view(np.uint32), False)
    is_masked = np.asarray([row in masks for row in range(8)])
    given = dataclasses.replace(given, is_masked=is_masked)
    array = mask_array(masks, num_rows=8, vocab_size=VOCAB)
    tokens, told, _ = run(logits, given, state, array)
    for row, those in allowed.items():
        assert int(tokens[row]) in those
    for row in (0, 3):
        assert int(tokens[row]) == max(allowed[row], key=logits[row].__getitem__)
    free, _, _ = run(logits, dataclasses.replace(given, is_masked=np.zeros(8, bool)), state)
    np.testing.assert_array_equal(np.asarray(tokens)[[2, 6]], np.asarray(free)[[2, 6]])
    expected = scipy.special.log_softmax(logits, axis=-1)
    np.testing.assert_allclose(told.logprobs, expected[np.arange(8), tokens], atol=1e-5)


def test_masked_tokens_are_distributed_as_asked() -> None:
    """As if the vocabulary were no larger than the mask."""
    state = empty_state(SPARE, VOCAB)
    few = np.arange(0, VOCAB, 3)
    flags = np.zeros(64, np.uint8)
    flags[few] = 1
    mask = TokenMask(np.packbits(flags, bitorder="little").view(np.uint32), False)
    masks = mask_array(dict.fromkeys(range(ROWS), mask), num_rows=ROWS, vocab_size=VOCAB)
    params = {"temperature": 1.3, "top_k": 8, "top_p": 0.9}
    given = dataclasses.replace(inputs(**params), is_masked=np.ones(ROWS, bool))
    tokens, _, _ = run(tiled(), given, state, masks)
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert counts[few].sum() == ROWS
    expected = probabilities(LOGITS[few], params) * ROWS
    used = expected > 5
    assert (
        scipy.stats.chisquare(
            np.append(counts[few][used], ROWS - counts[few][used].sum() + 1),
            np.append(expected[used], ROWS - expected[used].sum() + 1),
        ).pvalue
        > 1e-4
    )
