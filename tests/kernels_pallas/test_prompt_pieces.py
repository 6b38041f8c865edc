"""A prompt step's tokens cut into pieces, against cutting them token by token."""

from __future__ import annotations

from random import Random

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.lora_linear.gpu_pieces import cut
from kernels_pallas.lora_matmul.op import max_blocks

TILE, MOST_RUNS, MOST_TOKENS = 8, 12, 203
RUNS = st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=MOST_RUNS)
compiled = jax.jit(cut, static_argnums=(1, 2))


@given(runs=RUNS, random=st.randoms(use_true_random=False))
def test_every_served_token_is_in_one_piece_of_its_tile(
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
        new = token % TILE == 0 or token_slots[token - 1] != slot
        if new or not expected:
            expected.append((slot, token, 1))
        else:
            expected[-1] = (slot, expected[-1][1], expected[-1][2] + 1)
    pieces = jax.tree.map(np.asarray, compiled(jnp.asarray(token_slots), MOST_RUNS, TILE))
    assert len(pieces.slots) == max_blocks(num_tokens, MOST_RUNS, TILE)
    tiles = -(-num_tokens // TILE)
    count = int(pieces.edges[tiles])
    found = list(zip(*(part[:count].tolist() for part in pieces[:3]), strict=True))
    assert found == expected
    for tile in range(tiles):
        begin, end = pieces.edges[tile : tile + 2]
        assert [start // TILE for _, start, _ in found[begin:end]] == [tile] * (end - begin)
    assert (pieces.starts[count:] == num_tokens).all()
