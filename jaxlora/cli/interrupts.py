"""Ctrl-C in a command that holds nothing yet."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

INTERRUPTED = "jaxlora: interrupted"
STATUS = 128 + signal.SIGINT
"""What shells expect of a process that Ctrl-C ended."""


@contextlib.contextmanager
def ending_the_process() -> Iterator[None]:
    """Ctrl-C ends the process as soon as Python runs; for the main thread.

    No exception says so: while modules are imported and models loaded the garbage collector is
    busy, and what is raised while it calls back is lost.
    """
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: object) -> None:
    if sys.stdout is not None:  # It was closed.
        sys.stdout.flush()
    # Below a bar that may have been drawn.
    print(f"\n{INTERRUPTED}", file=sys.stderr, flush=True)
    os._exit(STATUS)
