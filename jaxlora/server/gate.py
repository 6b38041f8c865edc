"""What every request passes first: readiness, keys, body size, its id, and the access log."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxlora.server.auth import Keys
from jaxlora.server.errors import ApiError
from jaxlora.server.generation import REQUEST_ID

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,256}")
_ALWAYS = frozenset("/ /health /ping /version /metrics /load /docs /openapi.json".split())
"""Paths that are answered whatever state the server is in."""


@dataclasses.dataclass(kw_only=True)
class Gate:
    """ASGI middleware around the whole application."""

    app: ASGIApp
    keys: Keys
    max_request_bytes: int
    closed: Callable[[], ApiError | None]
    """Why no request can be served now, None if they can."""
    passed: Callable[[], AbstractContextManager[None]]
    """What is open while a request that could be refused is served, from the end of its body on."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection event."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = _with_root_once(scope)
        # Of several with one name the first counts, as for whoever reads them later.
        headers = dict(reversed(list(scope["headers"])))
        given = headers.get(b"x-request-id", b"")
        kept = scope["headers"]
        if not _REQUEST_ID.fullmatch(given):
            kept = [(name, value) for name, value in kept if name != b"x-request-id"]
            given = uuid.uuid4().hex.encode()
        scope = {**scope, "headers": kept, REQUEST_ID: given.decode()}
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", given)]}
            await send(message)

        try:
            always = self._is_always_answered(scope)
            refusal = None if always else self._refusal(scope, headers)
            if refusal is not None:
                await refusal.response()(scope, receive, send_with_id)
                return
            with ExitStack() as until_answered:

                def read() -> None:
                    # Not before: a client may never send the rest.
                    if not always:
                        until_answered.enter_context(self.passed())

                body = _Limited(receive, self.max_request_bytes, read)
                await self.app(scope, body, send_with_id)
        except asyncio.CancelledError:
            # By uvicorn alone, when the time to finish is over; it would say 500 and no more.
            closed = self.closed()
            if status or closed is None:
                raise
            await closed.response()(scope, receive, send_with_id)
        except Exception:
            # Starlette raises again what it has answered and the handler has logged, at which
            # uvicorn would close the connection under the client's next request.
            if status != HTTPStatus.INTERNAL_SERVER_ERROR:
                raise
            logger.debug("%s was answered before this", given.decode(), exc_info=True)
        finally:
            # The path without its query, and never the body: prompts do not belong in a log.
            logger.log(
                logging.DEBUG if _path(scope) in _ALWAYS else logging.INFO,
                '%s "%s %s" %d %.3f s',
                given.decode(),
                scope["method"],
                scope["path"].encode("unicode_escape").decode(),
                status,
                time.monotonic() - started,
            )

    def _is_always_answered(self, scope: Scope) -> bool:
        return scope["method"] == "OPTIONS" or _path(scope) in _ALWAYS

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiError | None:
        if not self.keys.allow(_path(scope), headers.get(b"authorization", b"")):
            return ApiError(401, "Unauthorized", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_request_bytes:
            return _too_large(self.max_request_bytes)
        return self.closed()


class _Limited:
    """A body that ends with an error once it is too long, whatever its header said; ``read`` is
    called at its end."""

    def __init__(self, receive: Receive, limit: int, read: Callable[[], None]) -> None:
        self._receive, self._limit, self._num_bytes = receive, limit, 0
        self._read = read

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._limit:
                raise _too_large(self._limit)
            if not message.get("more_body", False):
                self._read()
        return message


def _with_root_once(scope: Scope) -> Scope:
    """uvicorn puts the root path before every path, also where a proxy has left it there."""
    root, path = scope.get("root_path", ""), scope["path"]
    if root and path.startswith(f"{root}{root}/"):
        return {**scope, "path": path.removeprefix(root)}
    return scope


def _path(scope: Scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", "")) or "/"


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request's body has more than --max-request-bytes={limit} bytes")
