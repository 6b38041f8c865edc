"""A server's life: bind, load, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import FrameType

import uvicorn
from jinja2 import TemplateSyntaxError
from starlette.types import Receive, Scope, Send

from jaxlora.adapters.folder import AdapterFolder
from jaxlora.adapters.sources import resolve
from jaxlora.errors import ConfigError, JaxloraError, RequestError
from jaxlora.server.app import build_app
from jaxlora.server.engine_process import EngineProcess, ServedLLM
from jaxlora.server.generation import Served
from jaxlora.server.http import BoundedHttp
from jaxlora.server.models import ServedModels
from jaxlora.server.options import ServerOptions
from jaxlora.server.state import Phase, ServerState
from jaxlora.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_BACKLOG = 2048


def serve(options: ServerOptions) -> int:
    """Serves until SIGTERM or SIGINT; returns the process's exit status.

    The port is bound first, so that a wrong one fails before the long load, and /health is answered
    from then on. Raises OSError if it cannot be bound.
    """
    for file in (options.ssl_keyfile, options.ssl_certfile):
        if file is not None:
            # Says which one, if it cannot be read.
            Path(file).read_bytes()
    if options.lora_resolver_dir is not None and not options.lora_resolver_dir.is_dir():
        raise ConfigError(
            f"{options.lora_resolver_dir} is no folder, but given as --lora-resolver-dir or "
            "VLLM_LORA_RESOLVER_CACHE_DIR: create it first"
        )
    try:
        bound = _bind(options.host, options.port)
    except OSError as error:
        where = f"{options.host or '*'}:{options.port}"
        raise OSError(f"cannot listen on {where}: {error}; see --host and --port") from error
    logger.info("listening on %s:%d", *bound.getsockname()[:2])
    server = _Server(options)
    try:
        server.run(sockets=[bound])
    except ssl.SSLError as error:
        raise ConfigError(
            f"--ssl-certfile={options.ssl_certfile} with --ssl-keyfile={options.ssl_keyfile} "
            f"cannot be used: {error}"
        ) from error
    if server.loading.is_alive():
        # It waits for the engine's process, whose memory is to be free when this one has ended.
        logger.warning("stopped while the model was being loaded")
        server.kill_engine()
        logging.shutdown()
        os._exit(server.status)
    return server.status


def _bind(host: str | None, port: int) -> socket.socket:
    family = socket.AF_INET6 if host is not None and ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host or "", port))
        bound.listen(_BACKLOG)
    except OSError:
        bound.close()
        raise
    return bound


class _Server(uvicorn.Server):
    """uvicorn with a load after the start and a drain before the end."""

    def __init__(self, options: ServerOptions) -> None:
        self.state = ServerState(options)
        self.status = 0
        self.loading = threading.Thread(target=self._load, name="jaxlora-load", daemon=True)
        self._options = options
        self._engine: subprocess.Popen[bytes] | None = None
        """The engine's process, from when it is started."""
        self._llm: ServedLLM | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        config = uvicorn.Config(
            _with_start(build_app(self.state), self._start),
            loop="uvloop",
            http=BoundedHttp,
            ws="none",
            lifespan="on",
            backlog=_BACKLOG,
            log_level=options.uvicorn_log_level,
            access_log=False,
            server_header=False,
            root_path=options.root_path,
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: no new requests, the running ones finish. Second, or before the server is
        ready: the end. Then Ctrl-C is told by the status, as in other commands."""
        if self._loop is None or self.state.phase is not Phase.READY:
            if self.state.phase is Phase.DRAINING or sig == signal.SIGINT:
                self.status = 128 + sig
            self.should_exit = self.force_exit = True
            return
        self.state.phase = Phase.DRAINING
        logger.info(
            "%s: %d requests have %.0f s to finish",
            signal.Signals(sig).name,
            self.state.num_open,
            self._options.shutdown_timeout,
        )
        self._loop.call_soon_threadsafe(self._spawn, self._drain())

    async def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.loading.start()

    def _load(self) -> None:
        """On its own thread: minutes of reading and compiling."""
        loop = self._loop
        assert loop is not None
        args = self._options.engine_args
        try:
            # What is not there at all is said before the wait, not after it.
            for request in self._options.lora_modules:
                path, cache = request.lora_path, args.download_dir
                AdapterFolder(resolve(path, download_dir=cache, with_weights=False))
            # A log is no place for bars; and one whose reader has gone stops them for good.
            self._llm = EngineProcess.start(
                args,
                loop,
                use_tqdm=sys.stderr.isatty(),
                begun=self._begun,
                ended=self._engine_ended,
            )
            # All of it stays: to look for garbage in it would hold up all replies.
            gc.collect()
            gc.freeze()
        except Exception as error:  # noqa: BLE001  the server ends with its message
            loop.call_soon_threadsafe(self._fail, error)
        else:
            loop.call_soon_threadsafe(self._spawn, self._prepare(self._llm))

    def _begun(self, engine: subprocess.Popen[bytes]) -> None:
        self._engine = engine

    def kill_engine(self) -> None:
        """Ends the engine's process, if there is one, at once."""
        if self._engine is not None:
            self._engine.kill()
            self._engine.wait()

    def _engine_ended(self) -> None:
        """By itself: whoever watches the server is to start it again."""
        self.status = 1
        self.state.phase = Phase.DRAINING
        self._spawn(self._drain())

    async def _prepare(self, llm: ServedLLM) -> None:
        try:
            if self._options.chat_template is not None:
                _check_template(self._options.chat_template, llm.get_tokenizer())
            models = ServedModels(self._options, llm, self.state.metrics, self.state.templates)
            defaults = await llm.get_default_sampling_params()
            most_tokens = await llm.get_default_max_tokens()
            await models.load_static()
            served = Served(
                options=self._options,
                llm=llm,
                models=models,
                metrics=self.state.metrics,
                tokenizer=llm.get_tokenizer(),
                defaults=defaults,
                most_tokens=most_tokens,
            )
        except Exception as error:  # noqa: BLE001  the server ends with its message
            self._fail(error)
            return
        num_pages, page_size = llm.kv_pages
        self.state.metrics.set_cache(block_size=page_size, num_blocks=num_pages)
        self.state.ready(served)
        logger.info("ready: %s", ", ".join(card["id"] for card in models.cards()))

    def _fail(self, error: Exception) -> None:
        if self.should_exit:
            return  # A signal may have ended the engine as well.
        # Where it came up helps only who did not expect it.
        unexpected = None if isinstance(error, JaxloraError | OSError) else error
        logger.error("the server cannot start: %s", error, exc_info=unexpected)
        self.status = 1
        self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        if not await self.state.drained(self._options.shutdown_timeout):
            logger.warning("%d requests were cut off", self.state.num_open)
            self.status = 1
        # A moment for the last bytes and for balancers to look at /health.
        await asyncio.sleep(0.1)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server; the engine stops first, so that no reply waits for it."""
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)
        await super().shutdown(sockets)
        await self.state.close()
        if self.server_state.tasks and not self.force_exit:
            # They were cancelled, and tell their clients.
            await asyncio.wait(self.server_state.tasks, timeout=1)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check_template(template: str, tokenizer: Tokenizer) -> None:
    """Raises ConfigError for one that no chat could be answered by; it may refuse this one."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], chat_template=template)
    except RequestError as error:
        cause = error.__cause__
        if isinstance(cause, TemplateSyntaxError):
            raise ConfigError(f"--chat-template, line {cause.lineno}: {cause.message}") from error


def _with_start(
    app: Callable[[Scope, Receive, Send], Awaitable[None]], start: Callable[[], Awaitable[None]]
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The application with something to do when its event loop runs."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await receive()
        await start()
        await send({"type": "lifespan.startup.complete"})
        # An end at once is not told here, it cancels this.
        with contextlib.suppress(asyncio.CancelledError):
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    return wrapped
