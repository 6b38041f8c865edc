"""Pieces that several threads work on: order, errors, interruptions, and nobody left at work."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxlora.adapters import pieces
from jaxlora.adapters.pieces import Piece, in_pieces
from tests.jaxlora.patience import SECONDS, wait_until

SIZE = 64
BLOCKS: list[np.ndarray] = [
    np.arange(1000, dtype=np.uint8).astype(np.int16),
    np.arange(7, dtype=np.float32),
]
"""Of 32 pieces, the last of them short, and of one."""
NUM_PIECES = 33


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", SIZE)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)


class Workers:
    """Counts who is at work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.now = self.most = 0
        self.threads: set[int] = set()

    def __enter__(self) -> None:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.threads.add(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.now -= 1


@pytest.mark.parametrize("cores", [None, 1, 2, 4, 16, 256])
def test_each_piece_is_worked_on_once_and_in_order(
    cores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    workers = Workers()
    alone = cores in (None, 1, 2)

    def work(piece: Piece) -> tuple[int, int, bytes]:
        with workers:
            wait_until(lambda: alone or len(workers.threads) >= 2)
            time.sleep(0.0001)
            assert piece.values.dtype == BLOCKS[piece.block].dtype
            return piece.block, piece.at, piece.values.tobytes()

    found = in_pieces([*BLOCKS, np.zeros((0, 3), np.float32)], work)
    assert len(found) == NUM_PIECES
    for number, block in enumerate(BLOCKS):
        mine = [(at, data) for which, at, data in found if which == number]
        assert [at for at, _ in mine] == list(range(0, block.nbytes, SIZE))
        assert b"".join(data for _, data in mine) == block.tobytes()
    # Half the cores, and few of many.
    assert len(workers.threads) <= {4: 2, 16: 8, 256: 8}.get(cores or 1, 1)
    assert (workers.threads == {threading.get_ident()}) is alone


def test_what_is_small_wakes_nobody() -> None:
    found = in_pieces([block[:3] for block in BLOCKS], lambda _: threading.get_ident())
    assert set(found) == {threading.get_ident()}


def test_the_first_piece_that_fails_is_told() -> None:
    workers, later_failed = Workers(), threading.Event()

    def work(piece: Piece) -> None:
        index = piece.at // SIZE
        with workers:
            if index == 3:
                later_failed.wait(SECONDS)
                raise ValueError("piece 3")
            if index == 4:
                later_failed.set()
                raise OSError("piece 4")
            time.sleep(0.001)

    for _ in range(5):
        later_failed.clear()
        with pytest.raises(ValueError, match="piece 3"):
            in_pieces(BLOCKS[:1], work)
        assert workers.now == 0


def test_after_an_error_the_rest_is_left() -> None:
    done = []

    def work(piece: Piece) -> None:
        done.append(piece.at)
        time.sleep(0.01)
        raise MemoryError

    with pytest.raises(MemoryError):
        in_pieces(BLOCKS[:1], work)
    # What was under way when the first failed.
    assert len(done) <= 8
    assert in_pieces(BLOCKS, lambda piece: piece.block).count(0) == NUM_PIECES - 1


@pytest.mark.parametrize("cores", [2, 16])
def test_an_error_keeps_no_array(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)

    def work(piece: Piece) -> None:
        raise ValueError(piece.at)

    array = np.arange(1000)
    alive = weakref.ref(array)
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            in_pieces([array], work)
        del array
        # A thread may still hold what it returned from.
        wait_until(lambda: alive() is None)
        assert alive() is None
    finally:
        gc.enable()


def test_ctrl_c_leaves_nobody_at_work() -> None:
    workers, done, caller = Workers(), [], threading.get_ident()
    begun = threading.Event()

    def work(piece: Piece) -> None:
        with workers:
            done.append(piece.at)
            if threading.get_ident() == caller:
                begun.set()
                signal.raise_signal(signal.SIGINT)
            assert begun.wait(SECONDS)
            time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        in_pieces(BLOCKS[:1], work)
    assert workers.now == 0
    assert len(done) < NUM_PIECES - 1
    num_done = len(done)
    time.sleep(0.2)
    assert len(done) == num_done


def test_ctrl_c_while_it_gets_its_turn_gives_that_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def acquire(self, timeout: float) -> bool:
            has_turn = self.lock.acquire(timeout=timeout)
            signal.raise_signal(signal.SIGINT)
            return has_turn

        def release(self) -> None:
            self.lock.release()

    turn = Interrupting()
    monkeypatch.setattr(pieces, "_turn", turn)
    with pytest.raises(KeyboardInterrupt):
        in_pieces([np.zeros(2 * pieces.PIECE_BYTES, np.uint8)], lambda piece: None)
    assert not turn.lock.locked()


def test_who_waits_for_a_slow_disk_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_TURN_SECONDS", 0.1)
    begun, go_on = threading.Semaphore(0), threading.Event()

    def wait(piece: Piece) -> None:
        begun.release()
        assert go_on.wait(SECONDS)

    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(in_pieces, BLOCKS[:1], wait)
        try:
            # Every thread there is has one of its pieces.
            for _ in range(4):
                assert begun.acquire(timeout=SECONDS)
            assert len(in_pieces(BLOCKS, lambda piece: piece.at)) == NUM_PIECES
            with pytest.raises(ZeroDivisionError):
                in_pieces(BLOCKS, lambda piece: 1 // 0)
            assert not slow.done()
        finally:
            go_on.set()
        assert slow.result(SECONDS) == [None] * (NUM_PIECES - 1)


def test_several_share_the_threads() -> None:
    workers = Workers()

    def work(piece: Piece) -> int:
        with workers:
            time.sleep(0.0005)
            return piece.at

    with ThreadPoolExecutor(6) as callers:
        found = list(callers.map(lambda _: in_pieces(BLOCKS, work), range(24)))
    assert all(each == found[0] for each in found)
    assert workers.most <= 6 + 3


_FORK = """
import os, signal
import numpy as np
from jaxlora.adapters import content, pieces

os.cpu_count = lambda: 8
blocks = [np.zeros(5 * pieces.PIECE_BYTES, np.uint8)]
expected = content.digest("", blocks)
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(120)
os._exit(content.digest("", blocks) != expected)
"""


def test_a_child_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", _FORK], check=True, timeout=300)


_EXIT = """
import os, threading, time
import numpy as np
from jaxlora.adapters import pieces

os.cpu_count = lambda: 8
pieces.PIECE_BYTES = 8
begun = threading.Event()

def work(piece):
    if threading.current_thread() is caller:
        begun.set()
    time.sleep(0.01)

def run():
    print(len(pieces.in_pieces([np.zeros(100)], work)), flush=True)

caller = threading.Thread(target=run)
caller.start()
begun.wait()
"""


def test_a_program_that_ends_meanwhile_waits_for_the_end() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _EXIT], check=True, timeout=300, capture_output=True, text=True
    )
    assert (ended.stdout, ended.stderr) == ("100\n", "")
