"""A server process from its bound port to its last reply."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from jaxlora.async_llm import AsyncLLM
from jaxlora.engine_args import EngineArgs
from jaxlora.server.options import ServerOptions
from jaxlora.server.run import _bind, _Server
from jaxlora.server.state import Phase
from jaxlora.tokenizer import load_tokenizer
from jaxlora.types import LoRARequest
from tests.jaxlora.awaited import awaited
from tests.jaxlora.engine.simulator import PieceTokenizer, make_engine
from tests.jaxlora.limits import LIMITS
from tests.jaxlora.patience import wait_until
from tests.jaxlora.server.processes import ROOT, SECONDS, serving, started
from tests.jaxlora.tiny_tokenizer import encode


def test_a_port_in_use_fails_before_the_model_is_looked_at() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "jaxlora", "serve", "/nowhere/model"]
        done = subprocess.run(
            [*command, "--host", "127.0.0.1", "--port", port],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert done.returncode == 1
    assert "Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_or_a_certificate_that_is_none_ends_the_server(tmp_path: Path) -> None:
    missing, file = str(tmp_path / "missing"), tmp_path / "certificate"
    file.write_text("none")
    for flags, said in (
        (["--enable-lora", "--lora-resolver-dir", missing], f"{missing} is no folder"),
        (["--ssl-certfile", str(file)], f"--ssl-certfile={file} with --ssl-keyfile=None cannot"),
    ):
        command = [sys.executable, "-m", "jaxlora", "serve", "/nowhere", "--port", "0", *flags]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def without_streams(numbers: tuple[int, ...], *command: str) -> list[str]:
    """A command of jaxlora that is started with these closed."""
    argv = [sys.executable, "-m", "jaxlora", *command]
    code = f"import os; [os.close(i) for i in {numbers}]; os.execv({argv[0]!r}, {argv!r})"
    return [sys.executable, "-c", code]


def test_a_server_needs_no_standard_streams(tmp_path: Path) -> None:
    """Without them the first socket had the number of the output."""
    with (tmp_path / "log").open("w") as log:
        command = without_streams((0, 1), "serve", "/nowhere/model", "--port", "0")
        done = subprocess.run(command, cwd=ROOT, stderr=log, check=False, timeout=SECONDS)
    assert done.returncode == 1
    told = (tmp_path / "log").read_text()
    assert "the server cannot start: /nowhere/model" in told
    assert "logging" not in told


def test_nor_does_its_engine(tiny_model: Path, tmp_path: Path) -> None:
    """What writes to one without asking writes nowhere, to no file or socket of the engine's."""
    command = without_streams((0, 1, 2), "serve", str(tiny_model), "--port", "0")
    command[2] = command[2].replace("import os;", "import os; os.environ['JAX_PLATFORMS'] = 'cpu';")
    with started(command, cwd=ROOT) as process:
        server = psutil.Process(process.pid)
        wait_until(server.children)
        (engine,) = server.children()
        numbers = [Path(f"/proc/{engine.pid}/fd/{i}") for i in range(3)]
        wait_until(lambda: "engine_worker" in " ".join(engine.cmdline()))
        assert [str(each.readlink()) for each in numbers] == [os.devnull] * 3


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path, program_cache: Path) -> None:
    with serving("/nowhere/model", tmp_path / "log", program_cache) as server:
        assert server.exit_status() == 1
        told = server.log.read_text()
        assert "the server cannot start: /nowhere/model" in told
        assert "Traceback" not in told


def test_an_adapter_that_is_not_there_ends_the_server_at_once(
    tiny_model: Path, tmp_path: Path, program_cache: Path
) -> None:
    flags = ["--enable-lora", "--lora-modules", "bad=/nowhere/adapter"]
    with serving(tiny_model, tmp_path / "log", program_cache, *flags) as server:
        assert server.exit_status() == 1
        assert "No adapter found for '/nowhere/adapter'" in server.log.read_text()
        assert " programs: " not in server.log.read_text()


def test_an_adapter_that_is_refused_ends_the_server() -> None:
    engine, _ = make_engine(max_loras=2)
    llm = AsyncLLM(engine)
    options = ServerOptions(
        engine_args=EngineArgs(model="base", enable_lora=True),
        lora_modules=(LoRARequest("missing", None, "."),),
    )
    server = _Server(options)
    asyncio.run(server._prepare(llm))
    llm.shutdown()
    assert (server.status, server.should_exit) == (1, True)
    assert server.state.phase is Phase.STARTING


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if messages %}{{ messages[0].content }", "--chat-template, line 1: unexpected '}'"),
        ("{{ raise_exception('no message of that kind') }}", None),
    ],
)
def test_a_template_that_answers_no_chat_ends_the_server(
    tiny_model: Path, template: str, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = make_engine(tokenizer=load_tokenizer(str(tiny_model)))
    llm = AsyncLLM(engine)
    server = _Server(ServerOptions(engine_args=EngineArgs(model="base"), chat_template=template))
    asyncio.run(server._prepare(llm))
    llm.shutdown()
    assert server.status == (said is not None)
    assert said is None or said in caplog.text


def test_ctrl_c_while_the_model_is_loaded_ends_the_server_at_once(
    tiny_model: Path, tmp_path: Path
) -> None:
    # Many shapes, and a cache that has none of them, so that there is something to compile.
    flags = ["--max-num-seqs", "48", "--max-num-batched-tokens", "512"]
    with serving(tiny_model, tmp_path / "log", tmp_path / "programs", *flags) as server:
        server.wait_for(lambda: " programs: decode" in server.log.read_text())
        (engine,) = psutil.Process(server.process.pid).children()
        server.process.send_signal(signal.SIGINT)
        assert server.exit_status() == 128 + signal.SIGINT
        assert "Traceback" not in server.log.read_text()
        assert not engine.is_running()


def test_a_server_ends_with_its_engine(
    tiny_model: Path, tmp_path: Path, program_cache: Path
) -> None:
    with serving(tiny_model, tmp_path / "log", program_cache, *LIMITS) as server:
        server.wait_until_ready()
        body = {"prompt": "hello", "max_tokens": 250, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json=body, timeout=SECONDS
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            (engine,) = psutil.Process(server.process.pid).children()
            engine.kill()
            rest = "".join(lines)
        assert "The engine has stopped." in rest
        assert server.exit_status() == 1
        said = "the engine's process was killed by signal 9 while it served"
        assert said in server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_requests_may_end_after_ctrl_c_but_not_after_a_second_signal(
    tiny_model: Path, tmp_path: Path, program_cache: Path
) -> None:
    (tmp_path / "template").write_text("{{ messages[0].content }}?")
    flags = [*LIMITS, "--chat-template", str(tmp_path / "template")]
    with serving(tiny_model, tmp_path / "log", program_cache, *flags) as server:
        server.wait_until_ready()
        assert "%|" not in server.log.read_text()  # A bar.
        messages = [{"role": "user", "content": "what"}]
        reply = httpx.post(f"{server.url}/tokenize", json={"messages": messages}, timeout=SECONDS)
        assert reply.json()["tokens"] == encode("what?")
        body = {"prompt": ["hello"] * 100, "max_tokens": 250, "ignore_eos": True}
        with ThreadPoolExecutor(1) as pool:
            cut_off = pool.submit(
                httpx.post, f"{server.url}/v1/completions", json=body, timeout=SECONDS
            )
            server.wait_for(lambda: server.get("/load").json() == {"server_load": 100})
            server.process.send_signal(signal.SIGINT)
            drains = "SIGINT: 1 requests have 30 s to finish"
            server.wait_for(lambda: drains in server.log.read_text())
            server.process.send_signal(signal.SIGTERM)
            assert server.exit_status() == 128 + signal.SIGTERM
            assert "Traceback" not in server.log.read_text()
            # Cut off, or told so.
            error = cut_off.exception()
            assert isinstance(error, httpx.TransportError) or cut_off.result().status_code == 503


@awaited
async def test_who_has_not_finished_in_time_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = AsyncLLM(make_engine(tokenizer=PieceTokenizer("a"))[0])
    bound = _bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    server = _Server(ServerOptions(engine_args=EngineArgs(model="base"), shutdown_timeout=0))
    loop, server._llm = asyncio.get_running_loop(), llm

    def load() -> None:
        loop.call_soon_threadsafe(server._spawn, server._prepare(llm))

    server.loading = threading.Thread(target=load)
    running = asyncio.create_task(server.serve([bound]))
    while server.state.phase is not Phase.READY:
        assert not running.done()
        await asyncio.sleep(0.001)
    tokenizer, begun = server.state.served.tokenizer, asyncio.Event()

    async def never(text: str, add_special_tokens: bool = True) -> list[int]:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(tokenizer, "encode_aside", never)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
        reply = asyncio.create_task(client.post("/tokenize", json={"prompt": "x"}))
        await begun.wait()
        server.handle_exit(signal.SIGTERM, None)
        told = await reply
    await running
    assert told.status_code == 503
    assert told.json()["error"]["message"] == "The server is shutting down."
    assert server.status == 1


@pytest.mark.parametrize(
    ("phase", "status"), [(Phase.STARTING, 0), (Phase.DRAINING, 128 + signal.SIGTERM)]
)
def test_a_signal_before_the_server_is_ready_or_a_second_one_waits_for_nobody(
    phase: Phase, status: int
) -> None:
    server = _Server(ServerOptions(engine_args=EngineArgs(model="base")))
    server._loop = asyncio.new_event_loop()
    server.state.phase = phase
    server.handle_exit(signal.SIGTERM, None)
    assert (server.should_exit, server.force_exit) == (True, True)
    assert server.status == status
    server._loop.close()
