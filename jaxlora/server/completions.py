"""POST /v1/completions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxlora.engine.intake import salted
from jaxlora.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from jaxlora.server.errors import ApiError
from jaxlora.server.generation import Served, is_told, response_id, truncated, usage
from jaxlora.server.logprobs import prompt_logprobs
from jaxlora.server.protocol import CompletionRequest
from jaxlora.server.streaming import close, event_stream, unless_client_leaves
from jaxlora.types import BeamSearchParams, TokensPrompt

_DEFAULT_MAX_TOKENS = 16


class Completions:
    """One request's way to its reply."""

    def __init__(self, served: Served, body: CompletionRequest, request: Request) -> None:
        self._served, self._body, self._request = served, body, request
        self._id = response_id(request, "cmpl", body.request_id)
        self._created = int(time.time())
        self._model = ""
        self._logprobs = served.logprobs(body.return_tokens_as_token_ids)
        self._offsets: dict[int, int] = {}
        """Choice -> where the text of its next token begins."""
        self._num_added: list[int] = []
        """Ids before each prompt's that are not in the text that is repeated of it."""
        self._prompt_logprobs: dict[int, dict[str, Any]] = {}
        """Number of a prompt -> its log-probabilities, as each of its choices repeats them."""

    async def reply(self) -> Response:
        """The response, whole or as a stream."""
        served, body = self._served, self._body
        served.check_room()
        self._model, adapter = await served.models.find(body.model)
        prompts = await unless_client_leaves(self._request.receive, self._prompts())
        params = body.sampling_params(
            served.defaults,
            max_tokens=self._max_tokens(prompts),
            logprobs=body.logprobs,
            max_logprobs=served.options.engine_args.max_logprobs,
        )
        if body.echo and body.logprobs is not None:
            if isinstance(params, BeamSearchParams):
                message = "logprobs with echo cannot be used with use_beam_search"
                raise ApiError(400, message, param="logprobs")
            if params.prompt_logprobs is None:
                params = dataclasses.replace(params, prompt_logprobs=body.logprobs)
        outputs = served.generate(prompts, params, adapter, priority=body.priority)
        if body.max_tokens == 0:
            outputs = _without_completions(outputs)
        if not body.stream:
            return JSONResponse(
                await unless_client_leaves(self._request.receive, self._whole(outputs))
            )
        return await event_stream(self._request, self._chunks(outputs))

    def _max_tokens(self, prompts: Sequence[TokensPrompt]) -> int:
        asked = self._body.max_tokens
        if asked == 0 and not self._body.echo:
            raise ApiError(400, "max_tokens=0 must be at least 1 without echo", param="max_tokens")
        limit = self._served.max_tokens(prompts, asked)
        if asked is None or limit is None:
            return min(limit or _DEFAULT_MAX_TOKENS, _DEFAULT_MAX_TOKENS)
        # Nothing is scored without a step, so a token is sampled, and not shown.
        return max(limit, 1)

    async def _prompts(self) -> list[TokensPrompt]:
        given: Any = self._body.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        limit = self._served.options.max_prompts
        if not 0 < len(given) <= limit:
            raise ApiError(
                400, f"prompt has {len(given)} entries, it must have 1 to {limit}", param="prompt"
            )
        most_queued = self._served.options.max_queued_requests
        if len(given) > most_queued:
            # Not 429, after which clients come back.
            raise ApiError(
                400,
                f"prompt has {len(given)} entries, which is more than "
                f"--max-queued-requests={most_queued}; send them in several requests",
                param="prompt",
            )
        asked = self._body.max_tokens
        # Of none a token is sampled all the same.
        num_new = _DEFAULT_MAX_TOKENS if asked is None else max(asked, 1)
        room = self._served.llm.max_model_len - num_new
        most, side = self._body.truncate_prompt_tokens, self._body.truncation_side
        prompts = []
        for each in given:
            ids = each
            if isinstance(each, str):
                ids = await self._served.encode(
                    each, self._body.add_special_tokens, asked=asked, whole=most is None
                )
            num_given = len(ids)
            ids = truncated(ids, most, room, side)
            is_cut = len(ids) < num_given
            text, num_added = (
                (each, self._num_bos(ids, is_cut)) if isinstance(each, str) else ("", 0)
            )
            if self._body.echo and (not isinstance(each, str) or is_cut):
                tokenizer = self._served.tokenizer
                text = await tokenizer.decode_aside(ids[num_added:], skip_special_tokens=False)
            self._num_added.append(num_added)
            prompt = TokensPrompt(prompt_token_ids=ids, prompt=text)
            prompts.append(salted(prompt, self._body.cache_salt))
        return prompts

    def _num_bos(self, ids: list[int], is_cut: bool) -> int:
        """How many of a text's ids, which may have been truncated, are a BOS that was added."""
        if not self._body.echo or (is_cut and self._body.truncation_side == "left"):
            return 0
        tokenizer = self._served.tokenizer
        added = tokenizer.encode("", self._body.add_special_tokens)
        return int(ids[:1] == added[:1] == [tokenizer.bos_token_id])

    async def _whole(self, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> dict[str, Any]:
        choices, num_prompt, num_completion, num_cached = [], 0, 0, 0
        async for number, output in outputs:
            num_prompt += len(output.prompt_token_ids)
            num_cached += output.num_cached_tokens or 0
            for completion in output.outputs:
                num_completion += len(completion.token_ids)
                echo = self._echo(number, completion.index, output) if self._body.echo else None
                choice = self._choice(number, completion)
                if echo is not None:
                    choice["text"] = echo["text"] + choice["text"]
                    for key, values in (echo["logprobs"] or {}).items():
                        choice["logprobs"][key][:0] = values
                if self._body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or ())
                if self._body.return_token_ids:
                    choice["prompt_token_ids"] = output.prompt_token_ids
                choices.append(choice)
        choices.sort(key=lambda choice: choice["index"])
        return self._reply(choices) | {"usage": usage(num_prompt, num_completion, num_cached)}

    async def _chunks(
        self, outputs: AsyncIterator[tuple[int, RequestOutput]]
    ) -> AsyncIterator[dict[str, Any]]:
        options = self._body.stream_options
        num_prompt: dict[int, int] = {}
        num_cached: dict[int, int] = {}
        num_completion = 0
        async for number, output in outputs:
            first = number not in num_prompt
            num_prompt[number] = len(output.prompt_token_ids)
            num_cached[number] = output.num_cached_tokens or 0
            # Each with the tokens that were sampled until then.
            choices = []
            if first and self._body.echo:
                echoes = (self._echo(number, index, output) for index in range(self._body.n))
                choices += [(echo, num_completion) for echo in echoes]
            for completion in output.outputs:
                num_completion += len(completion.token_ids)
                if is_told(completion, as_ids=self._body.return_token_ids):
                    choices.append((self._choice(number, completion), num_completion))
            if first and self._body.return_token_ids and choices:
                choices[0][0]["prompt_token_ids"] = output.prompt_token_ids
            for choice, num_sampled in choices:
                # One a chunk, as clients expect that look at the first only.
                chunk = self._reply([choice])
                if options is not None and options.continuous_usage_stats:
                    chunk["usage"] = usage(sum(num_prompt.values()), num_sampled)
                yield chunk
        if options is not None and options.include_usage:
            counts = usage(sum(num_prompt.values()), num_completion, sum(num_cached.values()))
            yield self._reply([]) | {"usage": counts}

    def _reply(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _choice(self, number: int, completion: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": number * self._body.n + completion.index,
            "text": completion.text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if completion.logprobs is not None and self._body.logprobs is not None:
            self._add_logprobs(choice, completion.token_ids, completion.logprobs)
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _echo(self, number: int, index: int, output: RequestOutput) -> dict[str, Any]:
        """The prompt as a part of a choice."""
        text = output.prompt or ""
        choice = self._choice(number, CompletionOutput(index=index, text=text, token_ids=[]))
        places = output.prompt_logprobs
        if self._body.logprobs is None or places is None:
            return choice
        if number not in self._prompt_logprobs:
            ids, num_added = output.prompt_token_ids, self._num_added[number]
            # The first token's text may have a space that the prompt's has not.
            offsets = [0] * num_added + self._served.tokenizer.offsets(ids[num_added:])
            self._prompt_logprobs[number] = self._logprobs.completion(
                ids, places, self._body.logprobs, offsets
            )
        self._offsets[choice["index"]] = len(text)
        return choice | {"logprobs": self._prompt_logprobs[number]}

    def _add_logprobs(
        self, choice: dict[str, Any], token_ids: Sequence[int], places: Sequence[TokenLogprobs]
    ) -> None:
        begin = self._offsets.get(choice["index"], 0)
        *offsets, self._offsets[choice["index"]] = self._logprobs.offsets(token_ids, places, begin)
        most = self._body.logprobs or 0
        choice["logprobs"] = self._logprobs.completion(token_ids, places, most, offsets)


async def _without_completions(
    outputs: AsyncIterator[tuple[int, RequestOutput]],
) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Outputs that only tell of the prompts."""
    try:
        async for number, output in outputs:
            emptied = [
                dataclasses.replace(
                    each,
                    text="",
                    token_ids=[],
                    logprobs=None if each.logprobs is None else [],
                    finish_reason="length",
                    stop_reason=None,
                )
                for each in output.outputs
            ]
            yield number, dataclasses.replace(output, outputs=emptied)
    finally:
        await close(outputs)
