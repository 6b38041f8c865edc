"""Large arrays cut into pieces, which several threads take one after another.

What is done to a piece must give Python's lock back and make few calls: each waits to get the lock
again, and so does the thread that steps the engine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np

from jaxlora.interrupts import uninterrupted

_T = TypeVar("_T")

PIECE_BYTES: Final = 24 << 20
"""An adapter of 84 MB, of an 8B model and rank 16, is one for each thread."""
_MOST_THREADS: Final = 4
"""With eight an adapter takes two thirds of the time, and the thread that steps waits longer."""
_turn = threading.Lock()
_TURN_SECONDS: Final = 1.0
"""Large arrays are worked on one after the other, unless the one before takes longer than that: two
at a time take little less time than one by one, and what waits for Python's lock adds up."""


class Piece(NamedTuple):
    """Some of the elements of one of the arrays."""

    block: int
    """Which array."""
    at: int
    """Where in that it begins, in bytes."""
    values: np.ndarray


def num_threads() -> int:
    """How many share the work on an adapter: half the cores at most, and few of many."""
    return max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2))


def in_pieces(blocks: Sequence[np.ndarray], function: Callable[[Piece], _T]) -> list[_T]:
    """What ``function`` returns for each piece of contiguous arrays, in order.

    Who has several pieces waits a little for others who have. The thread that calls takes pieces,
    and a few that all callers share help; together they are half the cores at most, and where they
    are busy it does without. Raises what the first piece that fails raises; then, and if it
    is interrupted, nobody is at work on any piece any more.
    """
    if sum(block.nbytes for block in blocks) <= PIECE_BYTES:
        return [function(piece) for piece in _cut(blocks)]
    has_turn = False
    try:
        with uninterrupted():
            # A disk that hangs is waited for by nobody else.
            has_turn = _turn.acquire(timeout=_TURN_SECONDS)
        return _shared(blocks, function)
    finally:
        if has_turn:
            _turn.release()


def copy_in_pieces(source: np.ndarray, target: np.ndarray) -> None:
    """Assigns flat arrays, with the threads that share such work."""

    def copy_piece(piece: Piece) -> None:
        begin = piece.at // target.itemsize
        assign(source[begin : begin + piece.values.size], piece.values)

    in_pieces([target], copy_piece)


def assign(source: np.ndarray, target: np.ndarray) -> None:
    """Assigns, many times faster than numpy does where both are bfloat16."""
    if source.dtype == target.dtype:
        source, target = bits(source), bits(target)
    target[...] = source


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers."""
    return array.view(f"u{array.itemsize}")


def _shared(blocks: Sequence[np.ndarray], function: Callable[[Piece], _T]) -> list[_T]:
    todo = deque(enumerate(_cut(blocks)))
    found: list[Any] = [None] * len(todo)

    def work() -> None:
        for index, piece in _taken(todo):
            try:
                found[index] = function(piece)
            except Exception as error:  # noqa: BLE001  raised below, by the thread that asked
                found[index] = error
                todo.clear()

    num_helpers = num_threads() - 1
    num_wanted = min(num_helpers, sum(block.nbytes for block in blocks) // PIECE_BYTES)
    helpers: list[Future[None]] = []
    try:
        for _ in range(num_wanted):
            helpers.append(_threads(num_helpers).submit(work))
        work()
    finally:
        todo.clear()
        # Not for those that have not begun: their threads may be busy with others' pieces.
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()
    # Those before a piece that failed were taken before it, so none of them is in doubt.
    error = next((each for each in found if isinstance(each, Exception)), None)
    if error is None:
        return found
    try:
        # An error that were known to the frames it knows would keep the arrays until a collection.
        found.clear()
        raise error
    finally:
        del error


def _cut(blocks: Sequence[np.ndarray]) -> Iterator[Piece]:
    for number, block in enumerate(blocks):
        flat = block.reshape(-1)
        step = PIECE_BYTES // block.itemsize
        for at in range(0, flat.size, step):
            yield Piece(number, at * block.itemsize, flat[at : at + step])


def _taken(todo: deque[_T]) -> Iterator[_T]:
    """What nobody else has taken, until there is nothing left."""
    with contextlib.suppress(IndexError):
        while True:
            yield todo.popleft()


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "jaxlora-pieces")


def _begin_anew() -> None:
    """In a child, which has none of the threads and would wait for them for ever."""
    global _turn  # noqa: PLW0603  the lock may be held by a thread that the child lacks
    _threads.cache_clear()
    _turn = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)
