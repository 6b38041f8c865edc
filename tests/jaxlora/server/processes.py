"""Commands and servers in processes of their own, as a user starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 300
"""More than a start takes on a busy machine."""


class Server:
    """A running ``jaxlora serve``, what it logs, and where it listens."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        match = self.wait_for(lambda: re.search(r"listening on \S+:(\d+)", log.read_text()))
        self.url = f"http://127.0.0.1:{match.group(1)}"

    def wait_for(self, condition: Callable[[], T | None]) -> T:
        """Asks until there is an answer; fails if the process ends before."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            answer = condition()
            if answer:
                return answer
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"nothing for {SECONDS} s:\n{self.log.read_text()}")

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self.get("/health").status_code == 200)

    def get(self, path: str) -> httpx.Response:
        """The reply, which may take long while the server starts or the machine is busy."""
        return httpx.get(f"{self.url}{path}", timeout=SECONDS)

    def exit_status(self) -> int:
        return self.process.wait(SECONDS)


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that ends with its test, also if that is interrupted."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def serving(
    model: Path | str,
    log: Path,
    cache: Path,
    *flags: str,
    folder: Path = ROOT,
    **environ: str,
) -> Iterator[Server]:
    """Starts a server in a folder, on a free port, and ends it."""
    command = [sys.executable, "-m", "jaxlora", "serve", str(model), "--port", "0"]
    command += ["--host", "127.0.0.1", "--compilation-cache-dir", str(cache), *flags]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, **environ}
    with (
        log.open("wb") as file,
        started(command, cwd=folder, stdout=file, stderr=file, env=env) as process,
    ):
        yield Server(process, log)
