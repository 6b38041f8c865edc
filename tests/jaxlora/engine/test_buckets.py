"""The sizes that steps are padded to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.engine.buckets import bucket, row_buckets, scored_step, token_buckets

SIZES = (1, 8, 16, 32, 64, 128)
"""Of the Hopper kernel for a decode step's linears."""


@pytest.mark.parametrize(
    ("max_num_seqs", "linear_sizes", "buckets"),
    [
        (1, (), (1,)),
        (6, (), (1, 4, 6)),
        (64, (), (1, 4, 8, 16, 32, 64)),
        (1, SIZES, (1,)),
        (6, SIZES, (1, 8)),
        (64, SIZES, (1, 8, 16, 32, 64)),
        (100, SIZES, (1, 8, 16, 32, 64, 128)),
        (129, SIZES, (1, 8, 16, 32, 64, 128, 129)),
        (300, SIZES, (1, 8, 16, 32, 64, 128, 256, 300)),
    ],
)
def test_rows(max_num_seqs: int, linear_sizes: tuple[int, ...], buckets: tuple[int, ...]) -> None:
    assert row_buckets(max_num_seqs, linear_sizes) == buckets


@given(max_num_seqs=st.integers(1, 1000), linear_sizes=st.sampled_from([(), SIZES]))
def test_every_step_finds_room(max_num_seqs: int, linear_sizes: tuple[int, ...]) -> None:
    sizes = row_buckets(max_num_seqs, linear_sizes)
    assert list(sizes) == sorted(set(sizes))
    assert all(bucket(sizes, rows) >= rows for rows in range(1, max_num_seqs + 1))
    if linear_sizes:
        assert all(size in linear_sizes for size in sizes if 1 < size <= linear_sizes[-1])


@pytest.mark.parametrize(
    ("most", "buckets"), [(1, (1,)), (100, (100,)), (128, (32, 128)), (2048, (128, 512, 2048))]
)
def test_tokens(most: int, buckets: tuple[int, ...]) -> None:
    assert token_buckets(most) == buckets


@pytest.mark.parametrize(
    ("most", "max_num_seqs", "tokens"),
    [
        (2048, 256, 512),
        (8192, 256, 2048),
        (256, 16, 64),
        # As many rows that decode would leave a prompt no room.
        (1024, 256, 1024),
        (2048, 257, 2048),
        (64, 6, 64),
        (1, 1, 1),
    ],
)
def test_steps_that_score_prompts(most: int, max_num_seqs: int, tokens: int) -> None:
    assert scored_step(token_buckets(most), max_num_seqs) == tokens
