"""HTTP/1.1 on the wire."""

from __future__ import annotations

from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_MAX_HEAD_BYTES = 64 << 10
_MAX_READ_AHEAD = 16
"""Requests of a pipeline: who does not read on does not see that the client has left."""
_INVALID = "Invalid HTTP request received."
_TOO_LARGE = f"The headers have more than {_MAX_HEAD_BYTES} bytes."


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol on httptools, with what that has not.

    Headers have a limit. A client that leaves ends the request that is answered, not the newest of
    its pipeline. A request that offers to upgrade is answered as if it had not, body and all.
    What is streamed to HTTP/1.0 has no chunks.
    """

    _answered: RequestResponseCycle | None = None
    """Begun last; pipelined ones wait behind it."""
    _num_read_bytes: int | None = None
    """Of headers that are not complete; None if none are being read."""
    _num_header_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        if self._answered is not None:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. A single header may come in many pieces."""
        self._unset_keepalive_if_required()
        rest = data
        try:
            while rest:
                rest = self._parse(rest)
        except httptools.HttpParserError:
            self.logger.warning(_INVALID)
            self.send_400_response(_INVALID)
            return
        if self._num_read_bytes is not None:
            self._num_read_bytes += len(data)
            if self._num_read_bytes > _MAX_HEAD_BYTES:
                self.send_400_response(_TOO_LARGE)

    def _parse(self, data: bytes) -> bytes:
        """Returns what is to be parsed next."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # For the parser the message ended with its head, whatever body that announces.
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            return head + data[upgrade.args[0] :]
        return b""

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)
        headers = [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([line, *headers, b"", b""])

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self._num_read_bytes = self._num_header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools. Many headers may come in one piece."""
        super().on_header(name, value)
        self._num_header_bytes += len(name) + len(value)
        if self._num_header_bytes > _MAX_HEAD_BYTES:
            raise httptools.HttpParserError(_TOO_LARGE)

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._num_read_bytes = None
        if self.parser.get_method() == b"CONNECT":
            # What follows would be no HTTP.
            raise httptools.HttpParserError("this is no proxy")
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        if len(self.pipeline) <= _MAX_READ_AHEAD:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        """See httptools."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        if cycle.scope["http_version"] == "1.0":
            app = _unchunked(app, cycle)
        super()._start_asgi_task(cycle, app)


def _unchunked(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """The application for HTTP/1.0, which has no chunks: a body ends with its connection."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_as_it_is(message: Message) -> None:
            cycle.chunked_encoding = False
            if message["type"] == "http.response.body":
                # Of this piece, as that of all is not known.
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_as_it_is)

    return wrapped
