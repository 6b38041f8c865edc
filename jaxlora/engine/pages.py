"""The pool of KV pages as numbers: who holds which page. Host only."""

from __future__ import annotations


class PagePool:
    """``num_pages`` pages of ``page_size`` tokens."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages, or None if there are not so many."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: list[int]) -> None:
        """Returns pages to the pool."""
        self._free.extend(reversed(pages))
        if len(self._free) > self.num_pages:
            raise ValueError("pages were freed twice")
