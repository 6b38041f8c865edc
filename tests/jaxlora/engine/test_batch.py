"""A plan's arrays, element by element. That they are read rightly, tests of the scheduler show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxlora.engine import batch
from jaxlora.engine.batch import FROM_TABLE
from jaxlora.engine.scheduler import PlannedRow
from jaxlora.engine.sequence import Sequence
from jaxlora.outputs import RequestMetrics
from jaxlora.types import MAX_STOP_IDS, SamplingParams

VOCAB_SIZE = 50


def planned(
    num_prompt: int,
    *,
    start: int,
    num_tokens: int,
    samples: bool = True,
    num_at_admission: int | None = None,
    num_sampled: int = 0,
    row: int = 0,
    slot: int = -1,
    pages: tuple[int, ...] = (),
    eos: tuple[int, ...] = (0,),
    seed: int = 0,
    **params: Any,
) -> PlannedRow:
    """A planned row of a sequence with prompt ids 10, 11, ... and sampled ids 30, 31, ..."""
    sequence = Sequence(
        request_id="r",
        prompt_token_ids=list(range(10, 10 + num_prompt)),
        params=SamplingParams(**{"temperature": 0.0, **params}),
        max_len=100,
        eos_token_ids=frozenset(eos),
        seed=seed,
        metrics=RequestMetrics(arrival_time=0.0),
        row=row,
        slot=slot,
        pages=list(pages),
        num_at_admission=num_prompt if num_at_admission is None else num_at_admission,
    )
    sequence.token_ids += range(30, 30 + num_sampled)
    return PlannedRow(sequence, start, num_tokens, samples)


def forward(rows: list[PlannedRow], num_tokens: int, num_rows: int, decode: bool) -> Any:
    return batch.forward_inputs(
        rows,
        num_tokens=num_tokens,
        num_rows=num_rows,
        pages_per_row=3,
        spare_row=9,
        decode=decode,
    )


def sampling(*rows: PlannedRow, num_rows: int = 4) -> Any:
    return batch.sample_inputs(list(rows), num_rows=num_rows, spare_row=9, vocab_size=VOCAB_SIZE)


def test_a_mixed_step() -> None:
    inputs = forward(
        [
            planned(3, start=3, num_tokens=1, row=4, pages=(7,)),
            planned(8, start=4, num_tokens=3, samples=False, row=2, pages=(5, 1, 8)),
            planned(2, start=0, num_tokens=2, row=0, pages=(3,)),
        ],
        num_tokens=8,
        num_rows=4,
        decode=False,
    )
    assert inputs.token_ids.tolist() == [FROM_TABLE, 14, 15, 16, 10, 11, 0, 0]
    assert inputs.table_rows.tolist() == [4, 2, 0, 9]
    paged = inputs.paged
    assert paged.cu_q_lens.tolist() == [0, 1, 4, 6, 6]
    assert paged.kv_lens.tolist() == [4, 7, 2, 0]
    assert paged.page_table.tolist() == [[7, 0, 0], [5, 1, 8], [3, 0, 0], [0, 0, 0]]
    assert paged.num_rows.tolist() == [3]
    assert paged.max_q_len == 8


def test_a_decode_step_promises_one_token_a_row() -> None:
    rows = [planned(3, start=4, num_tokens=1, row=i, pages=(i,)) for i in range(2)]
    inputs = forward(rows, num_tokens=4, num_rows=4, decode=True)
    assert inputs.token_ids.tolist() == [FROM_TABLE, FROM_TABLE, 0, 0]
    assert inputs.paged.cu_q_lens.tolist() == [0, 1, 2, 2, 2]
    assert inputs.paged.max_q_len == 1


def test_an_empty_step_has_the_same_shapes() -> None:
    inputs = forward([], num_tokens=4, num_rows=2, decode=False)
    assert inputs.paged.num_rows.tolist() == [0]
    assert inputs.paged.cu_q_lens.tolist() == [0, 0, 0]
    assert inputs.table_rows.tolist() == [9, 9]


@pytest.mark.parametrize(
    ("row", "token_ids"),
    [
        # The last chunk of a prompt may be one token: the host knows it, the table does not.
        (planned(5, start=4, num_tokens=1), [14]),
        (planned(1, start=0, num_tokens=1), [10]),
        (planned(5, start=5, num_tokens=1), [FROM_TABLE]),
        (planned(5, start=7, num_tokens=1, num_sampled=2), [FROM_TABLE]),
        # Admitted again after three sampled tokens: those are the host's to send.
        (
            planned(2, start=0, num_tokens=5, num_sampled=3, num_at_admission=5),
            [10, 11, 30, 31, 32],
        ),
        (planned(2, start=4, num_tokens=1, num_sampled=3, num_at_admission=5), [32]),
        (planned(2, start=5, num_tokens=1, num_sampled=3, num_at_admission=5), [FROM_TABLE]),
    ],
)
def test_which_tokens_the_host_sends(row: PlannedRow, token_ids: list[int]) -> None:
    inputs = forward([row], num_tokens=5, num_rows=1, decode=False)
    assert inputs.token_ids.tolist()[: row.num_tokens] == token_ids


@pytest.mark.parametrize(
    ("slots", "num_tokens", "of_tokens", "of_rows"),
    [
        ((0, 2, -1), 8, [0, 0, 0, 2, -1, -1, -1, -1], [0, 2, -1, -1, -1]),
        ((0, 1, 2), 6, [0, 0, 0, 1, 2, 2], [0, 1, 2, -1, -1]),
        ((), 2, [-1, -1], [-1] * 5),
    ],
)
def test_the_slots_of_tokens_and_of_rows(
    slots: tuple[int, ...], num_tokens: int, of_tokens: list[int], of_rows: list[int]
) -> None:
    """Rows of padding have none, whatever the last row has."""
    rows = [
        planned(3, start=start, num_tokens=count, slot=slot)
        for (start, count), slot in zip(((0, 3), (3, 1), (0, 2)), slots, strict=False)
    ]
    inputs = forward(rows, num_tokens=num_tokens, num_rows=5, decode=False)
    token_slots = batch.slots_of_tokens(rows, num_tokens)
    assert token_slots.tolist() == of_tokens
    assert batch.slots_of_rows(inputs.paged, token_slots).tolist() == of_rows
    # Nobody's extras but those of slot 2.
    used = np.asarray([False, False, True])
    extras = batch.extras_batch(inputs.paged, token_slots, used, np.ones(3, np.int32))
    for planned_batch, whole in ((extras.tokens, of_tokens), (extras.rows, of_rows)):
        expected = [slot if slot == 2 else -1 for slot in whole]
        assert np.asarray(planned_batch.token_slots).tolist() == expected


def test_rows_that_sample_nothing_write_to_the_spare_row() -> None:
    inputs = sampling(
        planned(2, start=2, num_tokens=1, row=5),
        planned(9, start=0, num_tokens=4, row=6, samples=False, temperature=1.0),
    )
    assert inputs.table_rows.tolist() == [5, 9, 9, 9]
    assert inputs.temperature.tolist() == [0, 0, 0, 0]


def test_sampling_parameters_of_each_row() -> None:
    inputs = sampling(
        planned(
            2, start=4, num_tokens=1, temperature=0.5, top_k=-1, top_p=0.25, seed=(7 << 32) + 9
        ),
        planned(2, start=1, num_tokens=1, temperature=2.0, top_k=3, min_p=0.125, seed=2**64 - 1),
        planned(2, start=4, num_tokens=1, top_k=3, seed=5),
    )
    assert inputs.temperature.tolist() == [0.5, 2, 0, 0]
    assert inputs.top_k.tolist() == [0, 3, 0, 0]
    assert inputs.top_p.tolist() == [0.25, 1, 1, 1]
    assert inputs.min_p.tolist() == [0, 0.125, 0, 0]
    assert inputs.seeds.tolist() == [[7, 9], [2**32 - 1] * 2, [0, 0], [0, 0]]
    # Tokens sampled before this one; the same whether or not it was preempted in between.
    assert inputs.num_generated.tolist() == [3, 0, 0, 0]
    assert (inputs.held_back_ids == VOCAB_SIZE).all()


@pytest.mark.parametrize(("start", "held_back"), [(1, [0, 4, 7]), (2, [0, 4, 7]), (3, [])])
def test_ids_are_held_back_until_min_tokens(start: int, held_back: list[int]) -> None:
    row = planned(2, start=start, num_tokens=1, min_tokens=2, stop_token_ids=[7, 4, 0])
    ids = sampling(row).held_back_ids[0].tolist()
    assert ids == held_back + [VOCAB_SIZE] * (MAX_STOP_IDS - len(held_back))
    assert batch.all_greedy([row]) is (not held_back)


def test_state_and_logprobs_of_each_row() -> None:
    penalized = planned(2, start=2, num_tokens=1, row=4, presence_penalty=1.0)
    told = planned(2, start=2, num_tokens=1, row=3, logprobs=0)
    plain = planned(2, start=2, num_tokens=1, row=5)
    reading = planned(5, start=0, num_tokens=2, row=6, samples=False, presence_penalty=1.0)
    inputs = sampling(penalized, told, plain, reading)
    assert inputs.state_rows.tolist() == [4, 9, 9, 9]
    assert inputs.tells_logprobs.tolist() == [False, True, False, False]
    assert not batch.all_greedy([penalized])
    assert not batch.all_greedy([told])
    assert batch.all_greedy([plain, reading])


def test_state_is_written_once_a_row_is_given() -> None:
    def new(start: int, num_tokens: int, at_admission: int, **params: Any) -> bool:
        row = planned(
            4,
            start=start,
            num_tokens=num_tokens,
            samples=start + num_tokens >= 4,
            num_at_admission=at_admission,
            **({"logit_bias": {1: 1.0}} | params),
        )
        return batch.new_state_rows([row]) == [row]

    assert not new(0, 2, 4)
    assert new(2, 2, 4)
    assert not new(4, 1, 4)
    assert not new(2, 2, 4, logit_bias=None)
    # Preempted after three sampled tokens and read again.
    assert new(3, 4, 7)
    assert not new(7, 1, 7)


@pytest.mark.parametrize(
    ("start", "num_tokens", "positions"),
    [(0, 5, [1, 2, 3, 4]), (0, 2, [1, 2]), (2, 1, [3]), (2, 3, [3, 4]), (4, 1, []), (5, 1, [])],
)
def test_which_prompt_tokens_a_step_scores(
    start: int, num_tokens: int, positions: list[int]
) -> None:
    before = planned(3, start=3, num_tokens=1)
    row = planned(5, start=start, num_tokens=num_tokens, prompt_logprobs=0)
    chunks = batch.scored_chunks([before, row])
    assert [at for chunk in chunks for at in chunk.positions] == positions
    assert all(chunk.first_token == 1 for chunk in chunks)


def test_scored_prompts_are_not_scored_again() -> None:
    row = planned(3, start=0, num_tokens=3, prompt_logprobs=0)
    row.sequence.add_prompt_logprobs(1, [{}])
    assert len(batch.scored_chunks([row])) == 1
    row.sequence.add_prompt_logprobs(1, [{}, {}])
    assert row.sequence.prompt_logprobs == [None, {}, {}]
    assert batch.scored_chunks([row]) == []


def test_when_the_greedy_program_is_enough() -> None:
    plain = planned(2, start=2, num_tokens=1)
    random = planned(2, start=2, num_tokens=1, temperature=1.0)
    reading = planned(5, start=0, num_tokens=2, samples=False, temperature=1.0, min_tokens=1)
    holding = planned(2, start=1, num_tokens=1, min_tokens=1)
    assert batch.all_greedy([plain, reading])
    assert not batch.all_greedy([plain, random])
    assert not batch.all_greedy([plain, holding])
    # A greedy row beside a random one keeps temperature 0.
    assert sampling(plain, random).temperature.tolist() == [0, 1, 0, 0]
