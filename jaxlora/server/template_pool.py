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
    """A few processes, of which adapters with slow templates never have the last."""

    def __init__(self) -> None:
        self._processes = [TemplateProcess() for _ in range(_NUM_PROCESSES)]
        # The one that was used last has compiled what it is given next.
        self._idle: asyncio.LifoQueue[TemplateProcess] = asyncio.LifoQueue()
        for process in self._processes:
            self._idle.put_nowait(process)
        self._for_slow = asyncio.Semaphore(_NUM_PROCESSES - 1)

    def start(self) -> None:
        """Has the processes start, unless they run; whoever needs one before waits for it."""
        for process in self._processes:
            process.start()

    @contextlib.asynccontextmanager
    async def process(self, *, is_slow: bool) -> AsyncIterator[TemplateProcess]:
        """One of them for an adapter, which waits in line with others."""
        async with self._for_slow if is_slow else contextlib.nullcontext():
            process = await self._idle.get()
            try:
                yield process
            finally:
                self._idle.put_nowait(process)

    async def close(self) -> None:
        """Ends the processes, for good, whatever waits for them."""
        await asyncio.gather(*(process.close() for process in self._processes))


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
                # Who has left need not wait, but whoever comes next would.
                await asyncio.wait([rendering])
                self._is_slow = process.seconds > _SLOW_SECONDS
