"""What tells, without reading it, whether a file is the one it was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

_NUMBERS: Final = 5


def file_state(found: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size in bytes, and in nanoseconds when content and inode last changed: who
    writes a file can set the former back, and not the latter."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def were_only_touched(before: Sequence[int], now: Sequence[int]) -> bool:
    """Whether of files with these states, one behind the other, at most the inodes changed: another
    link leads there, other users may read them. Or they were written and the time set back."""
    pairs = zip(before, now, strict=False)
    same = all(a == b for at, (a, b) in enumerate(pairs) if at % _NUMBERS != _NUMBERS - 1)
    return len(before) == len(now) > 0 and same
