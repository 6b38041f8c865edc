"""Rendering of adapters' chat templates, which are programs that may come from anyone.

One operation of theirs can take hours, or all memory, and Python's lock meanwhile. So they run in a
process of their own, whose memory is limited, and which is ended when it takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from jaxlora.errors import RequestError

_SECONDS = 2.0
"""That a template may take."""
_ENDED = {"stopped": "it ended the process it ran in"}
_SCRIPT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from jaxlora.server.template_worker import main; main()"
)


class TemplateProcess:
    """Renders one template at a time, in a process that starts when it is first needed."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "jaxlora-templates")
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self.seconds = 0.0
        """That the last template took."""

    @property
    def is_running(self) -> bool:
        """It need not be started for the next template."""
        return self._process is not None and self._process.poll() is None

    async def start(self) -> None:
        """Has the process start, if it does not run, and waits until it has."""
        if not self._is_closed:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._running)

    async def render(
        self, messages: Sequence[Any], options: Mapping[str, Any], most: int
    ) -> tuple[int, str]:
        """The length of the text of ``messages``, and the text unless that is more than ``most``;
        ``options`` are what :meth:`Tokenizer.apply_chat_template` takes, the template among them.

        Raises RequestError with the template's own message, or if it takes too much time or memory.
        """
        asked = {"messages": messages, "most": most, "options": options}
        run = asyncio.get_running_loop().run_in_executor
        answer = await run(self._thread, self._answer, asked)
        if "stopped" in answer:
            raise RequestError(f"the chat template refuses these messages: {answer['stopped']}")
        if "refused" in answer:
            raise RequestError(answer["refused"])
        return answer["length"], answer["text"]

    async def close(self) -> None:
        """Ends the process, for good, whatever waits for it."""
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._process is not None:
            self._process.kill()
        await asyncio.to_thread(self._thread.shutdown)
        self._end()

    def _answer(self, asked: Any) -> Any:
        data, was_running = json.dumps(asked).encode(), self._process is not None
        answer = self._answer_once(data)
        # What ended it may not have been this template.
        if was_running and answer == _ENDED and not self._is_closed:
            answer = self._answer_once(data)
        return answer

    def _answer_once(self, asked: bytes) -> Any:
        self.seconds = 0.0
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        started = time.monotonic()
        timer = threading.Timer(_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(len(asked).to_bytes(8) + asked)
            process.stdin.flush()
            answer = _frame(process.stdout)
        except (EOFError, BrokenPipeError):
            is_late = time.monotonic() >= started + _SECONDS
            answer = {"stopped": f"it takes more than {_SECONDS:g} s"} if is_late else _ENDED
        finally:
            timer.cancel()
            self.seconds = time.monotonic() - started
        if "stopped" in answer:
            self._end()
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            # What is imported here is imported there, and nothing that lies about. (Not by asyncio:
            # uvloop would fork this process with all its threads.)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SCRIPT, json.dumps([*map(str, sys.path)])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Ctrl-C is for the server, which lets requests finish.
                start_new_session=True,
            )
            assert self._process.stdout is not None
            _frame(self._process.stdout)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            # What was not sent will not be.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _frame(pipe: IO[bytes]) -> Any:
    size = int.from_bytes(pipe.read(8))
    data = pipe.read(size)
    if not 0 < size == len(data):
        raise EOFError("the process that renders chat templates has ended")
    return json.loads(data)
