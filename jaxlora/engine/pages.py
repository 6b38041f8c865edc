"""The pool of KV pages as numbers: who holds which page, and what can be found in them. Host only.

A page may have several holders, who then only read it. A full page can be given a key that stands
for what it holds. It is found by that key, held or not, until it is allocated for something else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """``num_pages`` pages of ``page_size`` tokens."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._num_holders = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))
        """Pages nobody holds, in the order they are taken: those without a key, then the one that
        has been free for longest."""
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """The ``shared`` pages, which were found by key, and ``count`` others for the caller alone;
        or None, and nothing happens, if there are not so many."""
        if count > len(self._free) - sum(page in self._free for page in shared):
            return None
        for page in shared:
            self._free.pop(page, None)
        new = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in new:
            if page in self._key_of:
                del self._page_of[self._key_of.pop(page)]
        pages = [*shared, *new]
        for page in pages:
            self._num_holders[page] += 1
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Gives up pages; those nobody else holds return to the pool.

        Given in the order of their tokens, the last one is reused first: what precedes it is of
        use without it, but not the reverse.
        """
        for page in reversed(pages):
            if self._num_holders[page] == 0:
                raise ValueError(f"page {page} was freed twice")
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                self._free[page] = None
                if page not in self._key_of:
                    self._free.move_to_end(page, last=False)

    def set_key(self, page: int, key: bytes) -> None:
        """Lets a held page be found by a key, unless another page is."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def find(self, key: bytes) -> int | None:
        """The page that has a key."""
        return self._page_of.get(key)

    def forget_keys(self) -> None:
        """No page is found any more; who holds which stays as it is."""
        self._page_of.clear()
        self._key_of.clear()
