"""Parts of one block of memory: of whole pages, nobody else's, and all of it in the end."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.adapters.arena import Arena, whole_pages

PAGE = 4096


def place(memory: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    begin = part.ctypes.data - memory.ctypes.data
    return begin, begin + part.nbytes


@pytest.mark.parametrize(
    ("num_bytes", "size"),
    [(0, 0), (1, PAGE), (PAGE - 1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)],
)
def test_whole_pages(num_bytes: int, size: int) -> None:
    assert whole_pages(num_bytes) == size


def test_parts_are_of_whole_pages_one_after_the_other() -> None:
    memory = np.empty(6 * PAGE + 100, np.uint8)
    arena = Arena(memory)
    assert arena.idle_bytes == 6 * PAGE
    parts = [arena.take(size) for size in (1, PAGE, PAGE + 1)]
    assert [part is not None and place(memory, part) for part in parts] == [
        (0, PAGE),
        (PAGE, 2 * PAGE),
        (2 * PAGE, 4 * PAGE),
    ]
    assert arena.idle_bytes == 2 * PAGE
    # What is less than a page at the end is nobody's.
    assert arena.take(2 * PAGE + 1) is None
    last = arena.take(2 * PAGE)
    assert last is not None
    assert place(memory, last) == (4 * PAGE, 6 * PAGE)
    assert arena.take(1) is None
    assert arena.idle_bytes == 0


def test_the_smallest_gap_that_is_large_enough_is_taken_the_first_of_equal_ones() -> None:
    memory = np.empty(15 * PAGE, np.uint8)
    arena = Arena(memory)
    parts = [arena.take(size * PAGE) for size in (4, 1, 2, 1, 2, 2)]
    for part in (parts[0], parts[2], parts[4]):
        assert part is not None
        assert arena.give_back(part)
    # Gaps of four pages from 0 on, of two from 5 and from 8 on, and of three from 12 on.
    found = []
    for num_pages in (2, 1, 3, 4, 1, 1):
        taken = arena.take(num_pages * PAGE)
        found.append(None if taken is None else place(memory, taken)[0] // PAGE)
    assert found == [5, 8, 12, 0, 9, None]


@pytest.mark.parametrize(
    "order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
)
def test_what_comes_back_is_one_gap_with_what_is_beside_it(order: tuple[int, int, int]) -> None:
    arena = Arena(np.empty(6 * PAGE, np.uint8))
    parts = [arena.take(2 * PAGE) for _ in range(3)]
    for count, number in enumerate(order, 1):
        part = parts[number]
        assert part is not None
        assert arena.give_back(part)
        assert arena.idle_bytes == count * 2 * PAGE
    assert arena.take(6 * PAGE) is not None


def test_other_memory_is_not_taken_in() -> None:
    memory = np.empty(12 * PAGE, np.uint8)
    arena = Arena(memory[4 * PAGE : 8 * PAGE])
    whole = arena.take(4 * PAGE)
    assert whole is not None
    assert not arena.give_back(memory[2 * PAGE : 4 * PAGE])
    assert not arena.give_back(memory[8 * PAGE : 9 * PAGE])
    assert arena.idle_bytes == 0
    assert arena.give_back(whole)
    assert arena.idle_bytes == 4 * PAGE


@pytest.mark.parametrize("size", [0, PAGE - 1])
def test_without_a_page_it_has_nothing(size: int) -> None:
    arena = Arena(np.empty(size, np.uint8))
    assert (arena.idle_bytes, arena.take(1)) == (0, None)
    assert not arena.give_back(np.empty(PAGE, np.uint8))


@given(
    st.integers(0, 12),
    st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE), st.integers(0, 20)), max_size=60),
)
def test_as_a_row_of_pages_does(num_pages: int, steps: list[tuple[bool, int, int]]) -> None:
    """Each of which is somebody's, by number, or 0."""
    memory = np.empty(num_pages * PAGE, np.uint8)
    arena = Arena(memory)
    owners = [0] * num_pages
    held: dict[int, np.ndarray] = {}

    def gaps() -> Counter[int]:
        return Counter(len(list(run)) for owner, run in groupby(owners) if not owner)

    for number, (takes, size, which) in enumerate(steps, 1):
        if takes:
            before, wanted = gaps(), -(-size // PAGE)
            part = arena.take(size)
            smallest = min((gap for gap in before if gap >= wanted), default=None)
            assert (part is None) == (smallest is None)
            if part is None or smallest is None:
                continue
            begin, end = place(memory, part)
            assert (begin % PAGE, end - begin) == (0, wanted * PAGE)
            first, last = begin // PAGE, end // PAGE
            assert not any(owners[first:last])
            owners[first:last] = [number] * wanted
            held[number] = part
            rest = Counter({smallest - wanted: 1} if smallest > wanted else {})
            assert gaps() == before - Counter([smallest]) + rest
        elif held:
            owner = list(held)[which % len(held)]
            assert arena.give_back(held.pop(owner))
            owners = [0 if each == owner else each for each in owners]
        assert arena.idle_bytes == PAGE * owners.count(0)
    for part in held.values():
        assert arena.give_back(part)
    whole = arena.take(num_pages * PAGE) if num_pages else memory
    assert whole is not None
    assert whole.nbytes == num_pages * PAGE
