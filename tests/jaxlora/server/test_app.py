"""The application over a simulated engine: keys, limits, states, resolvers, allowed places."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from jaxlora.adapters.adapter import Adapter
from jaxlora.async_llm import AsyncLLM
from jaxlora.engine.engine import LLMEngine
from jaxlora.engine.scheduler import Plan
from jaxlora.engine_args import EngineArgs
from jaxlora.errors import (
    AdapterError,
    AdapterNotFoundError,
    AdapterRefusedError,
    GenerationError,
)
from jaxlora.outputs import RequestOutput
from jaxlora.server.app import build_app
from jaxlora.server.auth import Keys
from jaxlora.server.generation import Served
from jaxlora.server.models import ServedModels
from jaxlora.server.options import ServerOptions
from jaxlora.server.resolvers import DirectoryResolver, HubResolver
from jaxlora.server.state import Phase, ServerState
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import LoRARequest, SamplingParams
from tests.jaxlora.awaited import awaited
from tests.jaxlora.engine.simulator import Device, PieceTokenizer, make_adapter, make_engine
from tests.jaxlora.patience import SECONDS, wait_until

PROMPT = {"prompt": [1, 2], "temperature": 0, "max_tokens": 4, "ignore_eos": True}
COMPLETIONS = {
    "type": "http",
    "method": "POST",
    "path": "/v1/completions",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}


class Fixture:
    """An application that is ready unless told otherwise."""

    def __init__(self, engine: LLMEngine, device: Device, options: ServerOptions) -> None:
        self.engine, self.device = engine, device
        self.state = ServerState(options)
        self.llm = AsyncLLM(engine)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(build_app(self.state)),
            base_url="http://test",
            timeout=60,
        )

    def make_ready(self) -> None:
        options, metrics = self.state.options, self.state.metrics
        self.state.ready(
            Served(
                options=options,
                llm=self.llm,
                models=ServedModels(options, self.llm, metrics, self.state.templates),
                metrics=metrics,
                tokenizer=self.llm.get_tokenizer(),
                defaults=SamplingParams(),
            )
        )

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json=PROMPT | fields)

    async def load(self, name: str, path: str | Path, **fields: Any) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(path)} | fields
        return await self.client.post("/v1/load_lora_adapter", json=body)


@asynccontextmanager
async def app(
    *,
    ready: bool = True,
    load: Callable[[LoRARequest], Adapter] | None = None,
    **options: Any,
) -> AsyncIterator[Fixture]:
    tokenizer = PieceTokenizer(*"abcdefghijklmno")
    engine, device = make_engine(max_loras=2, max_model_len=512, num_pages=512, tokenizer=tokenizer)
    if load is not None:
        engine.adapters.reader._load = load
    options = {
        "engine_args": EngineArgs(model="base", enable_lora=True),
        "allow_runtime_lora_updating": True,
    } | options
    fixture = Fixture(engine, device, ServerOptions(**options))
    if ready:
        fixture.make_ready()
    try:
        async with fixture.client:
            yield fixture
    finally:
        fixture.llm.shutdown()
        await fixture.state.close()


def hold_steps(device: Device) -> threading.Event:
    """Makes every step wait for the event."""
    gate = threading.Event()

    def wait(plan: Plan) -> None:
        assert gate.wait(SECONDS)

    device.fail = wait
    return gate


def adapter_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


# Keys


@pytest.mark.parametrize(
    ("api", "admin", "path", "header", "allowed"),
    [
        ((), None, "/v1/models", "", True),
        (("a",), None, "/v1/models", "", False),
        (("a",), None, "/v1/models", "Bearer a", True),
        (("a",), None, "/v1/models", "bearer a", True),
        (("a",), None, "/v1/models", "Basic a", False),
        (("a",), None, "/v1/models", "a", False),
        (("a", "b"), None, "/v1/models", "Bearer b", True),
        (("a",), None, "/v1/models", "Bearer aa", False),
        (("a",), None, "/tokenize", "", True),
        (("a",), None, "/load_lora_adapter", "", False),
        (("a",), None, "/v1/load_lora_adapter", "Bearer a", True),
        (("a",), "x", "/v1/load_lora_adapter", "Bearer a", False),
        (("a",), "x", "/load_lora_adapter", "Bearer x", True),
        (("a",), "x", "/v1/models", "Bearer x", False),
        ((), "x", "/unload_lora_adapter", "", False),
        ((), "x", "/v1/models", "", True),
    ],
)
def test_keys(
    api: tuple[str, ...], admin: str | None, path: str, header: str, allowed: bool
) -> None:
    assert Keys(api, admin).allow(path, header.encode()) is allowed


@awaited
async def test_a_request_without_the_key_is_refused() -> None:
    async with app(api_keys=("secret",), admin_api_key="boss") as each:
        reply = await each.complete()
        assert (reply.status_code, reply.json()["error"]["type"]) == (401, "UnauthorizedError")
        each.client.headers["Authorization"] = "Bearer secret"
        assert (await each.complete()).status_code == 200
        assert (await each.load("x", "/nowhere/x")).status_code == 401
        each.client.headers["Authorization"] = "Bearer boss"
        assert (await each.load("x", "/nowhere/x")).status_code == 404
        assert (await each.client.get("/health")).status_code == 200


# Limits and states


@awaited
async def test_another_method_is_told_which_there_is() -> None:
    # What a proxy has in front of the paths is uvicorn's business, and no reason to warn.
    async with app(root_path="/proxied") as each:
        reply = await each.client.get("/v1/completions")
        assert (reply.status_code, reply.headers["allow"]) == (405, "POST")


@awaited
async def test_a_proxy_may_leave_its_prefix_in_the_path_or_take_it_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "jaxlora.server.gate")
    async with app(root_path="/llm", api_keys=("secret",)) as each:
        # As uvicorn has it, which puts the prefix before every path.
        transport = httpx.ASGITransport(build_app(each.state), root_path="/llm")
        key = {"Authorization": "Bearer secret"}
        for left in ("", "/llm"):
            base = f"http://test/llm{left}"
            async with httpx.AsyncClient(transport=transport, base_url=base) as client:
                assert (await client.get("/health")).status_code == 200
                assert (await client.get("/v1/models")).status_code == 401
                assert (await client.get("/v1/models", headers=key)).status_code == 200
    # Probes and scrapes come every few seconds, and are not logged.
    assert "/v1/models" in caplog.text
    assert "/health" not in caplog.text


@awaited
async def test_more_prompts_than_may_ever_be_queued_are_refused_for_good() -> None:
    async with app(max_queued_requests=3) as each:
        for stream in (False, True):
            reply = await each.complete(prompt=[[1]] * 4, stream=stream)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")
            assert "--max-queued-requests=3" in reply.json()["error"]["message"]
        assert (await each.complete(prompt=[[1]] * 3)).status_code == 200


@pytest.mark.parametrize(
    ("max_logprobs", "n", "message"),
    [
        (5, 3, "n=3 must be at most 2 with use_beam_search: ask for fewer, or start the server "),
        (1, 1, "n=1 must be at most 0 with use_beam_search: ask for fewer, or start the server "),
        (30, 11, "n=11 must be at most 10 with use_beam_search: ask for fewer"),
        (-1, 11, "n=11 must be at most 10 with use_beam_search: ask for fewer"),
    ],
)
@awaited
async def test_of_too_many_beams_n_is_named(max_logprobs: int, n: int, message: str) -> None:
    args = EngineArgs(model="base", max_logprobs=max_logprobs)
    async with app(engine_args=args) as each:
        reply = await each.complete(n=n, use_beam_search=True)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "n")
    assert error["message"].startswith(message)


@awaited
async def test_a_full_queue_says_when_to_come_back() -> None:
    async with app(max_queued_requests=3) as each:
        gate = hold_steps(each.device)
        first = asyncio.create_task(each.complete(prompt=[[1], [2]]))
        while each.state.num_requests < 2:
            await asyncio.sleep(0.001)
        for stream in (False, True):
            reply = await each.complete(prompt=[[1], [2]], stream=stream)
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
            assert reply.json()["error"]["type"] == "RateLimitError"
        last = asyncio.create_task(each.complete())
        while each.state.num_requests < 3:
            await asyncio.sleep(0.001)
        assert (await each.complete()).status_code == 429
        gate.set()
        assert [(await task).status_code for task in (first, last)] == [200, 200]
        assert each.state.num_requests == 0
        assert (await each.complete()).status_code == 200


@awaited
async def test_before_it_is_ready_a_server_says_so() -> None:
    async with app(ready=False) as each:
        assert (await each.client.get("/health")).status_code == 503
        assert (await each.client.get("/version")).status_code == 200
        assert (await each.client.get("/metrics")).status_code == 200
        reply = await each.complete()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, 503)
        each.make_ready()
        assert (await each.client.get("/health")).status_code == 200
        assert (await each.complete()).status_code == 200


async def waits_until_it_has_ended(
    each: Fixture, gate: threading.Event | asyncio.Event, running: asyncio.Task[httpx.Response]
) -> None:
    """A server that drains waits for what the gate holds back, and lets it end."""
    assert await each.state.drained(0.05) is False
    gate.set()
    assert await each.state.drained(SECONDS) is True
    assert (await running).status_code == 200


@awaited
async def test_a_server_that_drains_finishes_what_runs() -> None:
    async with app() as each:
        gate = hold_steps(each.device)
        running = asyncio.create_task(each.complete())
        while not each.state.num_requests:
            await asyncio.sleep(0.001)
        each.state.phase = Phase.DRAINING
        assert (await each.complete()).status_code == 503
        assert (await each.client.get("/health")).status_code == 503
        await waits_until_it_has_ended(each, gate, running)


@awaited
async def test_a_server_that_drains_waits_for_requests_that_do_not_generate_yet() -> None:
    async with app() as each:
        tokenizer, gate, begun = each.state.served.tokenizer, asyncio.Event(), asyncio.Event()

        async def wait(text: str, add_special_tokens: bool = True) -> list[int]:
            begun.set()
            await gate.wait()
            return [1, 2]

        tokenizer.encode_aside = wait  # type: ignore[method-assign]
        for path in ("/v1/completions", "/tokenize"):
            each.state.phase = Phase.READY
            begun.clear()
            gate.clear()
            body = PROMPT | {"prompt": "ab"}
            running = asyncio.create_task(each.client.post(path, json=body))
            await begun.wait()
            each.state.phase = Phase.DRAINING
            assert (await each.client.get("/load")).json() == {"server_load": 0}
            await waits_until_it_has_ended(each, gate, running)


@awaited
async def test_a_server_that_drains_does_not_wait_for_a_body_that_does_not_end() -> None:
    async with app() as each:
        asked = asyncio.Event()

        async def receive() -> Any:
            if asked.is_set():
                await asyncio.Event().wait()
            asked.set()
            return {"type": "http.request", "body": b"{", "more_body": True}

        async def send(message: Any) -> None:
            raise AssertionError(message)

        request = asyncio.create_task(build_app(each.state)(COMPLETIONS, receive, send))
        await asked.wait()
        assert await each.state.drained(0) is True
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


@awaited
async def test_a_dead_engine_is_seen_by_health_and_by_every_request() -> None:
    async with app() as each:

        def fail(plan: Plan) -> None:
            if len(each.device.plans) == 2:
                raise RuntimeError("secret of the host")

        each.device.fail = fail
        whole, stream = await asyncio.gather(each.complete(), each.complete(stream=True))
        assert whole.status_code == 503
        assert whole.json()["error"]["message"] == "The engine has stopped."
        # Its first token was sent, so the error is an event.
        assert stream.status_code in (200, 503)
        if stream.status_code == 200:
            assert '"The engine has stopped."' in stream.text
            assert stream.text.endswith("data: [DONE]\n\n")
        assert (await each.complete()).status_code == 503
        assert (await each.client.get("/health")).status_code == 503
        metrics = await each.client.get("/metrics")
        assert metrics.status_code == 200
        assert "secret" not in whole.text + stream.text + metrics.text


@awaited
async def test_an_unforeseen_error_is_told_without_its_message() -> None:
    async with app() as each:

        def broken(text: str, add_special_tokens: bool = True) -> list[int]:
            raise KeyError("secret of the host")

        each.state.served.tokenizer.encode = broken  # type: ignore[method-assign]
        reply = await each.complete(prompt="abc")
        assert reply.status_code == 500
        assert reply.json()["error"]["message"] == "Internal server error"


# Texts


@awaited
async def test_a_bos_that_was_added_to_a_text_is_not_repeated() -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={"a": 0, "b": 1, "c": 2, "<s>": 3}, merges=[])
    )
    backend.add_special_tokens(["<s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    backend.decoder = tokenizers.decoders.Fuse()
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    async with app() as each:
        each.state.served.tokenizer = Tokenizer(hf)
        for count, side, add, text in (
            (9, "left", True, "a<s>bc"),
            (4, "right", True, "a<s>b"),
            (4, "left", True, "a<s>bc"),
            (3, "left", True, "<s>bc"),
            (3, "right", False, "a<s>b"),
        ):
            cut = {"truncate_prompt_tokens": count, "truncation_side": side}
            reply = await each.complete(
                prompt="a<s>bc", echo=True, max_tokens=0, add_special_tokens=add, **cut
            )
            assert reply.json()["choices"][0]["text"] == text
        # Whoever gives it as an id gets it back.
        reply = await each.complete(prompt=[3, 0, 3], echo=True, max_tokens=0)
        assert reply.json()["choices"][0]["text"] == "<s>a<s>"


# Resolvers


def refuse(request: LoRARequest) -> Adapter:
    if "bad" in request.lora_name:
        raise AdapterRefusedError(f"bad weights in {Path(request.lora_path).resolve()}")
    if "missing" in request.lora_name:
        raise AdapterNotFoundError("No adapter found")
    return make_adapter(request.lora_name)


@awaited
async def test_an_unknown_model_is_resolved_once(tmp_path: Path) -> None:
    for name in ("found", "bad", "missing"):
        adapter_folder(tmp_path / "root" / name)
    adapter_folder(tmp_path / "outside")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    loads: list[str] = []

    def load(request: LoRARequest) -> Adapter:
        loads.append(request.lora_name)
        return refuse(request)

    async with app(lora_resolver_dir=tmp_path / "root", load=load) as each:
        replies = await asyncio.gather(*(each.complete(model="found") for _ in range(5)))
        assert [reply.status_code for reply in replies] == [200] * 5
        assert loads == ["found"]
        cards = (await each.client.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["base", "found"]
        reply = await each.complete(model="bad")
        assert reply.status_code == 400
        assert "was found but is refused: bad weights" in reply.json()["error"]["message"]
        for name in ("nobody", "missing", "../outside", "link", ".", "..", "", "a/b", "a\0"):
            assert (await each.complete(model=name)).status_code == 404, name


@awaited
async def test_resolvers_find_names_and_nothing_else(tmp_path: Path) -> None:
    adapter_folder(tmp_path / "a")
    directory, hub = DirectoryResolver(tmp_path), HubResolver(["org/*-lora", "me/one"])
    assert await directory.resolve_lora("base", "a") == LoRARequest(
        "a", None, str(tmp_path.resolve() / "a")
    )
    for name in ("b", "../a", "/a", "a/", ".a", "a" * 200):
        assert await directory.resolve_lora("base", name) is None, name
    for name, found in (("org/x-lora", True), ("me/one", True), ("org/x", False)):
        assert (await hub.resolve_lora("base", name) is not None) is found
    for name in ("org/../x-lora", "org/a/b-lora", "x-lora", "/org/x-lora", "org/.-lora"):
        assert await hub.resolve_lora("base", name) is None, name


@awaited
async def test_a_resolver_of_one_s_own_is_asked_after_the_others(tmp_path: Path) -> None:
    adapter_folder(tmp_path / "root" / "here")
    adapter_folder(tmp_path / "elsewhere")
    asked: list[tuple[str, str]] = []

    class Own:
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            asked.append((base_model_name, lora_name))
            known = lora_name == "there"
            return LoRARequest("there", None, str(tmp_path / "elsewhere")) if known else None

    places: dict[str, Any] = {
        "lora_resolver_dir": tmp_path / "root",
        "lora_resolvers": (Own(),),
    }
    async with app(load=refuse, **places) as each:
        for name, status in (("here", 200), ("there", 200), ("nowhere", 404)):
            assert (await each.complete(model=name)).status_code == status
        assert asked == [("base", "there"), ("base", "nowhere")]


@pytest.mark.parametrize("name", ["alias", "other", "base"])
@awaited
async def test_what_a_resolver_finds_is_called_as_it_was_asked_for(
    tmp_path: Path, name: str
) -> None:
    """Also if that is a base model's name; and it need not be in a folder."""
    path = str(adapter_folder(tmp_path / "x"))

    class Own:
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            if lora_name == "made":
                return LoRARequest.from_tensors(name, {"content": "x"}, {})
            return LoRARequest(name, None, path) if lora_name == "alias" else None

    async with app(lora_resolvers=(Own(),)) as each:
        before = (await each.client.get("/v1/models/base")).json()
        for asked in ("alias", "made", "alias"):
            reply = (await each.complete(model=asked)).json()
            assert reply["model"] == asked
            assert reply["choices"][0]["text"] != ""
        assert (await each.complete(model="other")).status_code == 404
        loaded = [lora.lora_name for lora in await each.llm.describe_loras()]
        assert loaded == ["alias", "made"]
        cards = (await each.client.get("/v1/models")).json()["data"]
        assert cards[0] == before
        assert [card["id"] for card in cards] == ["base", "alias", "made"]


@awaited
async def test_one_base_name_may_begin_another(tmp_path: Path) -> None:
    async with app(served_model_names=("llama", "llama:8b")) as each:
        for name in ("sql", "8b:code"):
            assert (await each.load(name, adapter_folder(tmp_path / name))).status_code == 200
        for asked, status in (
            ("llama:sql", 200),
            ("llama:8b:sql", 200),
            ("llama:8b:code", 200),
            ("llama:8b:8b:code", 200),
            ("llama:code", 404),
            ("llama:8b:x", 404),
        ):
            assert (await each.complete(model=asked)).status_code == status, asked
            assert (await each.client.get(f"/v1/models/{asked}")).status_code == status, asked


@awaited
async def test_an_adapter_s_own_name_may_begin_like_one_of_the_base_s(tmp_path: Path) -> None:
    path = str(adapter_folder(tmp_path / "x"))
    asked: list[str] = []

    class Own:
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            asked.append(lora_name)
            known = lora_name in ("base:found", "both", "base:both")
            return LoRARequest(lora_name, None, path) if known else None

    async with app(lora_resolvers=(Own(),)) as each:
        assert (await each.load("base:loaded", path)).status_code == 200
        for name, status in (("loaded", 200), ("found", 200), ("both", 200), ("no", 404)):
            for _ in range(2):
                assert (await each.complete(model=f"base:{name}")).status_code == status
                assert (await each.client.get(f"/v1/models/base:{name}")).status_code == status
        missing = ["no", "base:no"] * 2
        assert asked == ["found", "base:found", "both", *missing]


@awaited
async def test_names_that_are_no_unicode_are_listed(tmp_path: Path) -> None:
    path = adapter_folder(tmp_path / "x")
    async with app() as each:
        body = json.dumps({"lora_name": "x", "lora_path": str(path), "base_model_name": "\ud800"})
        headers = {"content-type": "application/json"}
        reply = await each.client.post("/v1/load_lora_adapter", content=body, headers=headers)
        assert reply.status_code == 200
        for place in ("/v1/models", "/v1/models/x"):
            reply = await each.client.get(place)
            assert reply.status_code == 200
        assert reply.json()["parent"] == "\\ud800"


@awaited
async def test_tensors_that_a_resolver_gave_are_not_kept_beside_the_adapter() -> None:
    given: list[weakref.ref[Any]] = []

    class Own:
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            made = LoRARequest.from_tensors(lora_name, {"content": "x"}, {})
            given.append(weakref.ref(made.tensors))
            return made

    def are_gone() -> bool:
        gc.collect()
        return all(tensors() is None for tensors in given)

    async with app(lora_resolvers=(Own(),)) as each:
        assert (await each.complete(model="made")).status_code == 200
        # A thread may still return from what read them.
        await asyncio.to_thread(wait_until, are_gone, 60)
        assert [tensors() for tensors in given] == [None]


# Readers that leave, and slow ones


@awaited
async def test_long_prompts_hold_up_nothing_else_and_only_until_their_clients_leave() -> None:
    async with app() as each:
        tokenizer, gate, left = each.state.served.tokenizer, threading.Event(), asyncio.Event()
        begun: list[str] = []

        def encode(text: str, add_special_tokens: bool = True) -> list[int]:
            begun.append(text)
            assert gate.wait(SECONDS)
            return [1, 2]

        tokenizer.encode = encode  # type: ignore[method-assign]
        long = {"prompt": "a" * 5000, "truncate_prompt_tokens": 5}
        statuses: list[int] = []

        async def ask(path: str) -> None:
            messages = iter([{"type": "http.request", "body": json.dumps(PROMPT | long).encode()}])

            async def receive() -> Any:
                message = next(messages, None)
                if message is None:
                    await left.wait()
                return message or {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            await build_app(each.state)(COMPLETIONS | {"path": path}, receive, send)

        # More than there are threads, of whichever kind.
        paths = ["/v1/completions", "/tokenize"] * 99
        asked = [asyncio.create_task(ask(path)) for path in paths]
        while not begun:
            await asyncio.sleep(0.001)
        assert (await each.client.get("/metrics")).status_code == 200
        assert (await each.complete()).status_code == 200
        num_begun = len(begun)
        assert num_begun < 99
        left.set()
        await asyncio.gather(*asked)
        assert statuses == [499] * len(paths)
        gate.set()
        assert (await each.client.post("/tokenize", json=long)).json()["count"] == 2
        assert len(begun) == num_begun + 1


@awaited
async def test_a_client_that_leaves_is_no_error_of_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with app() as each:
        gate = hold_steps(each.device)
        body = json.dumps(PROMPT).encode()
        messages = iter([{"type": "http.request", "body": body}])
        sent: list[Any] = []

        async def receive() -> Any:
            return next(messages, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            sent.append(message)

        await build_app(each.state)(COMPLETIONS, receive, send)
        assert sent[0]["status"] == 499
        assert each.state.num_requests == 0
        gate.set()
        while each.engine.has_unfinished_requests():
            await asyncio.sleep(0.001)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert '"POST /v1/completions" 499' in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@awaited
async def test_who_leaves_before_the_first_token_is_counted(stream: bool) -> None:
    async with app() as each:
        gate = hold_steps(each.device)
        body = json.dumps(PROMPT | {"stream": stream, "n": 2, "temperature": 1}).encode()
        messages = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            for message in messages:
                return message
            while not each.engine.has_unfinished_requests():
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            assert message.get("status", 499) == 499

        await build_app(each.state)(COMPLETIONS, receive, send)
        gate.set()
        labels = '{adapter="",finished_reason="abort",model_name="base"}'
        text = (await each.client.get("/metrics")).text
        assert f"jaxlora:requests_total{labels} 2.0" in text
        assert 'vllm:request_success_total{finished_reason="abort",model_name="base"} 2' in text


@pytest.mark.parametrize("error", [GenerationError, AdapterError])
@pytest.mark.parametrize("stream", [False, True])
@awaited
async def test_what_ends_in_an_error_is_counted_so(
    stream: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is anything to show, and after."""
    async with app() as each:
        generate = each.llm.generate

        async def fail(*args: Any, **kwargs: Any) -> AsyncIterator[RequestOutput]:
            async for output in generate(*args, **kwargs):
                if stream:
                    for completion in output.outputs:
                        completion.finish_reason = None
                    yield output
                raise error("no number")

        monkeypatch.setattr(each.llm, "generate", fail)
        reply = await each.complete(stream=stream, n=2, temperature=1)
        assert '"message":"no number"' in reply.text
        page = (await each.client.get("/metrics")).text
        counts = [line for line in page.splitlines() if line.startswith("vllm:request_success_t")]
        assert counts == [
            'vllm:request_success_total{finished_reason="error",model_name="base"} 2.0'
        ]


@awaited
async def test_a_reader_that_stops_holds_nobody_and_misses_nothing() -> None:
    """The engine goes on; what the reader has not taken is joined into one piece."""
    async with app() as each:
        body = json.dumps(PROMPT | {"max_tokens": 400, "stream": True}).encode()
        requests = iter([{"type": "http.request", "body": body}])
        done, reads = asyncio.Event(), asyncio.Event()
        parts: list[bytes] = []

        async def receive() -> Any:
            message = next(requests, None)
            if message is None:
                await done.wait()
            return message or {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if parts:
                await reads.wait()
            parts.extend([message["body"]] if message.get("body") else [])

        reader = asyncio.create_task(build_app(each.state)(COMPLETIONS, receive, send))
        while not parts:
            await asyncio.sleep(0.001)
        while (await each.llm.get_metrics())["vllm:num_requests_running"]:
            assert (await each.complete()).status_code == 200
        assert len(parts) == 1
        reads.set()
        await reader
        # What was on its way to the reader, then all the rest at once.
        assert len(parts) <= 5
        chunks = [json.loads(part[6:]) for part in parts[:-1]]
        whole = (await each.complete(max_tokens=400)).json()["choices"][0]["text"]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
        assert parts[-1].endswith(b"data: [DONE]\n\n")
        assert each.state.num_requests == 0


# Adapters that go


@pytest.mark.parametrize("stream", [False, True])
@awaited
async def test_what_is_unloaded_while_a_request_is_tokenized_stays_so(
    stream: bool, tmp_path: Path
) -> None:
    loads: list[str] = []

    def load(request: LoRARequest) -> Adapter:
        loads.append(request.lora_path)
        if not request.lora_path:
            raise AdapterNotFoundError("No adapter found")
        return make_adapter(request.lora_name)

    async with app(load=load) as each:
        path = str(adapter_folder(tmp_path / "x"))
        assert (await each.load("x", path)).status_code == 200

        async def slow(text: str, add_special_tokens: bool = True) -> list[int]:
            reply = await each.client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
            assert reply.status_code == 200
            return [1, 2]

        each.state.served.tokenizer.encode_aside = slow  # type: ignore[method-assign]
        reply = await each.complete(model="x", prompt="ab", stream=stream)
        assert reply.status_code == 404
        assert reply.json()["error"]["message"] == "The model `x` does not exist."
        assert await each.llm.list_loras() == set()
        other = str(adapter_folder(tmp_path / "other"))
        assert (await each.load("x", other)).status_code == 200
        assert loads == [path, "", other]
        assert (await each.complete(model="x")).status_code == 200
        assert each.state.num_requests == 0


@awaited
async def test_what_renders_an_adapter_s_template_starts_before_the_first_chat(
    tmp_path: Path,
) -> None:
    async with app() as each:
        templates = each.state.templates
        assert (await each.load("x", adapter_folder(tmp_path / "x"))).status_code == 200
        assert not templates._starts
        path = adapter_folder(tmp_path / "own")
        (path / "chat_template.jinja").write_text("hello")
        assert (await each.load("own", path)).status_code == 200
        while templates._idle.qsize() < len(templates._processes):
            await asyncio.sleep(0.001)
        assert all(process.is_running for process in templates._processes)


@awaited
async def test_an_id_unloads_the_adapter_that_has_it(tmp_path: Path) -> None:
    async with app() as each:
        path = adapter_folder(tmp_path / "x")
        for name in ("x", "y", "x"):
            assert (await each.load(name, path, load_inplace=True)).status_code == 200
        lora_int_id = max(await each.llm.list_loras())
        for body, status in (
            ({"lora_int_id": lora_int_id + 1}, 404),
            ({"lora_int_id": lora_int_id}, 200),
            ({"lora_int_id": lora_int_id}, 404),
        ):
            reply = await each.client.post("/v1/unload_lora_adapter", json=body)
            assert reply.status_code == status
        assert [status.lora_name for status in await each.llm.describe_loras()] == ["x"]
        body = {"lora_int_id": lora_int_id - 1}
        reply = await each.client.post("/v1/unload_lora_adapter", json=body)
        assert reply.text == "Success: LoRA adapter 'x' removed successfully."


@awaited
async def test_an_id_that_something_else_gave_away_stays_with_its_new_adapter(
    tmp_path: Path,
) -> None:
    path = str(adapter_folder(tmp_path / "x"))
    ids: list[int] = []

    class Own:
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            return LoRARequest(lora_name, ids[-1], path) if lora_name == "y" else None

    async with app(lora_resolvers=(Own(),)) as each:
        for again in (False, True):
            assert (await each.load("x", path)).status_code == 200
            ids[:] = await each.llm.list_loras()
            await each.llm.remove_lora(ids[-1])
            assert (await each.complete(model="y")).status_code == 200
            if again:
                assert (await each.load("x", path, load_inplace=True)).status_code == 200
            for name, left in (("x", ["y"]), ("y", [])):
                body = {"lora_name": name}
                reply = await each.client.post("/v1/unload_lora_adapter", json=body)
                assert (reply.status_code, name) == (200, name)
                assert [lora.lora_name for lora in await each.llm.describe_loras()] == left
            assert (await each.complete(model="x")).status_code == 404


@awaited
async def test_many_loads_and_unloads_of_one_name_leave_it_loaded_or_not(tmp_path: Path) -> None:
    """Beside requests for it; the engine and /v1/models agree at the end."""
    async with app() as each:
        paths = [str(adapter_folder(tmp_path / str(i))) for i in range(2)]

        async def use(i: int) -> int:
            if i % 3 == 0:
                return (await each.load("x", paths[i % 2])).status_code
            if i % 3 == 1:
                body = {"lora_name": "x"}
                reply = await each.client.post("/v1/unload_lora_adapter", json=body)
                return reply.status_code
            return (await each.complete(model="x", stream=bool(i % 2))).status_code

        statuses = await asyncio.gather(*(use(i) for i in range(90)))
        assert set(statuses) <= {200, 400, 404}
        assert statuses.count(200) > 3
        cards = (await each.client.get("/v1/models")).json()["data"]
        served = [card["id"] for card in cards if card["parent"] is not None]
        assert served == [status.lora_name for status in await each.llm.describe_loras()]
        assert each.state.num_requests == 0


@awaited
async def test_of_adapters_that_are_gone_only_the_last_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose names never come again, as those of a policy's versions."""
    monkeypatch.setattr("jaxlora.server.metrics._MOST_GONE", 2)
    path = adapter_folder(tmp_path / "x")
    async with app() as each:
        for name in ("a", "b", "c", "a", "d"):
            assert (await each.load(name, path)).status_code == 200
            assert (await each.complete(model=name)).status_code == 200
            reply = await each.client.post("/v1/unload_lora_adapter", json={"lora_name": name})
            assert reply.status_code == 200
        text = (await each.client.get("/metrics")).text
        assert {name for name in "abcd" if f'adapter="{name}"' in text} == {"a", "d"}
        labels = '{adapter="a",finished_reason="length",model_name="base"}'
        assert f"jaxlora:requests_total{labels} 1.0" in text
        assert 'vllm:request_success_total{finished_reason="length",model_name="base"} 5' in text


# Places


@awaited
async def test_adapters_are_loaded_from_allowed_places_only(tmp_path: Path) -> None:
    inside = adapter_folder(tmp_path / "root" / "a")
    outside = adapter_folder(tmp_path / "other" / "b")
    (tmp_path / "root" / "link").symlink_to(outside)
    places = {
        "allowed_lora_paths": (tmp_path / "root",),
        "allowed_lora_repos": ("org/*",),
    }
    async with app(load=lambda request: make_adapter(request.lora_name), **places) as each:
        assert (await each.load("a", inside)).status_code == 200
        for path in (
            outside,
            tmp_path / "root" / "link",
            tmp_path / "root" / ".." / "other" / "b",
            tmp_path / "nowhere",
            "other/b-lora",
            "~/x",
        ):
            reply = await each.load("b", path)
            assert reply.status_code == 400, path
            assert "outside what" in reply.json()["error"]["message"]


@pytest.mark.parametrize(("strict", "status"), [(False, 500), (True, 400)])
@awaited
async def test_a_refused_adapter_is_whose_error(strict: bool, status: int, tmp_path: Path) -> None:
    path = adapter_folder(tmp_path / "x")
    async with app(load=refuse, strict_client_errors=strict) as each:
        reply = await each.load("bad", path)
        assert reply.status_code == status
        assert reply.json()["error"]["message"] == f"bad weights in {path}"


@awaited
async def test_without_leave_there_are_no_routes_to_load() -> None:
    async with app(allow_runtime_lora_updating=False) as each:
        assert (await each.load("x", "/nowhere/x")).status_code == 404
        schema = (await each.client.get("/openapi.json")).json()
        assert "/v1/completions" in schema["paths"]
        assert not any("lora" in path for path in schema["paths"])
