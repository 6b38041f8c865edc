"""From a request to outputs of the engine: what completions and chat share."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request

from jaxlora.errors import AdapterError, AdapterNotFoundError, GenerationError
from jaxlora.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxlora.server.engine_process import ServedLLM
from jaxlora.server.errors import ApiError
from jaxlora.server.logprobs import LogprobsWriter
from jaxlora.server.metrics import Metrics
from jaxlora.server.models import ServedAdapter, ServedModels
from jaxlora.server.options import ServerOptions
from jaxlora.server.streaming import close, merge
from jaxlora.tokenizer import Tokenizer
from jaxlora.types import BeamSearchParams, LoRARequest, SamplingParams, TokensPrompt

REQUEST_ID = "jaxlora.request_id"
"""Where an ASGI scope has a request's id: the client's, or a new one."""


@dataclasses.dataclass(kw_only=True)
class Served:
    """The parts of a server that is ready."""

    options: ServerOptions
    llm: ServedLLM
    models: ServedModels
    metrics: Metrics
    tokenizer: Tokenizer
    defaults: SamplingParams
    most_tokens: int | None = None
    """The model's own limit of a completion, which a request may ask to exceed in vain."""
    num_requests: int = 0
    """Prompts that are being answered."""

    def check_room(self, count: int = 1) -> None:
        """Raises ApiError 429 if ``count`` more requests would be too many."""
        limit = self.options.max_queued_requests
        if self.num_requests + count > limit:
            raise ApiError(
                429,
                f"{self.num_requests} requests are under way and {count} more would exceed "
                f"--max-queued-requests={limit}; try again later",
                headers={"Retry-After": "1"},
            )

    def logprobs(self, as_ids: bool | None) -> LogprobsWriter:
        """How a reply's log-probabilities are written; None is the server's way."""
        if as_ids is None:
            as_ids = self.options.return_tokens_as_token_ids
        return LogprobsWriter(self.tokenizer, as_ids=as_ids)

    async def generate(
        self,
        prompts: Sequence[TokensPrompt],
        params: SamplingParams | BeamSearchParams,
        adapter: ServedAdapter | None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Outputs for prompts, with the number of the prompt. Raises ApiError 429 if there is no
        room for them."""
        self.check_room(len(prompts))
        streams = [self._one(prompt, params, adapter, priority) for prompt in prompts]
        # One alone, which most are, needs none: merging costs more than the rest of a token's way.
        merged = merge(streams) if len(streams) > 1 else None
        self.num_requests += len(prompts)
        try:
            if merged is None:
                async for output in streams[0]:
                    yield 0, output
            else:
                async for number, output in merged:
                    yield number, output
        except AdapterNotFoundError as error:
            if adapter is None or self.models.serves(adapter):
                raise
            message = f"The model `{adapter.name}` does not exist."
            raise ApiError(404, message, param="model") from error
        finally:
            self.num_requests -= len(prompts)
            await close(merged or streams[0])

    async def encode(
        self, text: str, add_special_tokens: bool, *, asked: int | None, whole: bool
    ) -> list[int]:
        """The ids of a prompt whose completion has ``asked`` tokens. Raises ApiError, before work
        that may take a minute, if it is to stay ``whole`` and is certainly too long."""
        num_prompt = self.tokenizer.least_tokens(text) if whole else 0
        if num_prompt >= self.llm.max_model_len:
            self._check_length(num_prompt, asked, "at least ")
        return await self.tokenizer.encode_aside(text, add_special_tokens)

    def max_tokens(self, prompts: Sequence[TokensPrompt], asked: int | None) -> int | None:
        """The most tokens of a completion, None for as many as there is room for: of more than the
        model's own limit it gets that.

        Raises ApiError if that is too many, or a prompt and its completion are too long.
        """
        limit = self.options.max_completion_tokens
        if asked is not None and limit is not None and asked > limit:
            message = f"max_tokens={asked} is greater than --max-completion-tokens={limit}"
            raise ApiError(400, message, param="max_tokens")
        for prompt in prompts:
            self._check_length(len(prompt["prompt_token_ids"]), asked)
        limits = limit if asked is None else asked, self.most_tokens
        return min((most for most in limits if most is not None), default=None)

    def _check_length(self, num_prompt: int, asked: int | None, about: str = "") -> None:
        num_new, length = max(asked or 0, 1), self.llm.max_model_len
        if num_prompt + num_new > length:
            # Clients look for the first sentence.
            raise ApiError(
                400,
                f"This model's maximum context length is {length} tokens. However, you requested "
                f"{about}{num_prompt + num_new} tokens ({about}{num_prompt} in the prompt, "
                f"{num_new} in the completion). Please reduce one of them.",
            )

    async def _one(
        self,
        prompt: TokensPrompt,
        params: SamplingParams | BeamSearchParams,
        adapter: ServedAdapter | None,
        priority: int,
    ) -> AsyncIterator[RequestOutput]:
        # The client's own id may come twice, so the engine is given another.
        request_id = uuid.uuid4().hex
        lora_request = adapter.by_name if adapter is not None else None
        if isinstance(params, BeamSearchParams):
            stream = self._beams(prompt, params, request_id, lora_request, priority)
            num_completions = params.beam_width
        else:
            stream = self.llm.generate(
                prompt, params, request_id, lora_request=lora_request, priority=priority
            )
            num_completions = params.n
        reasons: dict[int, str] = {}
        num_tokens, output, unfinished = 0, None, "abort"
        try:
            async for output in stream:
                for each in output.outputs:
                    num_tokens += len(each.token_ids)
                    if each.finish_reason is not None:
                        reasons[each.index] = each.finish_reason
                yield output
        except (asyncio.CancelledError, GeneratorExit, GenerationError, AdapterError) as end:
            if isinstance(end, GenerationError | AdapterError):
                unfinished = "error"
            if output is None:
                # There was nothing to show before who asked has left, or it went wrong.
                self.metrics.ended(lora_request, [unfinished] * num_completions)
            raise
        finally:
            await close(stream)
            if output is not None:
                ended = [reasons.get(index, unfinished) for index in range(num_completions)]
                self.metrics.finished(output, num_tokens, ended)

    async def _beams(
        self,
        prompt: TokensPrompt,
        params: BeamSearchParams,
        request_id: str,
        lora_request: LoRARequest | None,
        priority: int,
    ) -> AsyncIterator[RequestOutput]:
        """Beam search's result, as the output of one request."""
        metrics = RequestMetrics(arrival_time=time.monotonic())
        found = await self.llm.beam_search(
            prompt, params, request_id, lora_request=lora_request, priority=priority
        )
        prompt_ids = prompt["prompt_token_ids"]
        completions = []
        for index, beam in enumerate(found.sequences):
            token_ids = beam.tokens[len(prompt_ids) :]
            detokenizer = self.tokenizer.stream(prompt_ids=prompt_ids)
            completions.append(
                CompletionOutput(
                    index=index,
                    text=detokenizer.push(token_ids) + detokenizer.flush(),
                    token_ids=token_ids,
                    cumulative_logprob=beam.cum_logprob,
                    logprobs=beam.logprobs,
                    finish_reason=beam.finish_reason,
                    lora_request=lora_request,
                )
            )
        yield RequestOutput(
            request_id=request_id,
            prompt=prompt.get("prompt"),
            prompt_token_ids=prompt_ids,
            outputs=completions,
            finished=True,
            metrics=metrics,
            lora_request=lora_request,
        )


def is_told(completion: CompletionOutput, *, as_ids: bool) -> bool:
    """Whether news of a completion has anything for a stream: tokens may have no text, or none yet,
    and be of interest by their log-probabilities, or ``as_ids``, alone."""
    return bool(completion.text or completion.finish_reason or completion.logprobs or as_ids)


def response_id(request: Request, prefix: str, own: str | None) -> str:
    """The id of a reply: X-Request-Id, or the body's request_id, or the one the gate gave it."""
    given = "x-request-id" in request.headers
    return f"{prefix}-{request.scope[REQUEST_ID] if given or not own else own}"


def usage(num_prompt: int, num_completion: int, num_cached: int | None = None) -> dict[str, Any]:
    """OpenAI's count of tokens."""
    counts: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "total_tokens": num_prompt + num_completion,
        "completion_tokens": num_completion,
    }
    if num_cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": num_cached}
    return counts


def truncated(token_ids: list[int], limit: int | None, room: int, side: str) -> list[int]:
    """The last ``limit`` ids, or the first if what is cut off is on the right ``side``; -1 is as
    many as there is room for, None is all."""
    if limit is None:
        return token_ids
    if limit == 0:
        raise ApiError(400, "truncate_prompt_tokens=0 must be -1 or at least 1")
    count = limit if limit > 0 else max(room, 1)
    return token_ids[:count] if side == "right" else token_ids[-count:]
