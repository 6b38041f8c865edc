"""One block of memory that parts are lent of."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

import numpy as np

_PAGE: Final = 4096


def whole_pages(num_bytes: int) -> int:
    """Bytes of the pages that so many bytes need."""
    return -(-num_bytes // _PAGE) * _PAGE


class Arena:
    """Lends parts of ``memory``, a flat uint8 array: where that begins with a page, whole pages, so
    that no two parts share one. Does not wait and takes no lock: callers see to it that there is
    one at a time."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self._address = memory.ctypes.data
        size = memory.nbytes // _PAGE * _PAGE
        self._gaps = [(0, size)] if size else []
        """Where what nobody has begins and ends, in order; no two touch."""

    @property
    def idle_bytes(self) -> int:
        """What nobody has."""
        return sum(end - begin for begin, end in self._gaps)

    def take(self, num_bytes: int) -> np.ndarray | None:
        """So many bytes or, up to a page, more; None if no gap is as large. They are the beginning
        of the smallest that is, since a larger one may be needed as a whole."""
        size = whole_pages(num_bytes)
        large = ((end - begin, at) for at, (begin, end) in enumerate(self._gaps))
        _, at = min((each for each in large if each[0] >= size), default=(0, None))
        if at is None:
            return None
        begin, end = self._gaps[at]
        middle = begin + size
        self._gaps[at : at + 1] = [(middle, end)] if middle < end else []
        return self._memory[begin:middle]

    def give_back(self, part: np.ndarray) -> bool:
        """Takes back what :meth:`take` returned; False, and nothing is done, if it is other memory
        than the arena's."""
        begin = part.ctypes.data - self._address
        if not 0 <= begin < self._memory.nbytes:
            return False
        end = begin + part.nbytes
        at = bisect_left(self._gaps, (begin, end))
        if at < len(self._gaps) and self._gaps[at][0] == end:
            _, end = self._gaps.pop(at)
        if at and self._gaps[at - 1][1] == begin:
            at -= 1
            begin, _ = self._gaps.pop(at)
        self._gaps.insert(at, (begin, end))
        return True
