"""Ctrl-C, kept out of what must not end half-way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block is left, where its handler is called once.

    A step donates the cache to a program and takes the new one from it: an interrupt between the
    two would leave none. An adapter's name, copy, slot and holders change together. Does nothing
    outside the main thread, where Python runs no handlers, and where the program has no handler of
    its own.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        handler(held[0], None)
