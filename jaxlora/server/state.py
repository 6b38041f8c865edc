"""Where a server is in its life, and what that means for requests."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Iterator

from jaxlora.errors import EngineDeadError
from jaxlora.server.errors import ApiError
from jaxlora.server.generation import Served
from jaxlora.server.metrics import Metrics
from jaxlora.server.options import ServerOptions
from jaxlora.server.template_pool import TemplatePool


class Phase(enum.Enum):
    """From the bound port to the last reply."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class ServerState:
    """One server: its options, its phase and, once it is ready, its parts."""

    def __init__(self, options: ServerOptions) -> None:
        args = options.engine_args
        self.options = options
        self.phase = Phase.STARTING
        self.metrics = Metrics(
            options.model_names[0], max_loras=args.max_loras if args.enable_lora else None
        )
        self.templates = TemplatePool()
        self.num_open = 0
        """Requests that passed the gate and were read, until the end of their replies."""
        self._served: Served | None = None

    @property
    def served(self) -> Served:
        """The parts. Raises ApiError 503 before there are any."""
        if self._served is None:
            raise _busy("starting")
        return self._served

    @property
    def num_requests(self) -> int:
        """Prompts that are being answered."""
        return 0 if self._served is None else self._served.num_requests

    def ready(self, served: Served) -> None:
        """The server has all it needs."""
        self._served = served
        if self.phase is Phase.STARTING:
            self.phase = Phase.READY

    async def healthy(self) -> bool:
        """Ready, and the engine lives."""
        if self._served is None or self.phase is not Phase.READY:
            return False
        try:
            await self._served.llm.check_health()
        except EngineDeadError:
            return False
        return True

    def closed(self) -> ApiError | None:
        """Why new requests are refused, None if they are not."""
        if self.phase is Phase.DRAINING:
            return _busy("shutting down")
        return _busy("starting") if self._served is None else None

    @contextlib.contextmanager
    def passed(self) -> Iterator[None]:
        """Open from the end of a request's body to that of its reply."""
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    async def close(self) -> None:
        """Ends what runs beside the server."""
        await self.templates.close()

    async def drained(self, timeout: float) -> bool:
        """Waits until no request is open; False if ``timeout`` seconds were not enough."""
        end = asyncio.get_running_loop().time() + timeout
        while self.num_open:
            if asyncio.get_running_loop().time() >= end:
                return False
            await asyncio.sleep(0.02)
        return True


def _busy(doing: str) -> ApiError:
    return ApiError(503, f"The server is {doing}.", headers={"Retry-After": "1"})
