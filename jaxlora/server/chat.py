"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxlora.conversation import check_variables, text_of
from jaxlora.engine.intake import salted
from jaxlora.outputs import CompletionOutput, RequestOutput
from jaxlora.server.errors import ApiError
from jaxlora.server.generation import Served, is_told, response_id, truncated, usage
from jaxlora.server.logprobs import prompt_logprobs
from jaxlora.server.models import ServedAdapter
from jaxlora.server.protocol import ChatCompletionRequest, ChatMessage, Templated
from jaxlora.server.streaming import event_stream, unless_client_leaves
from jaxlora.types import TokensPrompt

_LARGE = 1 << 16
"""Bytes of a body above which its template is rendered on a thread."""


async def render(
    served: Served,
    request: Request,
    body: Templated,
    messages: Sequence[ChatMessage],
    adapter: ServedAdapter | None,
) -> str:
    """The prompt's text by the adapter's template, in another process, else by the server's or the
    model's; that of a large request is made on a thread."""
    variables = body.template_variables()
    check_variables(variables)
    own = None if adapter is None else adapter.chat_templates
    if own is None and served.options.chat_template is not None:
        variables["chat_template"] = served.options.chat_template
    options: dict[str, Any] = {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "tools": body.tools,
        **variables,
    }
    limit = served.options.max_request_bytes
    large = len(await request.body()) > _LARGE

    def conversation() -> list[dict[str, Any]]:
        return [message.model_dump(exclude_unset=True) for message in messages]

    def apply() -> str:
        return served.tokenizer.apply_chat_template(conversation(), tokenize=False, **options)

    if own is not None:
        given = await asyncio.to_thread(conversation) if large else conversation()
        special = served.tokenizer.hf.special_tokens_map
        rendering = own.render(given, special | options, limit)
        length, text = await unless_client_leaves(request.receive, rendering)
    else:
        text = await asyncio.to_thread(apply) if large else apply()
        length = len(text)
    if length > limit:
        message = f"the chat template makes {length} characters of these messages, more than"
        raise ApiError(400, f"{message} --max-request-bytes={limit}", param="messages")
    return text


class Chat:
    """One request's way to its reply."""

    def __init__(self, served: Served, body: ChatCompletionRequest, request: Request) -> None:
        self._served, self._body, self._request = served, body, request
        self._id = response_id(request, "chatcmpl", body.request_id)
        self._created = int(time.time())
        self._model = ""
        self._logprobs = served.logprobs(body.return_tokens_as_token_ids)
        last = body.messages[-1]
        # An answer that goes on from the last message belongs to that message's role.
        self._role = last.role if not body.add_generation_prompt else "assistant"
        self._echo = ""
        if body.echo and last.role == self._role:
            self._echo = text_of(last.content)

    async def reply(self) -> Response:
        """The response, whole or as a stream."""
        served, body = self._served, self._body
        served.check_room()
        self._model, adapter = await served.models.find(body.model)
        text = await render(served, self._request, body, body.messages, adapter)
        asked, most = body.max_completion_tokens or body.max_tokens, body.truncate_prompt_tokens
        encoding = served.encode(text, body.add_special_tokens, asked=asked, whole=most is None)
        ids = await unless_client_leaves(self._request.receive, encoding)
        room = served.llm.max_model_len - (asked or 1)
        ids = truncated(ids, most, room, body.truncation_side)
        prompt = salted(TokensPrompt(prompt_token_ids=ids, prompt=text), body.cache_salt)
        params = body.sampling_params(
            served.defaults,
            max_tokens=served.max_tokens([prompt], asked),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            max_logprobs=served.options.engine_args.max_logprobs,
        )
        outputs = served.generate([prompt], params, adapter, priority=body.priority)
        if not body.stream:
            return JSONResponse(
                await unless_client_leaves(self._request.receive, self._whole(outputs))
            )
        return await event_stream(self._request, self._chunks(outputs))

    async def _whole(self, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> dict[str, Any]:
        reply = self._reply("chat.completion", [])
        async for _, output in outputs:
            for completion in output.outputs:
                choice = self._choice(completion)
                content = self._echo + completion.text
                choice["message"] = {"role": self._role, "content": content}
                reply["choices"].append(choice)
            num_completion = sum(len(each.token_ids) for each in output.outputs)
            reply["usage"] = usage(
                len(output.prompt_token_ids), num_completion, output.num_cached_tokens
            )
            if self._body.prompt_logprobs is not None:
                reply["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or ())
            if self._body.return_token_ids:
                reply["prompt_token_ids"] = output.prompt_token_ids
        return reply

    async def _chunks(
        self, outputs: AsyncIterator[tuple[int, RequestOutput]]
    ) -> AsyncIterator[dict[str, Any]]:
        options = self._body.stream_options
        counts_each = options is not None and options.continuous_usage_stats
        num_prompt = num_completion = 0
        num_cached: int | None = None
        first = True
        async for _, output in outputs:
            num_prompt, num_cached = len(output.prompt_token_ids), output.num_cached_tokens
            if first:
                first = False
                for begin in self._begin():
                    if self._body.return_token_ids:
                        begin["prompt_token_ids"] = output.prompt_token_ids
                    if counts_each:
                        begin["usage"] = usage(num_prompt, 0)
                    yield begin
            for completion in output.outputs:
                num_completion += len(completion.token_ids)
                if is_told(completion, as_ids=self._body.return_token_ids):
                    choice = self._choice(completion)
                    choice["delta"] = {"content": completion.text} if completion.text else {}
                    # One a chunk, as clients expect that look at the first only.
                    chunk = self._reply("chat.completion.chunk", [choice])
                    if counts_each:
                        chunk["usage"] = usage(num_prompt, num_completion)
                    yield chunk
        if options is not None and options.include_usage:
            counts = usage(num_prompt, num_completion, num_cached)
            yield self._reply("chat.completion.chunk", []) | {"usage": counts}

    def _begin(self) -> Iterator[dict[str, Any]]:
        """The first chunk of each choice: who speaks, and what is repeated."""
        for index in range(self._body.n):
            choice = {
                "index": index,
                "delta": {"role": self._role, "content": self._echo},
                "logprobs": None,
                "finish_reason": None,
            }
            yield self._reply("chat.completion.chunk", [choice])

    def _reply(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": completion.index,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None and self._body.logprobs:
            num_top = self._body.top_logprobs or 0
            choice["logprobs"] = self._logprobs.chat(
                completion.token_ids, completion.logprobs, num_top
            )
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice
