"""Memory that is lent and comes back: by itself, once, and never while anyone looks into it."""

from __future__ import annotations

import ctypes
import gc
import logging
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.adapters import host_blocks
from jaxlora.adapters.arena import Arena
from jaxlora.adapters.host_blocks import (
    AdapterMemory,
    Aside,
    HostBlocks,
    choose_memory,
    ordinary_memory,
)
from jaxlora.adapters.pinned_memory import PinnedMemory
from tests.jaxlora.cuda_driver import FakeDriver
from tests.jaxlora.lender import Lender
from tests.jaxlora.patience import SECONDS

MIB, PAGE = 1 << 20, 4096


def address(array: np.ndarray) -> int:
    return array.ctypes.data


@pytest.mark.parametrize(
    "part_of",
    [
        lambda array: array,
        lambda array: array.view(np.float32)[10:30].reshape(4, 5)[1:, ::2].T,
        lambda array: array.view(ml_dtypes.bfloat16).reshape(-1, 2)[3],
        lambda array: array.view(np.float32).data,
        lambda array: np.split(array.view(np.int16), [100, 200])[1].view(np.uint16),
        lambda array: np.asarray(array.data[5:9]),
        lambda array: jax.device_put(array.reshape(2, -1)[1]).addressable_data(0),
    ],
)
def test_memory_comes_back_with_the_last_that_looks_into_it(
    part_of: Callable[[np.ndarray], Any],
) -> None:
    lender = Lender()
    array = lender.blocks.take(1000)
    at, frozen = address(array), array[:]
    frozen.flags.writeable = False
    array[:] = 7
    part = part_of(array)
    before = np.asarray(part).copy()
    del array
    assert lender.lent_bytes == 1000
    del frozen
    # What JAX has copied it needs no more; what it has not it keeps.
    if not isinstance(part, jax.Array):
        assert lender.lent_bytes == 1000
    other = lender.blocks.take(1000)
    other[:] = 9
    np.testing.assert_array_equal(np.asarray(part), before)
    del part
    gc.collect()
    assert lender.lent_bytes == 1000
    del other
    again = lender.blocks.take(1000)
    assert lender.num_made <= 2
    assert at in (address(again), address(lender.blocks.take(1000)))
    assert again.flags.writeable
    assert again.flags.c_contiguous


def test_the_smallest_that_fits_is_taken_and_none_that_is_much_larger() -> None:
    lender = Lender()
    sizes = (800, 900, 1000, 2000)
    arrays = [lender.blocks.take(size) for size in sizes]
    where = dict(zip(sizes, map(address, arrays), strict=True))
    del arrays
    assert lender.blocks.idle_bytes == sum(sizes)
    kept = [lender.blocks.take(size) for size in (890, 890, 1001, 10)]
    assert [address(kept[0]), address(kept[1])] == [where[900], where[1000]]
    assert [len(array) for array in kept] == [890, 890, 1001, 10]
    # Nothing was as small as the last two, or as large as the third.
    assert not {address(kept[2]), address(kept[3])} & set(where.values())
    assert lender.num_made == len(sizes) + 2
    assert lender.blocks.idle_bytes == 800 + 2000


def test_what_is_idle_for_longest_goes_first() -> None:
    lender = Lender(max_idle_bytes=2500)
    arrays = [lender.blocks.take(1000) for _ in range(4)]
    where = [address(array) for array in arrays]
    for _ in range(4):
        del arrays[0]
        assert lender.lent_bytes == 1000 * len(arrays)
    assert lender.alive_bytes == lender.blocks.idle_bytes == 2000
    taken = [lender.blocks.take(1000) for _ in range(2)]
    assert [address(array) for array in taken] == [where[3], where[2]]
    # More than may be idle at all.
    del taken
    lender.blocks.take(3000)
    assert lender.alive_bytes == lender.blocks.idle_bytes <= 2500


def test_without_bytes_no_block_is_needed() -> None:
    lender = Lender()
    assert len(lender.blocks.take(0)) == 0
    assert lender.num_made == 0


def test_ordinary_memory_serves_when_there_is_no_more(caplog: pytest.LogCaptureFixture) -> None:
    lender = Lender(max_bytes=3000)
    first, second = lender.blocks.take(1000), lender.blocks.take(1000)
    del second
    # What is idle makes room for what is needed in another size.
    third = lender.blocks.take(2000)
    assert (lender.num_refused, lender.alive_bytes, caplog.text) == (1, 3000, "")
    with caplog.at_level(logging.WARNING):
        more = [lender.blocks.take(1000) for _ in range(3)]
    assert len(caplog.records) == 1
    assert "lower max_cpu_loras or max_cpu_lora_gb (the driver has no more)" in caplog.text
    assert lender.num_refused == 2
    for i, array in enumerate((first, third, *more)):
        array[:] = i
    assert [int(array.max()) for array in (first, third, *more)] == [0, 1, 2, 3, 4]
    # Either kind is used again.
    where = {address(array) for array in (first, *more)}
    del first, more, array
    assert {address(array) for array in [lender.blocks.take(1000) for _ in range(4)]} == where
    del third
    assert lender.alive_bytes == 3000


def test_the_next_one_finds_its_memory_ready() -> None:
    with ThreadPoolExecutor(1) as threads:
        lender = Lender(max_idle_bytes=3 * MIB, threads=threads)

        def settled() -> tuple[int, int]:
            threads.submit(lambda: None).result()
            return lender.num_made, lender.blocks.idle_bytes // MIB

        held = [lender.blocks.take(MIB)]
        assert settled() == (2, 1)
        held.append(lender.blocks.take(MIB))
        assert settled() == (3, 1)
        del held[0]
        # As long as one is idle no other is made.
        held.append(lender.blocks.take(MIB))
        assert settled() == (3, 1)
        # Nor for what is small, or could not be idle.
        others = [lender.blocks.take(1000), lender.blocks.take(3 * MIB + 1)]
        assert settled() == (5, 1)
        assert len({address(array) for array in (*held, *others)}) == 4
        # While there is a thread that can free them.
        del held, others


def test_nobody_misses_what_cannot_be_had_ahead(caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(1) as threads:
        lender = Lender(max_bytes=2 * MIB, threads=threads)
        held = []
        for num_made, num_refused in ((2, 0), (2, 1)):
            held.append(lender.blocks.take(MIB))
            threads.submit(lambda: None).result()
            assert (lender.num_made, lender.num_refused) == (num_made, num_refused)
        assert not caplog.records
        for _ in range(2):
            held.append(lender.blocks.take(MIB))
            assert len(caplog.records) == 1
        assert threads.submit(lambda: lender.num_refused).result() == 2


def test_ctrl_c_does_not_end_the_making_of_blocks_ahead() -> None:
    class Interrupting(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            return super().submit(*args, **kwargs)

    with Interrupting(1) as threads:
        lender = Lender(max_idle_bytes=4 * MIB, threads=threads)
        for size in (MIB, 2 * MIB):
            with pytest.raises(KeyboardInterrupt):
                lender.blocks.take(size)
            ThreadPoolExecutor.submit(threads, lambda: None).result()
            # That which nobody was given, and the one made ahead.
            assert lender.blocks.idle_bytes == 2 * size
            lender.blocks._idle.clear()


def test_who_returns_a_block_frees_none() -> None:
    """Nor do engines that step, which return most."""
    with ThreadPoolExecutor(1) as threads:
        lender, go_on = Lender(max_idle_bytes=1500, threads=threads), threading.Event()
        held = [lender.blocks.take(1000) for _ in range(3)]
        threads.submit(go_on.wait, SECONDS)
        held.clear()
        assert (lender.blocks.idle_bytes, lender.alive_bytes) == (1000, 3000)
        go_on.set()
        threads.submit(lambda: None).result()
        assert (lender.blocks.idle_bytes, lender.alive_bytes) == (1000, 1000)


def test_what_is_to_be_freed_makes_room_for_who_needs_it(caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(1) as threads:
        lender, go_on = Lender(max_idle_bytes=0, max_bytes=4000, threads=threads), threading.Event()
        held = [lender.blocks.take(2000) for _ in range(2)]
        threads.submit(go_on.wait, SECONDS)
        held.clear()
        held.append(lender.blocks.take(2000))
        assert (lender.num_refused, lender.num_made, caplog.text) == (1, 3, "")
        go_on.set()
        held.clear()


def test_an_arena_is_made_once_and_serves_all_that_fits() -> None:
    lender = Lender(max_idle_bytes=16 * PAGE, arena_bytes=8 * PAGE)
    assert (lender.num_made, lender.alive_bytes, lender.lent_bytes) == (1, 8 * PAGE, 0)
    whole = lender.blocks.take(8 * PAGE)
    at = address(whole)
    del whole
    for _ in range(3):
        held = [lender.blocks.take(size) for size in (1, PAGE + 1, PAGE, 3 * PAGE - 1)]
        assert [address(array) - at for array in held] == [0, PAGE, 3 * PAGE, 4 * PAGE]
        assert [len(array) for array in held] == [1, PAGE + 1, PAGE, 3 * PAGE - 1]
        assert lender.lent_bytes == 7 * PAGE
        # Whoever has a part of a part keeps all of it.
        part = held[1][10:20]
        held.clear()
        assert lender.lent_bytes == 2 * PAGE
        del part
        assert lender.blocks.idle_bytes == 8 * PAGE
    assert address(lender.blocks.take(8 * PAGE)) == at
    assert lender.num_made == 1


def test_what_the_arena_has_no_room_for_has_a_block_of_its_own() -> None:
    lender = Lender(max_idle_bytes=16 * PAGE, arena_bytes=6 * PAGE)
    first, large = lender.blocks.take(2 * PAGE), lender.blocks.take(4 * PAGE)
    own = lender.blocks.take(3 * PAGE)
    assert (lender.num_made, lender.lent_bytes) == (2, 9 * PAGE)
    at = address(own)
    del own
    # It is used again, as long as the arena has no room.
    own = lender.blocks.take(3 * PAGE)
    assert (lender.num_made, address(own)) == (2, at)
    arena_at = address(large)
    del large
    again = lender.blocks.take(3 * PAGE)
    assert (lender.num_made, address(again)) == (2, arena_at)
    del own, again
    assert lender.blocks.idle_bytes == 7 * PAGE
    # Nor is room in two places room enough, nor ever any for what is larger than the arena.
    middle = lender.blocks.take(2 * PAGE)
    del first
    others = [lender.blocks.take(size * PAGE) for size in (4, 7)]
    assert lender.num_made == 4
    del middle, others


def test_what_is_idle_in_the_arena_counts_towards_the_bound() -> None:
    lender = Lender(max_idle_bytes=8 * PAGE, arena_bytes=6 * PAGE)
    held = [lender.blocks.take(size * PAGE) for size in (6, 4, 3)]
    where = address(held[2])
    held[1:] = []
    assert (lender.blocks.idle_bytes, lender.alive_bytes) == (7 * PAGE, 13 * PAGE)
    # It takes the place of what is idle for longest, and of whatever else is too much.
    held.append(lender.blocks.take(3 * PAGE))
    assert address(held[1]) == where
    held.pop(0)
    assert (lender.blocks.idle_bytes, lender.alive_bytes) == (6 * PAGE, 9 * PAGE)
    held.clear()
    assert lender.blocks.idle_bytes == lender.alive_bytes == 6 * PAGE


def test_none_is_made_ahead_while_the_arena_has_room() -> None:
    with ThreadPoolExecutor(1) as threads:
        lender = Lender(max_idle_bytes=3 * MIB, arena_bytes=2 * MIB, threads=threads)
        lender.blocks.wait()

        def settled() -> tuple[int, int]:
            threads.submit(lambda: None).result()
            return lender.num_made, lender.blocks.idle_bytes // MIB

        held = [lender.blocks.take(MIB) for _ in range(2)]
        assert settled() == (1, 0)
        held.append(lender.blocks.take(MIB))
        assert settled() == (3, 1)
        # Nor where it could not be kept, since the arena is idle.
        del held
        assert settled() == (3, 3)
        held = [lender.blocks.take(2 * MIB + 1)]
        assert settled() == (4, 3)
        del held


def test_who_comes_before_the_arena_is_made_does_not_wait() -> None:
    with ThreadPoolExecutor(1) as threads:
        go_on = threading.Event()
        threads.submit(go_on.wait, SECONDS)
        lender = Lender(arena_bytes=4 * PAGE, threads=threads)
        early = lender.blocks.take(PAGE)
        early[:] = 5
        assert (lender.num_made, lender.alive_bytes) == (1, PAGE)
        waiting = threading.Thread(target=lender.blocks.wait, daemon=True)
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        go_on.set()
        waiting.join(SECONDS)
        assert not waiting.is_alive()
        held = lender.blocks.take(4 * PAGE)
        assert (lender.num_made, lender.lent_bytes) == (2, 5 * PAGE)
        assert (early == 5).all()
        del early, held
        assert lender.blocks.idle_bytes == 5 * PAGE


def test_blocks_of_their_own_serve_where_no_arena_can_be_had(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lender = Lender(arena_bytes=64 * MIB, max_bytes=3000)
    lender.blocks.wait()
    (record,) = caplog.records
    assert "64 MiB of memory for adapters cannot be pinned at start" in record.getMessage()
    assert "max_cpu_loras or max_cpu_lora_gb (the driver has no more)" in record.getMessage()
    held = [lender.blocks.take(1000) for _ in range(3)]
    assert (lender.num_made, lender.lent_bytes, len(caplog.records)) == (3, 3000, 1)
    held.append(lender.blocks.take(1000))
    assert "no more pinned memory" in caplog.records[1].getMessage()


def test_nobody_waits_for_an_arena_that_failed(caplog: pytest.LogCaptureFixture) -> None:
    def broken(num_bytes: int) -> np.ndarray:
        raise ValueError("broken")

    blocks = HostBlocks(broken, max_idle_bytes=PAGE, arena_bytes=PAGE, aside=Aside())
    waiting = threading.Thread(target=blocks.wait, daemon=True)
    waiting.start()
    waiting.join(SECONDS)
    assert not waiting.is_alive()


def test_ctrl_c_loses_nothing_of_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    lender = Lender(arena_bytes=4 * PAGE)
    take, give_back = Arena.take, Arena.give_back
    calls: list[str] = []

    def press(name: str) -> None:
        calls.append(name)
        signal.raise_signal(signal.SIGINT)

    def take_and_press(arena: Arena, num_bytes: int) -> np.ndarray | None:
        part = take(arena, num_bytes)
        press("take")
        return part

    def press_and_give_back(arena: Arena, part: np.ndarray) -> bool:
        press("give back")
        return give_back(arena, part)

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "take", take_and_press)
        with pytest.raises(KeyboardInterrupt):
            lender.blocks.take(PAGE)
    gc.collect()
    assert lender.lent_bytes == 0
    array = lender.blocks.take(PAGE)
    with monkeypatch.context() as patch:
        # Where an object dies nobody can be told.
        patch.setattr(sys, "unraisablehook", lambda _: None)
        patch.setattr(Arena, "give_back", press_and_give_back)
        del array
    assert calls == ["take", "give back"]
    assert lender.blocks.idle_bytes == 4 * PAGE


def test_an_arena_is_pinned_until_the_last_that_looks_into_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = FakeDriver(monkeypatch)
    aside = Aside()
    blocks = HostBlocks(PinnedMemory(0), max_idle_bytes=MIB, arena_bytes=MIB, aside=aside)
    blocks.wait()
    assert (driver.num_pinned, list(driver.pinned.values())) == (1, [MIB])
    idle, held = (blocks.take(100_000) for _ in range(2))
    held[:] = 3
    part = held.view(np.float16)[10:20]
    del blocks, idle, held
    gc.collect()
    assert driver.num_pinned == len(driver.pinned) == 1
    assert (part.view(np.uint8) == 3).all()
    del part
    # It may be that the thread, too, had still to let go of them.
    done = threading.Event()
    aside(done.set)
    assert done.wait(SECONDS)
    assert not driver.pinned
    assert driver.num_pinned == 1


def test_what_goes_wrong_aside_is_told_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    aside, done = Aside(), threading.Event()
    aside(partial(next, iter(())))
    aside(done.set)
    assert done.wait(SECONDS)
    assert "could not be made ready or freed" in caplog.text
    assert "StopIteration" in caplog.text


def test_what_is_done_aside_is_done_in_turn_and_kept_by_nobody() -> None:
    aside, done, kept = Aside(), [], np.zeros(10)
    alive, all_done = weakref.ref(kept), threading.Event()
    aside(lambda: done.append(threading.current_thread().name))
    aside(partial(done.append, kept))
    aside(done.clear)
    del kept
    aside(all_done.set)
    assert all_done.wait(SECONDS)
    assert (done, alive()) == ([], None)


def test_a_thread_aside_ends_when_nobody_can_ask_it() -> None:
    (before, aside), done = (set(threading.enumerate()), Aside()), threading.Event()
    (thread,) = set(threading.enumerate()) - before
    aside(done.set)
    del aside
    thread.join(SECONDS)
    assert done.is_set()
    assert not thread.is_alive()


def test_two_engines_share_nothing() -> None:
    one, other = Lender(), Lender()
    at = address(one.blocks.take(1000))
    assert one.blocks.idle_bytes == 1000
    array = other.blocks.take(1000)
    assert address(array) != at
    assert (one.lent_bytes, other.lent_bytes) == (0, 1000)
    # Its memory is not of the pool that is gone.
    del other
    array[:] = 1


@pytest.mark.parametrize("arena_bytes", [0, 2 * PAGE])
def test_a_collection_of_garbage_may_come_at_any_time(arena_bytes: int) -> None:
    """Also while the very thread has the lock."""
    lender = Lender(arena_bytes=arena_bytes)
    arrays = [lender.blocks.take(1000)]

    def work() -> None:
        with lender.blocks._lock:
            arrays.clear()
        assert lender.blocks.idle_bytes == (arena_bytes or 1000)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert lender.lent_bytes == 0


def test_a_collection_may_come_while_the_arena_lends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what comes back is taken in afterwards."""
    lender = Lender(arena_bytes=4 * PAGE)
    arrays, take = [lender.blocks.take(PAGE)], Arena.take

    def collect(arena: Arena, num_bytes: int) -> np.ndarray | None:
        arrays.clear()
        assert arena.idle_bytes == 3 * PAGE
        return take(arena, num_bytes)

    monkeypatch.setattr(Arena, "take", collect)
    held = lender.blocks.take(3 * PAGE)
    assert (lender.num_made, lender.blocks.idle_bytes) == (1, PAGE)
    del held
    assert lender.blocks.idle_bytes == 4 * PAGE


@pytest.mark.parametrize("arena_bytes", [0, 5 * PAGE])
def test_no_two_have_the_same_memory(arena_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_blocks, "_SPARE_BYTES", (1, 1 << 20))
    spares = ThreadPoolExecutor(1)
    max_idle_bytes = 5 * PAGE + arena_bytes
    lender = Lender(max_idle_bytes=max_idle_bytes, arena_bytes=arena_bytes, threads=spares)

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for step in range(200):
            array = lender.blocks.take(int(random.integers(900, 1000))).view(np.uint8)
            mark = (seed * 31 + step) % 251
            array[:] = mark
            held = [array[:500], array[500:]]
            del array
            assert all((part == mark).all() for part in held)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(16)))
    spares.shutdown()
    assert lender.lent_bytes == 0
    assert lender.num_made < 100


def test_what_several_threads_take_at_once_is_all_lent() -> None:
    lender, begin = Lender(), threading.Barrier(4)

    def work(_: int) -> list[np.ndarray]:
        begin.wait(SECONDS)
        return [lender.blocks.take(1000) for _ in range(300)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            held = list(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert lender.lent_bytes == 4 * 300 * 1000
    held.clear()
    assert lender.lent_bytes == 0


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 1200), st.integers(0, 7)), max_size=40),
    st.integers(0, 4000),
    st.integers(0, 6000),
    st.integers(0, 3),
)
def test_whatever_is_taken_and_returned(
    steps: list[tuple[bool, int, int]], max_idle_bytes: int, max_bytes: int, num_pages: int
) -> None:
    arena_bytes = num_pages * PAGE
    max_idle_bytes, max_bytes = max_idle_bytes + arena_bytes, max_bytes + arena_bytes
    lender = Lender(max_idle_bytes=max_idle_bytes, arena_bytes=arena_bytes, max_bytes=max_bytes)
    held: list[tuple[int, np.ndarray]] = []
    for number, (takes, size, which) in enumerate(steps):
        if takes:
            array = lender.blocks.take(size)
            assert (array.shape, array.dtype) == ((size,), np.uint8)
            array[:] = number
            # Only a part of it may be left.
            held.append((number, array[which:]))
            del array
        elif held:
            held.pop(which % len(held))
        assert lender.blocks.idle_bytes <= max_idle_bytes
        assert lender.alive_bytes <= max_bytes
        assert all((part == mark).all() for mark, part in held)
    held.clear()
    assert lender.blocks.idle_bytes <= max_idle_bytes
    assert lender.alive_bytes <= lender.blocks.idle_bytes
    # The arena is one again.
    num_made, whole = lender.num_made, lender.blocks.take(arena_bytes)
    assert len(whole) == arena_bytes
    assert lender.num_made == num_made


_FORK = """
import os, signal
from tests.jaxlora.lender import Lender

lender = Lender()
kept, idle = lender.blocks.take(1000), lender.blocks.take(2000)
kept[:] = 3
keeps_none = Lender(max_idle_bytes=0)
lent = keeps_none.blocks.take(500)
of_arena = Lender(arena_bytes=8192)
part = of_arena.blocks.take(4096)
part[:] = 4
del idle
lender.blocks._lock.acquire()  # As a thread may, which the child lacks.
if child := os.fork():
    lender.blocks._lock.release()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    again = lender.blocks.take(2000)
    is_whole = of_arena.blocks.idle_bytes == 4096 and bool((part == 4).all())
    raise SystemExit(status or lender.num_made != 2 or bool((kept != 3).any()) or not is_whole)
signal.alarm(120)
array = lender.blocks.take(2000)
array[:] = 5
again = lender.blocks.take(2000)
# What the driver pinned is not a child's to free, nor to lend.
is_readable = bool((part == 4).all())
del array, kept, lent, part
other = of_arena.blocks.take(4096)
is_arena = of_arena.blocks._arena.idle_bytes != 4096 or of_arena.num_made != 1
is_arena |= abs(other.ctypes.data - of_arena.blocks._arena._address) < 8192
os._exit(lender.num_made != 2 or keeps_none.alive_bytes != 500 or is_arena or not is_readable)
"""


def test_a_child_has_memory_of_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", _FORK], check=True, timeout=300)


_ENDS = """
from jaxlora.adapters import arena
from tests.jaxlora.lender import Lender

lender = Lender(arena_bytes=1 << 20)
held = lender.blocks.take(1000), lender.blocks.take(2 << 20)
# It is let go of when nothing can be imported any more.
arena.held = held
arena.lender = lender
"""


def test_a_process_ends_while_memory_is_lent() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _ENDS], check=True, timeout=300, capture_output=True, text=True
    )
    assert (ended.stdout, ended.stderr) == ("", "")


def test_nothing_is_taken_back_while_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    lender = Lender(arena_bytes=PAGE)
    array = lender.blocks.take(1000)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "is_finalizing", lambda: True)
        patch.setattr(lender.blocks, "_take_back", None)
        del array
    assert lender.blocks.idle_bytes == PAGE


@pytest.mark.parametrize(("is_pinned", "arena_bytes"), [(False, 0), (True, 0), (True, 20 << 20)])
def test_no_block_comes_back_while_jax_reads_it(
    is_pinned: bool, arena_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is overwritten too early would arrive changed."""
    blocks = Lender().blocks
    if is_pinned:
        FakeDriver(monkeypatch)
        blocks = HostBlocks(PinnedMemory(0), max_idle_bytes=1 << 30, arena_bytes=arena_bytes)
    size = 8 << 20
    arrived, marks = [], range(1, 13)
    for mark in marks:
        # One step beside what JAX may take as it is, so that it copies, on a thread of its own.
        array = blocks.take(size + 4)
        array[:] = mark
        arrived.append(jax.device_put(array[4:]))
        del array
    for mark, there in zip(marks, arrived, strict=True):
        assert (np.asarray(there) == mark).all()
        assert int(jnp.max(there)) == mark


def chosen(platform: str, **changed: Any) -> AdapterMemory:
    device = SimpleNamespace(platform=platform, local_hardware_id=0)
    given = {"max_bytes": 1 << 40, "max_adapters": None, "adapter_bytes": 100_000} | changed
    return choose_memory(device, **given)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_memory_is_ordinary_where_no_gpu_reads_it(platform: str) -> None:
    memory = chosen(platform)
    assert memory.take is ordinary_memory
    assert platform in memory.kind
    memory.wait()


def test_memory_is_ordinary_where_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    memory = chosen("gpu")
    assert memory.take is ordinary_memory
    assert "libcuda.so.1: cannot open" in memory.kind


@pytest.mark.parametrize(
    ("limits", "at_start", "most"),
    [
        # Two and those under way, each of whole pages.
        ({"max_adapters": 2}, 10 * 25 * PAGE, 16),
        ({"max_adapters": 2, "adapter_bytes": 25 * PAGE}, 10 * 25 * PAGE, 16),
        # As many as are thought of where there is no limit.
        ({}, 72 * 25 * PAGE, 16),
        ({"max_adapters": 200}, 16 * MIB, 16),
        ({"adapter_bytes": 5 * MIB}, 16 * MIB, 16),
        ({"max_bytes": 3 * MIB}, 3 * MIB, 3),
        ({"max_bytes": 20 * MIB, "max_adapters": 1, "adapter_bytes": MIB}, 9 * MIB, 16),
    ],
)
def test_memory_is_pinned_for_a_gpu_at_start(
    limits: dict[str, int], at_start: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(monkeypatch)
    monkeypatch.setattr(host_blocks, "MAX_IDLE_BYTES", 16 * MIB)
    memory = chosen("gpu", **limits)
    memory.wait()
    assert list(driver.pinned.values()) == [at_start]
    told = f"pinned, {at_start / MIB:.0f} MiB at start, and up to {most} MiB kept"
    assert memory.kind.startswith(told)
    held = [memory.take(at_start // 2) for _ in range(2)]
    assert driver.num_pinned == 1
    held.append(memory.take(1000))
    assert driver.num_pinned == 2
    # Another engine has others.
    chosen("gpu", **limits).wait()
    assert driver.num_pinned == 3


def test_an_engine_without_such_adapters_pins_nothing_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = FakeDriver(monkeypatch)
    memory = chosen("gpu", adapter_bytes=0)
    memory.wait()
    assert driver.num_pinned == 0
    array = memory.take(1000)
    assert list(driver.pinned.values()) == [len(array)]
