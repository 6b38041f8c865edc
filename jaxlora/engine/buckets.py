"""The few static sizes that steps are padded to."""

from __future__ import annotations

from collections.abc import Sequence


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
