"""A prompt step's tokens cut into pieces, against cutting them token by token."""

from __future__ import annotations

from random import Random

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from kernels_pallas.lora_linear.gpu_pieces import cut
from kernels_pallas.lora_linear.gpu_prompt_config import (
    FEW_PIECES,
    HALF_TILE,
    TILE_TOKENS,
    UNITS,
    WINDOW,
    shrink_bytes,
)
from kernels_pallas.lora_matmul.op import max_blocks

MOST_RUNS, MOST_TOKENS = 64, 600
LENGTHS = st.integers(1, 4) | st.integers(1, 60)
RUNS = st.lists(st.tuples(st.booleans(), LENGTHS), max_size=MOST_RUNS)
MANY = [(True, 1 + 30 * (i % 7 == 0)) for i in range(50)]
compiled = jax.jit(cut, static_argnums=1)


def is_large(start: int, count: int) -> bool:
    """Whether there is no window of the tile, from one of its eights on, with the whole piece."""
    windows = range(0, TILE_TOKENS - WINDOW + 1, 8)
    place = start % TILE_TOKENS
    return not any(at <= place and place + count <= at + WINDOW for at in windows)


@example(runs=MANY, random=Random(0))
@example(runs=[(True, 1)] * FEW_PIECES, random=Random(0))
@example(runs=[(True, 1)] * (FEW_PIECES + 1), random=Random(0))
@given(runs=RUNS, random=st.randoms(use_true_random=False))
def test_every_served_token_is_in_one_piece_and_that_in_a_group_of_its_tile(
    runs: list[tuple[bool, int]], random: Random
) -> None:
    slots = list(range(len(runs)))
    random.shuffle(slots)
    given_slots = [
        slot if served else -1
        for (served, count), slot in zip(runs, slots, strict=True)
        for _ in range(count)
    ]
    token_slots = np.full(MOST_TOKENS, -1, np.int32)
    token_slots[: len(given_slots)] = given_slots[:MOST_TOKENS]
    num_tokens = MOST_TOKENS
    expected: list[tuple[int, int, int]] = []
    for token, slot in enumerate(token_slots.tolist()):
        if slot < 0:
            continue
        new = token % TILE_TOKENS == 0 or token_slots[token - 1] != slot
        if new or not expected:
            expected.append((slot, token, 1))
        else:
            expected[-1] = (slot, expected[-1][1], expected[-1][2] + 1)
    pieces = jax.tree.map(np.asarray, compiled(jnp.asarray(token_slots), MOST_RUNS))
    assert len(pieces.slots) == max_blocks(num_tokens, MOST_RUNS, TILE_TOKENS)
    tiles = -(-num_tokens // TILE_TOKENS)
    # As `shrink_bytes` counts them.
    halves = [
        half
        for _, start, count in expected
        for half in range(start // HALF_TILE, (start + count - 1) // HALF_TILE + 1)
    ]
    assert len(halves) <= len(pieces.slots) + tiles
    units = list(zip(*(part.ravel().tolist() for part in pieces[:3]), strict=True))
    groups = [units[i : i + UNITS] for i in range(0, len(units), UNITS)]
    nothing = (-1, num_tokens, 0)
    few = len(expected) <= FEW_PIECES
    large: list[bool] = []
    for tile in range(tiles):
        begin, end = pieces.edges[tile : tile + 2]
        mine = [piece for piece in expected if piece[1] // TILE_TOKENS == tile]
        # First the large ones, each in a group of its own.
        wanted = [[piece] * UNITS for piece in mine if few or is_large(*piece[1:])]
        large += [True] * len(wanted)
        small = [piece for piece in mine if not few and not is_large(*piece[1:])]
        small += [nothing] * (-len(small) % UNITS)
        wanted += [small[i : i + UNITS] for i in range(0, len(small), UNITS)]
        assert groups[begin:end] == wanted
        large += [False] * (end - begin - sum(large[begin:]))
    assert pieces.edges[0] == 0
    large += [False] * (len(groups) - len(large))
    assert pieces.large.tolist() == large
    assert all(group == [nothing] * UNITS for group in groups[pieces.edges[tiles] :])


def test_two_thread_blocks_of_a_shrink_share_a_multiprocessor_if_there_are_too_many() -> None:
    def room(tokens: int, slots: int) -> int:
        return shrink_bytes(tokens, max_blocks(tokens, slots, TILE_TOKENS), cuts=4)

    assert room(2048, 8) == room(2048, 16) == room(512, 8) // 2
    # With many slots pieces may be small.
    assert room(2048, 64) == room(512, 64) == room(512, 8)
