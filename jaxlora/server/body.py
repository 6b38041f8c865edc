"""A request's body as JSON: what it may hold is counted before it is parsed.

A parser holds Python's lock from a body's first byte to its last, and what it makes of many empty
lists takes far more time and memory than their bytes: everybody's streams would wait for seconds.
What it makes of millions of numbers is checked one by one besides.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from jaxlora.server.errors import ApiError

MAX_CONTAINERS = 1 << 16
"""Most lists and objects of a body: of prompts, messages, tools and schemas."""
MAX_COMMAS = 1 << 21
"""Most commas outside of texts: of as many token ids in prompts, which take 0.2 s."""

_LIMITS = (
    (b"[{", MAX_CONTAINERS, "lists and objects"),
    (b",", MAX_COMMAS, "commas outside of texts, as between token ids"),
)


class BoundedRoute(APIRoute):
    """A route whose requests have bodies that are quickly parsed, or are refused (400)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See :class:`fastapi.routing.APIRoute`."""
        handle = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            return await handle(_BoundedRequest(request.scope, request.receive))

        return bounded


class _BoundedRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        for characters, limit, what in _LIMITS:
            # Most bodies have so few that it does not matter whether some are within texts.
            if sum(body.count(each) for each in characters) <= limit:
                continue
            count = await asyncio.to_thread(_num_outside_texts, body, characters)
            if count > limit:
                raise ApiError(400, f"the body has {count} {what}, it may have at most {limit}")
        # No other encoding: what a text is was told by bytes.
        return json.loads(body.decode("utf-8-sig", "surrogatepass"))


def _num_outside_texts(body: bytes, characters: bytes) -> int:
    """How many of these characters, ASCII all, are outside of texts."""
    # From the left, as a parser reads them: a pair of backslashes escapes nothing.
    plain = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    within_text = np.cumsum(plain == ord('"'), dtype=np.uint8) & 1
    outside = plain[within_text == 0]
    return sum(int(np.count_nonzero(outside == each)) for each in characters)
