"""Completions without an engine: what is told of texts, with tokenizers of two kinds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from jaxlora.models.gguf_tokenizer import build_gguf_tokenizer
from jaxlora.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxlora.server.completions import Completions
from jaxlora.server.logprobs import LogprobsWriter
from jaxlora.server.protocol import CompletionRequest
from jaxlora.tokenizer import REPLACEMENT, Tokenizer
from tests.jaxlora.models.gguf_vocabularies import byte_level_metadata, sentencepiece_metadata

SAID = " world, hello"
BYTE_LEVEL, SENTENCEPIECE = (
    Tokenizer(build_gguf_tokenizer(metadata, "file"))
    for metadata in (byte_level_metadata("gpt-2"), sentencepiece_metadata())
)


async def echoed(tokenizer: Tokenizer, **fields: Any) -> tuple[list[int], dict[str, Any]]:
    """The ids of a prompt and of SAID, and what a reply tells of them."""
    served: Any = SimpleNamespace(
        tokenizer=tokenizer,
        llm=SimpleNamespace(max_model_len=512),
        options=SimpleNamespace(max_prompts=1, max_queued_requests=1),
        logprobs=lambda as_ids: LogprobsWriter(tokenizer, as_ids=bool(as_ids)),
        encode=lambda text, special, **_: tokenizer.encode_aside(text, special),
    )
    request: Any = SimpleNamespace(headers={}, scope={})
    body = CompletionRequest(model="base", echo=True, logprobs=0, request_id="x", **fields)
    completions = Completions(served, body, request)
    (prompt,) = await completions._prompts()
    ids, said = prompt["prompt_token_ids"], tokenizer.encode_within(SAID)
    places = [{each: Logprob(-1.0, 1, tokenizer.text_of(each))} for each in (*ids, *said)]
    completion = CompletionOutput(
        index=0, text=SAID, token_ids=said, logprobs=places[len(ids) :], cumulative_logprob=0.0
    )
    output = RequestOutput(
        request_id="x",
        prompt=prompt["prompt"],
        prompt_token_ids=ids,
        outputs=[completion],
        finished=True,
        metrics=RequestMetrics(arrival_time=0.0),
        prompt_logprobs=[None, *places[1 : len(ids)]],
    )

    async def outputs() -> AsyncIterator[tuple[int, RequestOutput]]:
        yield 0, output

    reply = await completions._whole(outputs())
    return [*ids, *said], reply["choices"][0]


@pytest.mark.usefixtures("without_types")
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("prompt", ["hello world", "<s>a", "a \N{GRINNING FACE} hello"])
def test_offsets_are_those_in_the_text_that_is_returned(
    tokenizer: Tokenizer, as_ids: bool, is_text: bool, prompt: str
) -> None:
    given = prompt if is_text else tokenizer.encode(prompt, add_special_tokens=False)
    fields: dict[str, Any] = {"prompt": given, "return_tokens_as_token_ids": as_ids}
    ids, choice = asyncio.run(echoed(tokenizer, **fields))
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    num_bos = int(is_text and tokenizer is SENTENCEPIECE)
    assert offsets[: num_bos + 1] == [0] * (num_bos + 1)
    assert len(offsets) == len(ids)
    for i, offset in list(enumerate(offsets))[num_bos:]:
        token = tokenizer.text_of(ids[i])
        if i == num_bos:
            token = token.removeprefix(" ")  # SentencePiece puts a space before a text.
        if REPLACEMENT not in token:
            assert text.startswith(token, offset), (i, token)
    assert text.endswith(SAID)
    assert offsets[-1] + len(tokenizer.text_of(ids[-1])) == len(text)
