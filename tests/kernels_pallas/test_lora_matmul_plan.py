"""How a step's tokens are cut into blocks: properties that every implementation relies on."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from kernels_pallas.lora_matmul.op import LoraBatch, cover, max_blocks, plan


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Token slots, each slot's in one run with gaps of -1 anywhere, and the number of slots."""
    num_slots = draw(st.integers(1, 12))
    slots = draw(st.permutations(range(num_slots)))
    used = slots[: draw(st.integers(0, num_slots))]
    pieces = [np.full(draw(st.integers(0, 5)), -1)]
    for slot in used:
        pieces.append(np.full(draw(st.integers(1, 40)), slot))
        pieces.append(np.full(draw(st.sampled_from([0, 0, 1, 6])), -1))
    token_slots = np.concatenate(pieces).astype(np.int32)
    return (token_slots if len(token_slots) else np.full(1, -1, np.int32)), num_slots


def plan_of(
    token_slots: ArrayLike, num_slots: int, block_tokens: int, *, aligned: bool = False
) -> LoraBatch:
    ranks = np.ones(num_slots, np.int32)
    return plan(
        np.asarray(token_slots, np.int32), ranks, block_tokens=block_tokens, aligned=aligned
    )


def blocks(batch: LoraBatch) -> list[tuple[int, int, int]]:
    """(slot, start, count) of the blocks that are not padding."""
    columns = (batch.block_slots, batch.block_starts, batch.block_counts)
    rows = zip(*(np.asarray(column).tolist() for column in columns), strict=True)
    return list(rows)[: int(batch.num_blocks[0])]


sizes = st.sampled_from([1, 2, 8, 13, 64])


@given(steps(), sizes, st.booleans())
def test_every_served_token_is_in_one_block(
    step: tuple[np.ndarray, int], block_tokens: int, aligned: bool
) -> None:
    token_slots, num_slots = step
    batch = plan_of(token_slots, num_slots, block_tokens, aligned=aligned)
    covered = np.full(len(token_slots), -1)
    for slot, start, count in blocks(batch):
        assert 1 <= count <= block_tokens
        assert (covered[start : start + count] == -1).all()
        covered[start : start + count] = slot
        if aligned:
            assert start // block_tokens == (start + count - 1) // block_tokens
    np.testing.assert_array_equal(covered, token_slots)
    np.testing.assert_array_equal(batch.token_slots, token_slots)


@given(steps(), sizes, st.booleans())
def test_blocks_are_in_token_order_and_padding_repeats_the_last(
    step: tuple[np.ndarray, int], block_tokens: int, aligned: bool
) -> None:
    token_slots, num_slots = step
    batch = plan_of(token_slots, num_slots, block_tokens, aligned=aligned)
    real = blocks(batch)
    starts = [start for _, start, _ in real]
    assert starts == sorted(starts)
    last_slot, last_start, _ = real[-1] if real else (0, 0, 0)
    padding = slice(len(real), None)
    assert (batch.block_slots[padding] == last_slot).all()
    assert (batch.block_starts[padding] == last_start).all()
    assert (batch.block_counts[padding] == 0).all()


@given(steps(), sizes, st.booleans())
def test_a_program_has_room_for_any_mix(
    step: tuple[np.ndarray, int], block_tokens: int, aligned: bool
) -> None:
    token_slots, num_slots = step
    batch = plan_of(token_slots, num_slots, block_tokens, aligned=aligned)
    room = max_blocks(len(token_slots), num_slots, block_tokens)
    shapes = {batch.block_slots.shape, batch.block_starts.shape, batch.block_counts.shape}
    assert shapes == {(room,)}
    assert int(batch.num_blocks[0]) <= room


def test_a_cut_at_every_tile_and_every_slot_is_the_bound() -> None:
    # Tiles of 4 tokens, 3 slots of 4 tokens, none of them where a tile begins.
    token_slots = np.repeat([-1, 2, 0, 1, -1], [1, 4, 4, 4, 3]).astype(np.int32)
    batch = plan_of(token_slots, 3, 4, aligned=True)
    assert blocks(batch) == [(2, 1, 3), (2, 4, 1), (0, 5, 3), (0, 8, 1), (1, 9, 3), (1, 12, 1)]
    assert max_blocks(16, 3, 4) == 7


def test_tokens_of_a_slot_that_are_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="sort the step's rows by slot"):
        plan_of([1, 0, 1], 2, 8)


def test_a_slot_the_bank_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="slot 2 does not exist, the bank has 2 slots"):
        plan_of([0, 2], 2, 8)


compiled_cover = jax.jit(cover, static_argnums=(1, 2))


@given(steps(), sizes)
def test_a_cover_has_every_token_in_one_block(
    step: tuple[np.ndarray, int], block_tokens: int
) -> None:
    token_slots = np.full(600, -1, np.int32)
    token_slots[: len(step[0])] = step[0]
    slots, starts, counts = map(np.asarray, compiled_cover(token_slots, 12, block_tokens))
    covered = np.full(600, -2)
    for slot, start, count in zip(slots, starts, counts, strict=True):
        assert 0 <= count <= block_tokens
        assert (covered[start : start + count] == -2).all()
        covered[start : start + count] = -1 if slot == 12 else slot
    np.testing.assert_array_equal(covered, token_slots)


@pytest.mark.parametrize("block_tokens", [1, 8, 64])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64])
def test_a_cover_has_room_for_the_most_runs(num_tokens: int, block_tokens: int) -> None:
    token = np.arange(num_tokens)
    token_slots = np.where(token % 2, token // 2, -1).astype(np.int32)
    slots, starts, counts = map(
        np.asarray, compiled_cover(token_slots, max(1, num_tokens // 2), block_tokens)
    )
    np.testing.assert_array_equal(starts[:num_tokens], token)
    np.testing.assert_array_equal(counts, [1] * num_tokens + [0] * (len(counts) - num_tokens))
    expected = np.where(token_slots < 0, max(1, num_tokens // 2), token_slots)
    np.testing.assert_array_equal(slots[:num_tokens], expected)
