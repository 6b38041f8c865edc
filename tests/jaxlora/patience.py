"""How long tests wait for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 120
"""More than anything but a start takes on a busy machine."""


def wait_until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Asks until it is true, or for so long: what must be so then is the caller's to assert."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
