"""HTTP/1.1 on the wire."""

from __future__ import annotations

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_MAX_HEAD_BYTES = 64 << 10
_MAX_READ_AHEAD = 16
"""Requests of a pipeline: who does not read on does not see that the client has left."""
_TOO_LARGE = f"The headers have more than {_MAX_HEAD_BYTES} bytes."


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol on httptools, with what that has not: a limit on the size of headers, and
    an end of the request that is answered, not of the newest one, when the client leaves."""

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
        super().data_received(data)
        if self._num_read_bytes is not None and not self.transport.is_closing():
            self._num_read_bytes += len(data)
            if self._num_read_bytes > _MAX_HEAD_BYTES:
                self.send_400_response(_TOO_LARGE)

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
        super().on_headers_complete()
        if len(self.pipeline) <= _MAX_READ_AHEAD:
            self.flow.resume_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)
