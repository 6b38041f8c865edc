"""HTTP/1.1 on the wire."""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD_BYTES = 64 << 10
_TOO_LARGE = f"The headers have more than {_MAX_HEAD_BYTES} bytes."


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol on httptools, with what that has not: a limit on the size of headers."""

    _num_read_bytes: int | None = None
    """Of headers that are not complete; None if none are being read."""
    _num_header_bytes = 0

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
