"""Which tokens sampling leaves to choose from, against numpy; and what a choice depends on."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.engine.batch import SampleInputs, mask_array
from jaxlora.engine.row_state import empty_state
from jaxlora.engine.sampling import candidates, choose, greedy, sample
from jaxlora.types import GREEDY_BELOW, MAX_STOP_IDS

VOCAB = 300
ROWS = 8
run_candidates = jax.jit(candidates)
run_choose = jax.jit(choose)
run_greedy = jax.jit(greedy)


class Filter(NamedTuple):
    """What one row asks for."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def inputs(filters: list[Filter], seeds: Any = None, counts: Any = 0) -> SampleInputs:
    rows = len(filters)
    temperature, top_k, top_p, min_p = zip(*filters, strict=True)
    pairs = np.stack([np.zeros(rows), np.arange(rows) if seeds is None else seeds], axis=1)
    return SampleInputs(
        table_rows=np.zeros(rows, np.int32),
        state_rows=np.zeros(rows, np.int32),
        is_masked=np.zeros(rows, bool),
        tells_logprobs=np.zeros(rows, bool),
        temperature=np.asarray(temperature, np.float32),
        top_k=np.asarray(top_k, np.int32),
        top_p=np.asarray(top_p, np.float32),
        min_p=np.asarray(min_p, np.float32),
        seeds=pairs.astype(np.uint32),
        num_generated=np.full(rows, counts, np.int32),
        held_back_ids=np.full((rows, MAX_STOP_IDS), VOCAB, np.int32),
    )


def left(logits: np.ndarray, wanted: Filter, slack: float = 0.0) -> np.ndarray:
    """The definitions in float64: bool ``[V]``. ``slack`` moves the thresholds of top-p and min-p,
    which float32 need not hit exactly, towards keeping more."""
    scores = (logits / np.float32(wanted.temperature)).astype(np.float64)
    likelihood = np.exp(scores - scores.max())
    keep = np.isfinite(scores) & (likelihood >= np.float32(wanted.min_p) - slack)
    if wanted.top_k > 0 and keep.any():
        kept = np.sort(scores[keep])[::-1]
        keep &= scores >= kept[min(wanted.top_k, len(kept)) - 1]
    weights = np.where(keep, likelihood, 0.0)
    if wanted.top_p < 1:
        more_likely = (scores[None, :] > scores[:, None]) @ weights
        keep &= more_likely < (np.float32(wanted.top_p) + slack) * weights.sum()
    return keep


def check(logits: np.ndarray, filters: list[Filter]) -> None:
    scores = np.asarray(run_candidates(logits, inputs(filters)))
    for row, wanted in enumerate(filters):
        kept = np.isfinite(scores[row])
        assert (left(logits[row], wanted, -1e-5) <= kept).all(), wanted
        assert (kept <= left(logits[row], wanted, 1e-5)).all(), wanted
        expected = logits[row, kept] / np.float32(wanted.temperature)
        np.testing.assert_allclose(scores[row, kept], expected, rtol=3e-7)


EDGES = {
    "nothing": Filter(),
    "the best": Filter(top_k=1),
    "more than there are": Filter(top_k=VOCAB + 5),
    "all there are": Filter(top_k=VOCAB),
    "the least probability": Filter(top_p=1e-6),
    "all but the least": Filter(top_p=0.999999),
    "as likely as the best": Filter(min_p=1.0),
    "hardly any floor": Filter(min_p=1e-6),
    "cold": Filter(temperature=GREEDY_BELOW),
    "hot": Filter(temperature=2.0, top_p=0.5),
    "top-k, then top-p": Filter(top_k=7, top_p=0.8),
    "min-p, then top-p": Filter(top_p=0.8, min_p=0.3),
    "everything": Filter(temperature=0.7, top_k=50, top_p=0.9, min_p=0.02),
}
LOGITS = {
    "distinct": np.random.default_rng(0).normal(0, 3, VOCAB),
    "tied": np.random.default_rng(1).integers(-2, 3, VOCAB),
    "flat": np.zeros(VOCAB),
    "zeros of both signs": np.where(np.arange(VOCAB) % 2, 0.0, -0.0),
    "one possible": np.where(np.arange(VOCAB) == 9, 4.0, -np.inf),
    "few possible": np.where(np.arange(VOCAB) % 90 == 9, np.arange(VOCAB) / 90, -np.inf),
    "far apart": np.linspace(-1e4, 1e4, VOCAB),
    "negative": -np.random.default_rng(2).exponential(30, VOCAB) - 1,
}


@pytest.mark.parametrize("kind", LOGITS)
def test_edges(kind: str) -> None:
    filters = list(EDGES.values())
    check(np.tile(LOGITS[kind].astype(np.float32), (len(filters), 1)), filters)


wanted = st.builds(
    Filter,
    temperature=st.floats(0.05, 2.0),
    top_k=st.one_of(st.just(0), st.integers(1, VOCAB)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)


@given(
    filters=st.lists(wanted, min_size=ROWS, max_size=ROWS),
    step=st.sampled_from([0.0, 0.25, 1.0]),
    impossible=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=40)
def test_any_filters(filters: list[Filter], step: float, impossible: float, seed: int) -> None:
    """Scores on a grid, so that many are equal, and some ids ruled out before."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (ROWS, VOCAB)).astype(np.float32)
    if step:
        logits = np.round(logits / np.float32(step)) * np.float32(step)
    logits[random.random(logits.shape) < impossible] = -np.inf
    logits[:, 0] = 1.0
    check(logits, filters)


@pytest.mark.parametrize("wanted", EDGES.values(), ids=EDGES)
def test_a_choice_is_one_of_the_candidates(wanted: Filter) -> None:
    rows = 512
    logits = np.tile(LOGITS["few possible"].astype(np.float32), (rows, 1))
    tokens = np.asarray(run_choose(logits, inputs([wanted] * rows)))
    assert left(logits[0], wanted, 1e-5)[tokens].all()


def test_greedy_is_the_lowest_of_the_best() -> None:
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, [7, 11]] = 2.0
    logits[2, :-1] = -np.inf
    assert run_greedy(logits).tolist() == [0, 7, VOCAB - 1]


def test_greedy_rows_beside_random_ones_stay_greedy() -> None:
    logits = np.random.default_rng(3).normal(0, 1, (ROWS, VOCAB)).astype(np.float32)
    filters = [Filter(temperature=1.5 * (row % 2), top_p=0.9) for row in range(ROWS)]
    tokens = np.asarray(run_choose(logits, inputs(filters)))
    np.testing.assert_array_equal(tokens[::2], np.asarray(run_greedy(logits))[::2])


def flat(rows: int) -> np.ndarray:
    return np.zeros((rows, VOCAB), np.float32)


def test_a_choice_depends_on_seed_and_count_alone() -> None:
    """One (seed, count) in every row of steps of every size, beside others' seeds."""
    tokens = set()
    for rows in (1, 4, ROWS):
        same = inputs([Filter()] * rows, seeds=np.full(rows, 1234), counts=5)
        tokens |= set(np.asarray(run_choose(flat(rows), same)).tolist())
    others = np.arange(ROWS)
    others[3] = 1234
    among = run_choose(flat(ROWS), inputs([Filter()] * ROWS, seeds=others, counts=5))
    assert tokens == {int(among[3])}


def test_every_bit_of_the_seed_and_the_count_matter() -> None:
    given = inputs([Filter()] * 66)
    seeds = np.zeros((66, 2), np.uint32)
    for bit in range(64):
        seeds[bit, bit // 32] = 1 << bit % 32
    counts = np.zeros(66, np.int32)
    counts[65] = 1
    given = dataclasses.replace(given, seeds=seeds, num_generated=counts)
    tokens = np.asarray(run_choose(flat(66), given)).tolist()
    # 66 draws from 300 ids: about 59 distinct ones if they are independent.
    assert len(set(tokens)) > 45


@pytest.mark.parametrize("wanted", [Filter(0.0), Filter(), Filter(top_k=1), Filter(top_p=1e-6)])
def test_ids_held_back_are_passed_over_before_any_filter(wanted: Filter) -> None:
    rows, best = 256, np.argsort(-LOGITS["distinct"])
    given = inputs([wanted] * rows)
    held_back = given.held_back_ids.copy()
    held_back[:, :20] = best[:20]
    logits = np.tile(LOGITS["distinct"].astype(np.float32), (rows, 1))
    given = dataclasses.replace(given, held_back_ids=held_back)
    masks = mask_array({}, num_rows=rows, vocab_size=VOCAB)
    run_sample = jax.jit(sample, static_argnames="num_top")
    tokens, _, _ = run_sample(logits, given, empty_state(0, VOCAB), masks, num_top=1)
    assert not np.isin(tokens, best[:20]).any()
    if wanted != Filter():
        assert set(np.asarray(tokens).tolist()) == {int(best[20])}
