"""The application: routes over one server's state. Nothing here is global."""

from __future__ import annotations

import asyncio
import logging
from importlib import resources
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import jaxlora
from jaxlora.errors import EngineDeadError, JaxloraError
from jaxlora.server import errors
from jaxlora.server.auth import Keys
from jaxlora.server.body import BoundedRoute
from jaxlora.server.chat import Chat, render
from jaxlora.server.completions import Completions
from jaxlora.server.errors import ApiError, ClientGoneError
from jaxlora.server.gate import Gate
from jaxlora.server.metrics import Snapshot
from jaxlora.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadLoRAAdapterRequest,
    TokenizeRequest,
    UnloadLoRAAdapterRequest,
)
from jaxlora.server.replies import (
    ChatCompletionResponse,
    CompletionResponse,
    DetokenizeResponse,
    ErrorResponse,
    ModelList,
    TokenizeResponse,
)
from jaxlora.server.state import ServerState
from jaxlora.server.streaming import unless_client_leaves

logger = logging.getLogger(__name__)

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 503)
}
_PAGE_MAY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


def build_app(state: ServerState) -> ASGIApp:
    """The ASGI application of one server."""
    api = FastAPI(
        title="jaxlora",
        version=jaxlora.__version__,
        description="OpenAI's API for one base model and many LoRA adapters.",
        responses=_ERRORS,
        redoc_url=None,
    )
    api.router.route_class = BoundedRoute
    expected = (
        RequestValidationError,
        HTTPException,
        JaxloraError,
        ValueError,
        ClientGoneError,
        Exception,
    )
    for kind in expected:
        api.add_exception_handler(kind, errors.handle)
    _add_operations(api, state)
    _add_models(api, state)
    _add_generation(api, state)
    _add_tokens(api, state)
    if state.options.allow_runtime_lora_updating:
        _add_loading(api, state)
    gate = Gate(
        app=api,
        keys=Keys(state.options.api_keys, state.options.admin_api_key),
        max_request_bytes=state.options.max_request_bytes,
        closed=state.closed,
        passed=state.passed,
    )
    return CORSMiddleware(
        gate,
        allow_origins=state.options.allowed_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id"],
    )


def _add_operations(api: FastAPI, state: ServerState) -> None:
    page = (resources.files("jaxlora.server") / "playground" / "index.html").read_bytes()

    @api.get("/", include_in_schema=False)
    async def playground() -> Response:
        """A page to try models and adapters with."""
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_MAY})

    @api.get("/health", responses={200: {"content": None}})
    async def health() -> Response:
        """200 once requests are served, 503 before and when the engine has stopped."""
        return Response(status_code=200 if await state.healthy() else 503)

    async def ping() -> Response:
        """The same, as SageMaker asks it."""
        return await health()

    api.get("/ping")(ping)
    api.post("/ping")(ping)

    @api.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": jaxlora.__version__}

    @api.get("/load")
    async def load() -> dict[str, int]:
        """Requests under way."""
        return {"server_load": state.num_requests}

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text."""
        snapshot = Snapshot()
        try:
            llm = state.served.llm
            snapshot = Snapshot(
                numbers=await llm.get_metrics(),
                histograms=await llm.get_histograms(),
                adapters=await llm.describe_loras(),
            )
        except (ApiError, EngineDeadError):
            logger.debug("the engine has nothing to say, metrics are the server's own")
        page = await asyncio.to_thread(state.metrics.page, snapshot)
        return Response(page, media_type=CONTENT_TYPE_LATEST)


def _add_models(api: FastAPI, state: ServerState) -> None:
    @api.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """The base model, then the adapters in the order they were loaded."""
        # There may be thousands, and the standard library takes ten times as long.
        page = orjson.dumps({"object": "list", "data": state.served.models.cards()})
        return Response(page, media_type="application/json")

    @api.get("/v1/models/{model:path}")
    async def model(model: str) -> JSONResponse:
        """One of them; an adapter also as `base:adapter`."""
        return JSONResponse(state.served.models.card(model))


def _add_generation(api: FastAPI, state: ServerState) -> None:
    @api.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses={200: {"content": _STREAM}},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Completes prompts."""
        return await Completions(state.served, body, request).reply()

    @api.post(
        "/v1/chat/completions",
        response_model=ChatCompletionResponse,
        responses={200: {"content": _STREAM}},
    )
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answers a conversation."""
        return await Chat(state.served, body, request).reply()


def _add_tokens(api: FastAPI, state: ServerState) -> None:
    @api.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
        """The ids of a prompt, or of messages under the chat template."""
        served = state.served
        _, adapter = await served.models.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "either prompt or messages must be given", param="prompt")
        text, add_special_tokens = body.prompt or "", body.add_special_tokens
        if body.messages is not None:
            text = await render(served, request, body, body.messages, adapter)
        if add_special_tokens is None:
            # A template writes them itself.
            add_special_tokens = body.messages is None
        encoding = served.tokenizer.encode_aside(text, add_special_tokens)
        ids = await unless_client_leaves(request.receive, encoding)
        strings = None
        if body.return_token_strs:
            named = await asyncio.to_thread(served.tokenizer.hf.convert_ids_to_tokens, ids)
            strings = list(map(str, named))
        return TokenizeResponse(
            count=len(ids),
            max_model_len=served.llm.max_model_len,
            tokens=ids,
            token_strs=strings,
        )

    @api.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of ids."""
        served = state.served
        await served.models.find(body.model)
        # A model's table may be longer than its tokenizer's, and has no text there.
        known = max(served.tokenizer.vocab_size, served.llm.vocab_size)
        largest = max(body.tokens, default=0)
        if largest >= known:
            message = f"token {largest} is outside the vocabulary of {known} ids"
            raise ApiError(400, message, param="tokens")
        prompt = await served.tokenizer.decode_aside(body.tokens, skip_special_tokens=False)
        return DetokenizeResponse(prompt=prompt)


def _add_loading(api: FastAPI, state: ServerState) -> None:
    logger.warning(
        "adapters can be loaded and unloaded over HTTP: whoever may call these routes decides what "
        "is served; bound them with --admin-api-key, --allowed-lora-path and --allowed-lora-repo"
    )

    @api.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    @api.post("/load_lora_adapter", response_class=PlainTextResponse, include_in_schema=False)
    async def load_lora_adapter(body: LoadLoRAAdapterRequest) -> str:
        """Loads an adapter."""
        return await state.served.models.load(
            body.lora_name,
            body.lora_path,
            load_inplace=body.load_inplace,
            base_model_name=body.base_model_name,
        )

    @api.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    @api.post("/unload_lora_adapter", response_class=PlainTextResponse, include_in_schema=False)
    async def unload_lora_adapter(body: UnloadLoRAAdapterRequest) -> str:
        """Unloads an adapter; requests that use it finish."""
        return await state.served.models.unload(body.lora_name, body.lora_int_id)
