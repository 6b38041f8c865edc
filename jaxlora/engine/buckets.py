"""The few static sizes that steps are padded to."""

from __future__ import annotations

import math
from collections.abc import Sequence


def tokens_for_weights(platform: str) -> int:
    """How many tokens' arithmetic takes as long as reading the weights."""
    # On an H100 steps of 128, 512 and 2048 tokens take 10, 12.5 and 44 ms.
    return 16 if platform == "cpu" else 400


def row_buckets(max_num_seqs: int, linear_sizes: Sequence[int] = ()) -> tuple[int, ...]:
    """Row counts decode steps are compiled for, ascending: 1, then 4, 8, 16 ... up to the maximum.
    Between them a step is padded, which costs a decode step little: it waits for weights, not rows.

    ``linear_sizes`` are those that a kernel for a step's linears serves, if there is one: of the
    others only 1, and what lies beyond its largest; a maximum between them is rounded up.
    """
    most, sizes = max_num_seqs, (1, *(4 << i for i in range(32)))
    if linear_sizes:
        served = sorted({1, *linear_sizes})
        sizes = (*served, *(size for size in sizes if size > served[-1]))
        most = next((size for size in served if size >= max_num_seqs), max_num_seqs)
    return (*(size for size in sizes if size < most), most)


def token_buckets(max_num_batched_tokens: int) -> tuple[int, ...]:
    """Token counts steps with prompt chunks are compiled for, ascending: the maximum, and quarters
    of it."""
    sizes = {max_num_batched_tokens}
    size = max_num_batched_tokens // 4
    while size >= 32 and len(sizes) < 3:
        sizes.add(size)
        size //= 4
    return tuple(sorted(sizes))


def step_size(sizes: Sequence[int], num_decoding: int, num_prompt: int, *, weights: int) -> int:
    """The one of the ascending ``sizes`` that the next step's tokens are to fit in, so that so many
    of prompts are read the soonest beside as many as decode in each step.

    600 tokens would leave most of a step of 2048 empty, which takes as long as four of 512. A step
    is taken to last as long as its size and a quarter of ``weights``, in tokens
    (:func:`tokens_for_weights`), but no shorter than these.
    """
    if num_decoding + num_prompt >= sizes[-1]:
        return sizes[-1]

    def time(size: int) -> float:
        return max(weights, size + weights / 4)

    def all_steps(size: int) -> float:
        room = size - num_decoding
        if room <= 0:
            return math.inf
        full, rest = divmod(num_prompt, room)
        return full * time(size) + (time(bucket(sizes, num_decoding + rest)) if rest else 0)

    # Of equals the largest, which is the fewest steps.
    return min(reversed(sizes), key=all_steps)


def scored_step(sizes: Sequence[int], max_num_seqs: int) -> int:
    """Most tokens of a step that scores a prompt, one of the ascending ``sizes`` of
    :func:`token_buckets`.

    Scores need the hidden states of all tokens. Steps of more go on after the last layer's
    attention with the last token of each row: so do those of the largest size, in which prompts in
    bulk are read, if the next one has room for prompts beside as many rows that decode.
    """
    return next((size for size in sizes[-2:-1] if size >= 2 * max_num_seqs), sizes[-1])


def bucket(sizes: Sequence[int], count: int) -> int:
    """The first of the ascending sizes that has room for ``count``, which the last one has."""
    return next(size for size in sizes if size >= count)
