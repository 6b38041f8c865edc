"""The sizes that steps are padded to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.engine.buckets import (
    bucket,
    row_buckets,
    scored_step,
    step_size,
    token_buckets,
    tokens_for_weights,
)

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
    ("num_decoding", "num_prompt", "size"),
    [
        (0, 512, 512),
        # As long as two of 512, or a little longer.
        (0, 600, 512),
        (120, 1000, 512),
        # As long as three of 512 and one of 128.
        (0, 1664, 2048),
        (0, 2048, 2048),
        (0, 9999, 2048),
        # Beside as many that decode a small step has little room.
        (256, 1600, 2048),
    ],
)
def test_how_large_a_step_is_on_an_accelerator(
    num_decoding: int, num_prompt: int, size: int
) -> None:
    sizes, weights = token_buckets(2048), tokens_for_weights("gpu")
    found = step_size(sizes, num_decoding, num_prompt, weights=weights)
    assert bucket(sizes, min(found, num_decoding + num_prompt)) == size


@given(
    most=st.integers(1, 4096),
    num_decoding=st.integers(0, 300),
    num_prompt=st.integers(0, 9999),
    weights=st.sampled_from([1, 16, 400]),
)
def test_smaller_steps_never_take_longer_than_what_they_replace(
    most: int, num_decoding: int, num_prompt: int, weights: int
) -> None:
    sizes, num_decoding = token_buckets(most), min(num_decoding, most - 1)

    def time(size: int) -> float:
        return max(weights, size + weights / 4)

    at_once, taken, left = num_decoding + num_prompt, 0.0, num_prompt
    while left:
        size = step_size(sizes, num_decoding, left, weights=weights)
        count = min(left, size - num_decoding)
        assert count > 0
        left -= count
        taken += time(bucket(sizes, num_decoding + count))
    if at_once <= most:
        assert taken <= time(bucket(sizes, at_once)) or not num_prompt


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
