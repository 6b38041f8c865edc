"""HTTP/1.1 below what clients' libraries show of it: pipelines, offers to upgrade, old versions."""

from __future__ import annotations

import json
import re
import socket
from contextlib import closing
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import httpx
import pytest

from tests.jaxlora.server.processes import SECONDS, Server
from tests.jaxlora.server.test_wire import labels, metrics

JSON = {"Content-Type": "application/json"}
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


def until_the_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    with connection.makefile("rb") as file:
        return file.read()


VERSION = message("GET /version HTTP/1.1")
CLOSE = "Connection: close"
# Of the JDK's client, in each first request.
UPGRADE = {
    "Connection": "Upgrade, HTTP2-Settings",
    "Upgrade": "h2c",
    "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
}
OFFER = tuple(f"{name}: {value}" for name, value in UPGRADE.items())


def statuses(replies: bytes) -> list[int]:
    """Of replies that follow each other."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", replies)]


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


def test_an_offer_to_upgrade_is_ignored(server: Server, http: httpx.Client) -> None:
    body = json.dumps(COMPLETION).encode()
    plain = http.post("/v1/completions", content=body, headers=JSON).json()["choices"]
    with closing(HTTPConnection(server.url.removeprefix("http://"), timeout=SECONDS)) as client:
        # As one piece, then in chunks, and then without an offer.
        for content, offer in ((body, UPGRADE), (iter([body[:9], body[9:]]), UPGRADE), (body, {})):
            client.request("POST", "/v1/completions", content, JSON | offer)
            with client.getresponse() as reply:
                assert reply.status == 200
                assert json.load(reply)["choices"] == plain


def test_a_body_that_comes_long_after_an_offer_to_upgrade_is_waited_for(server: Server) -> None:
    asked = completion(*OFFER, "Expect: 100-continue")
    head, end, body = asked.partition(b"\r\n\r\n")
    with closing(connect(server)) as connection:
        connection.sendall(head + end)
        # The server has the head, and nothing else.
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body[:5])
        connection.sendall(body[5:] + message("GET /version HTTP/1.1", CLOSE))
        assert statuses(until_the_end(connection)) == [200, 200]


def test_offers_to_upgrade_in_a_pipeline_are_ignored(server: Server) -> None:
    chunked = message("POST /ping HTTP/1.1", *OFFER, "Transfer-Encoding: chunked")
    chunked += b"3\r\nabc\r\n0\r\n\r\n"
    bare = message("GET /nothing HTTP/1.1", *OFFER)
    last = message("GET /version HTTP/1.1", "Connection: close, Upgrade", "Upgrade: websocket")
    with closing(connect(server)) as connection:
        connection.sendall(completion(*OFFER) + bare + chunked + VERSION + bare * 500 + last)
        replies = until_the_end(connection)
    assert statuses(replies) == [200, 404, 200, 200, *[404] * 500, 200]


@pytest.mark.parametrize(
    "request_",
    [
        message("POST /ping HTTP/1.1", *OFFER, "Content-Length: x"),
        message("POST /ping HTTP/1.1", *OFFER, "Transfer-Encoding: chunked", body=b"x\r\n"),
        message("CONNECT /ping HTTP/1.1", *OFFER),
        message("CONNECT example.com:443 HTTP/1.1"),
    ],
    ids="length chunk connect connect_elsewhere".split(),
)
def test_what_is_wrong_is_refused_with_an_offer_to_upgrade_too(
    server: Server, request_: bytes
) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(request_)
        assert statuses(until_the_end(connection)) == [400]


def test_a_body_with_an_offer_to_upgrade_may_not_be_too_large(server: Server) -> None:
    chunk = b"%x\r\n" % 1_000_001 + b"x" * 1_000_001
    line = "POST /v1/completions HTTP/1.1"
    with closing(connect(server)) as connection:
        connection.sendall(message(line, *OFFER, "Transfer-Encoding: chunked", body=chunk))
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_to_http_1_0_ends_with_its_connection(server: Server, stream: bool) -> None:
    texts = []
    for version in ("1.0", "1.1"):
        with closing(connect(server)) as connection:
            connection.sendall(completion(CLOSE, version=version, stream=stream))
            with HTTPResponse(connection) as reply:
                reply.begin()
                chunked = reply.getheader("Transfer-Encoding") == "chunked"
                assert chunked is (stream and version == "1.1")
                assert reply.getheader("Connection") == "close"
                body = reply.read().decode()
        assert body.endswith("data: [DONE]\n\n" if stream else "}")
        texts.append("".join(re.findall(r'"text":"((?:[^"\\]|\\.)*)"', body)))
    assert texts[0] == texts[1] != ""
