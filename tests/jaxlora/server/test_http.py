"""HTTP/1.1 below what clients' libraries show of it: pipelines, offers to upgrade, old versions."""

from __future__ import annotations

import json
import socket
from contextlib import closing
from typing import Any

import httpx
import pytest

from tests.jaxlora.server.processes import SECONDS, Server
from tests.jaxlora.server.test_wire import labels, metrics

COMPLETION = {"model": "base", "prompt": "hello", "max_tokens": 4, "temperature": 0}


def connect(server: Server) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)


def message(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([line, "Host: x", *headers, "", ""]).encode() + body


def completion(*headers: str, version: str = "1.1", **fields: Any) -> bytes:
    body = json.dumps(COMPLETION | fields).encode()
    given = ("Content-Type: application/json", f"Content-Length: {len(body)}", *headers)
    return message(f"POST /v1/completions HTTP/{version}", *given, body=body)


VERSION = message("GET /version HTTP/1.1")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_a_client_that_pipelines_and_leaves_cancels_what_is_answered(
    server: Server, http: httpx.Client, stream: bool, apart: bool
) -> None:
    def load() -> int:
        return int(http.get("/load").json()["server_load"])

    aborted = ("vllm:request_success_total", labels(finished_reason="abort"))
    before, log = metrics(http), server.log.read_text()
    # Far more than is done before the client leaves, however busy the machine is.
    asked = completion(stream=stream, temperature=1, n=100, max_tokens=250, ignore_eos=True)
    with closing(connect(server)) as connection:
        connection.sendall(asked if apart else asked + VERSION)
        server.wait_for(load)
        if apart:
            connection.sendall(VERSION)
    server.wait_for(lambda: not load())
    assert metrics(http)[aborted] > before.get(aborted, 0)
    assert "Traceback" not in server.log.read_text().removeprefix(log)
