from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.engine.pages import PagePool


@pytest.mark.parametrize(
    ("num_tokens", "num_pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_pages_for_tokens(num_tokens: int, num_pages: int) -> None:
    assert PagePool(4, 16).pages_for(num_tokens) == num_pages


def test_all_pages_or_none() -> None:
    pool = PagePool(3, 16)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []
    pages = pool.allocate(3)
    assert pages is not None
    assert sorted(pages) == [0, 1, 2]
    assert pool.allocate(1) is None
    pool.free(pages[:1])
    assert pool.allocate(1) == pages[:1]


def test_freeing_twice_is_noticed() -> None:
    pool = PagePool(2, 16)
    pages = pool.allocate(1)
    assert pages is not None
    pool.free(pages)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(pages)


def allocate(pool: PagePool, count: int, shared: tuple[int, ...] = ()) -> list[int]:
    pages = pool.allocate(count, shared)
    assert pages is not None
    return pages


def test_a_page_is_found_by_its_key_until_it_is_allocated() -> None:
    pool = PagePool(3, 16)
    pages = allocate(pool, 3)
    pool.set_key(pages[0], b"a")
    pool.set_key(pages[1], b"b")
    pool.set_key(pages[2], b"a")  # the same content again: the first is found
    assert (pool.find(b"a"), pool.find(b"b"), pool.find(b"c")) == (pages[0], pages[1], None)
    pool.free(pages)
    assert pool.num_free == 3
    # Pages without a key go first, then the end of what was freed.
    assert allocate(pool, 1) == [pages[2]]
    assert allocate(pool, 1) == [pages[1]]
    assert (pool.find(b"a"), pool.find(b"b")) == (pages[0], None)
    pool.forget_keys()
    assert pool.find(b"a") is None
    assert allocate(pool, 1) == [pages[0]]


def test_a_shared_page_is_free_when_its_last_holder_gives_it_up() -> None:
    pool = PagePool(3, 16)
    (page,) = allocate(pool, 1)
    pool.set_key(page, b"a")
    assert allocate(pool, 1, (page,))[0] == page
    assert pool.num_free == 1
    pool.free([page])
    assert pool.num_free == 1
    pool.free([page])
    assert pool.num_free == 2
    with pytest.raises(ValueError, match="freed twice"):
        pool.free([page])


def test_free_pages_that_are_shared_do_not_count_as_others() -> None:
    pool = PagePool(3, 16)
    pages = allocate(pool, 2)
    for page, key in zip(pages, (b"a", b"b"), strict=True):
        pool.set_key(page, key)
    pool.free(pages)
    assert pool.allocate(2, pages) is None
    assert pool.num_free == 3
    assert allocate(pool, 1, tuple(pages))[:2] == pages
    assert pool.num_free == 0


def test_the_page_that_was_free_for_longest_is_reused_first() -> None:
    pool = PagePool(3, 16)
    first, second, third = allocate(pool, 3)
    for page, key in ((first, b"1"), (second, b"2"), (third, b"3")):
        pool.set_key(page, key)
    for page in (second, third, first):
        pool.free([page])
    pool.free(allocate(pool, 0, (second,)))
    assert allocate(pool, 3) == [third, first, second]


@given(st.lists(st.integers(0, 4)), st.randoms())
def test_a_page_has_one_holder(counts: list[int], random: Random) -> None:
    pool = PagePool(9, 1)
    held: list[list[int]] = []
    for count in counts:
        if held and random.random() < 0.4:
            pool.free(held.pop(random.randrange(len(held))))
        free = pool.num_free
        pages = pool.allocate(count)
        assert (pages is None) == (count > free)
        held.append(pages or [])
        all_held = [page for pages in held for page in pages]
        assert len(set(all_held)) == len(all_held) == 9 - pool.num_free
        assert set(all_held) <= set(range(9))
