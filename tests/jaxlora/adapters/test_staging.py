"""What is staged ahead of its turn, and what becomes of it if it is not wanted any more."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.registered import Registered
from jaxlora.adapters.staging import StagingArea
from jaxlora.types import LoRARequest
from tests.jaxlora.engine.simulator import make_adapter
from tests.jaxlora.patience import SECONDS


class OnDevice:
    """What was staged."""


@pytest.mark.parametrize("fails", [False, True])
def test_what_arrives_when_nobody_wants_it_is_kept_by_nobody(fails: bool) -> None:
    """And there is room again, although nobody has looked."""
    begun, may_end = threading.Event(), threading.Event()
    made: list[weakref.ref[OnDevice]] = []

    def stage(_: Adapter) -> OnDevice:
        begun.set()
        assert may_end.wait(SECONDS)
        staged = OnDevice()
        made.append(weakref.ref(staged))
        if fails:
            raise ValueError("no memory")
        return staged

    adapter = make_adapter("a")
    entry = Registered.of(LoRARequest("a"), adapter, 1)
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as threads:
            area = StagingArea(stage, size_of=lambda _: 7, threads=threads)
            area.want([(entry, adapter)])
            assert begun.wait(SECONDS)
            area.drop(entry)
            assert (area.num_bytes, area.is_making_room, area.under_way) == (7, True, [])
            area.news.clear()
            may_end.set()
            # Who waits for the room is told when it is there.
            assert area.news.wait(SECONDS)
        assert (area.num_bytes, area.is_making_room, area.failed()) == (0, False, [])
        assert [each() for each in made] == [None]
    finally:
        gc.enable()
