"""The sessions of README.md and docs/server.md, line by line, then the end of that server."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.jaxlora.limits import LIMITS
from tests.jaxlora.peft_models import Reference
from tests.jaxlora.server.processes import ROOT, SECONDS, Server, serving

TEXT = "".join((ROOT / name).read_text() for name in ("README.md", "docs/server.md"))
SESSION = "".join(re.findall(r"^```console\n(.*?)^```", TEXT, re.M | re.S))
COMMANDS = [
    (command.replace("\\\n", ""), output)
    for command, output in re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", SESSION, re.M)
]


@pytest.fixture(scope="module")
def server(
    tiny_model: Path,
    reference: Reference,
    tmp_path_factory: pytest.TempPathFactory,
    program_cache: Path,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("documented")
    for name, kind in (("sql", "r8-qv"), ("pirate", "r1-all")):
        shutil.copytree(reference.paths[kind], folder / "adapters" / name)
    flags = ["--served-model-name", "base", "--lora-modules", "sql=adapters/sql"]
    flags += ["--shutdown-timeout", str(SECONDS)]
    updating = {"JAXLORA_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serving(
        tiny_model, folder / "log", program_cache, *LIMITS, *flags, folder=folder, **updating
    ) as running:
        assert running.get("/health").status_code == 503
        running.wait_until_ready()
        yield running


def curl(url: str, command: str) -> str:
    """What a curl command of the session prints."""
    program, *arguments = shlex.split(command)
    assert program == "curl"
    headers, body, address = {}, None, ""
    while arguments:
        argument = arguments.pop(0)
        if argument == "-H":
            name, _, value = arguments.pop(0).partition(": ")
            headers[name] = value
        elif argument == "-d":
            body = arguments.pop(0)
        elif argument != "-N":
            address = argument.replace("localhost:8000", url)
    method = "GET" if body is None else "POST"
    return httpx.request(method, address, content=body, headers=headers, timeout=SECONDS).text


def test_the_session(server: Server) -> None:
    assert len(COMMANDS) == 9
    for command, expected in COMMANDS:
        printed = curl(server.url, command).rstrip("\n") + "\n"
        pattern = re.escape(expected.replace("...", "\0")).replace("\0", ".*")
        assert re.fullmatch(pattern, printed, re.S), f"{command}\n{printed}"


def test_sigterm_lets_running_requests_finish(server: Server) -> None:
    """The server's last test."""
    body = {"model": "sql", "prompt": "hello", "max_tokens": 160, "ignore_eos": True}
    replies: list[Any] = []

    def ask() -> None:
        # They take seconds, in which all that is asked below is answered.
        many = body | {"prompt": ["hello"] * 72}
        replies.append(
            httpx.post(f"{server.url}/v1/completions", json=many, timeout=SECONDS).json()
        )

    thread = threading.Thread(target=ask)
    thread.start()
    # Over one connection, so that it is there when the server drains.
    with httpx.Client(base_url=server.url, timeout=SECONDS) as http:
        while http.get("/load").json() == {"server_load": 0}:
            time.sleep(0.001)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: re.search("SIGTERM: 1 requests", server.log.read_text()))
        assert http.post("/v1/completions", json=body).status_code == 503
        assert http.get("/health").status_code == 503
    assert server.exit_status() == 0
    thread.join()
    (reply,) = replies
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["length"] * 72
