"""What tells, without reading it, whether a file is the one it was."""

from __future__ import annotations

import os


def file_state(found: os.stat_result) -> tuple[int, ...]:
    """Device, inode, size in bytes, and in nanoseconds when content and inode last changed: who
    writes a file can set the former back, and not the latter."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
