"""The processes that render adapters' chat templates, shared so that a bad template costs its own
adapter only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from jaxlora.adapters.chat_template import ChatTemplates
from jaxlora.server.template_process import TemplateProcess

_NUM_PROCESSES = 3
_SLOW_SECONDS = 0.25
"""What most templates take a hundredth of."""


class TemplatePool:
    """A few processes, of which adapters whose last template was slow never have the last."""

    def __init__(self) -> None:
        self._processes = [TemplateProcess() for _ in range(_NUM_PROCESSES)]
        self._is_started = False
        # They run. The one that was used last has compiled what it is given next.
        self._idle: asyncio.LifoQueue[TemplateProcess] = asyncio.LifoQueue()
        self._for_slow = asyncio.Semaphore(_NUM_PROCESSES - 1)
        self._starts: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Has the processes start, unless they did; whoever needs one before waits for it."""
        if not self._is_started:
            self._is_started = True
            for process in self._processes:
                self._give_back(process)

    @contextlib.asynccontextmanager
    async def process(self, *, is_slow: bool) -> AsyncIterator[TemplateProcess]:
        """One of them for an adapter, which waits in line with others."""
        async with self._for_slow if is_slow else contextlib.nullcontext():
            process = await self._idle.get()
            try:
                yield process
            finally:
                self._give_back(process)

    async def close(self) -> None:
        """Ends the processes, for good, whatever waits for them."""
        await asyncio.gather(*(process.close() for process in self._processes))
        await asyncio.gather(*self._starts, return_exceptions=True)

    def _give_back(self, process: TemplateProcess) -> None:
        """Makes it one of the idle, as soon as it runs."""
        if process.is_running:
            self._idle.put_nowait(process)
        else:
            task = asyncio.ensure_future(self._start(process))
            self._starts.add(task)
            task.add_done_callback(self._starts.discard)

    async def _start(self, process: TemplateProcess) -> None:
        try:
            # If it cannot be started, it is tried again for the next to need it, who is told.
            with contextlib.suppress(OSError, EOFError):
                await process.start()
        finally:
            self._idle.put_nowait(process)


class AdapterTemplates:
    """The chat templates of one adapter. They are rendered one after the other, so that it stands
    in the line for a process once, however many chats it has."""

    def __init__(self, templates: ChatTemplates, pool: TemplatePool) -> None:
        self._templates, self._pool = templates, pool
        self._turn = asyncio.Lock()
        self._is_slow = False
        """As the last one was."""

    async def render(
        self, messages: Sequence[Any], options: Mapping[str, Any], most: int
    ) -> tuple[int, str]:
        """See :meth:`TemplateProcess.render`; ``options`` have tools and no template."""
        template = self._templates.template_for(options["tools"])
        asked = {"chat_template": template} | dict(options)
        async with self._turn, self._pool.process(is_slow=self._is_slow) as process:
            rendering = asyncio.ensure_future(process.render(messages, asked, most))
            try:
                return await asyncio.shield(rendering)
            finally:
                # It cannot be ended before its time: if who asked has left, it has its process and
                # its adapter's turn nevertheless.
                await asyncio.wait([rendering])
                self._is_slow = process.seconds > _SLOW_SECONDS
