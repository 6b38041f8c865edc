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
