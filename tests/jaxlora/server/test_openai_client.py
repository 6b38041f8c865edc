"""The official client against a server process: completions, chat, streams, many at once."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.jaxlora.awaited import awaited
from tests.jaxlora.peft_models import Reference
from tests.jaxlora.server.processes import SECONDS, Server
from tests.jaxlora.tiny_tokenizer import encode

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
MESSAGES: Any = [{"role": "user", "content": "hello"}]
ADAPTERS = {"base": None, "sql": "r8-qv", "json": "r16-all"}


def test_models_and_their_lineage(client: openai.OpenAI, reference: Reference) -> None:
    cards = {model.id: model.model_dump() for model in client.models.list().data}
    assert list(cards)[:4] == ["base", "alias", "sql", "json"]
    assert [cards[name]["parent"] for name in list(cards)[:4]] == [None, None, "base", "other"]
    assert cards["sql"]["root"] == reference.paths["r8-qv"]
    assert {card["owned_by"] for card in cards.values()} == {"jaxlora"}
    assert {card["max_model_len"] for card in cards.values()} == {256}
    assert client.models.retrieve("sql").id == "sql"
    assert client.models.retrieve("base:json").model_dump() == {
        **cards["json"],
        "id": "base:json",
    }
    for name in ("nobody", "base:nobody", "base:", "base:alias", "json:sql"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


@pytest.mark.parametrize("model", ["base", "alias", "sql", "json", "base:sql"])
def test_a_completion_is_the_reference_s(
    client: openai.OpenAI, reference: Reference, model: str
) -> None:
    reply = client.completions.create(model=model, prompt="hello you", **GREEDY)
    (choice,) = reply.choices
    assert reply.model == model
    assert choice.finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (9, 12)
    adapter = ADAPTERS.get(model.removeprefix("base:"))
    tokens = client.completions.create(
        model=model, prompt="hello you", extra_body={"return_token_ids": True}, **GREEDY
    ).choices[0]
    assert tokens.text == choice.text
    ids = tokens.model_dump()["token_ids"]
    reference.check_greedy(encode("hello you"), ids, adapter)


def test_a_streamed_completion_is_the_whole_one(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="sql", prompt="hello", **GREEDY)
    chunks = list(
        client.completions.create(
            model="sql",
            prompt="hello",
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    *parts, last = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in parts][-1] == "length"
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_what_a_stream_says_of_its_tokens(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "sql", "stream": True, **GREEDY}
    options["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    options["extra_body"] = {"return_token_ids": True}
    chunks = [c.model_dump() for c in client.completions.create(prompt="hello", **options)]
    chats = [c.model_dump() for c in client.chat.completions.create(messages=MESSAGES, **options)]
    for first, *middle, last in (chunks, chats[1:]):
        counted = 0
        for chunk in (first, *middle):
            counted += len(chunk["choices"][0]["token_ids"])
            assert chunk["usage"]["completion_tokens"] == counted
        assert last["usage"]["completion_tokens"] == counted == 12
        assert last["choices"] == []
    assert chunks[0]["choices"][0]["prompt_token_ids"] == encode("hello")
    prompt = chats[0]["prompt_token_ids"]
    assert len(prompt) == chats[-1]["usage"]["prompt_tokens"]
    assert prompt[1:] == encode("user: hello assistant: ")
    # What comes before any token says so.
    echo, *_ = client.completions.create(prompt="hello", echo=True, **options)
    assert echo.choices[0].text == "hello"
    for begin, count in ((echo.model_dump(), len("hello")), (chats[0], len(prompt))):
        assert begin["usage"]["completion_tokens"] == 0
        assert begin["usage"]["prompt_tokens"] == begin["usage"]["total_tokens"] == count


def test_what_was_cached_is_told_at_the_end_of_a_stream(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "sql", "max_tokens": 4, "seed": 1, "n": 2}
    texts = ["x" * 40, "y" * 20]
    client.completions.create(prompt=texts, **options)
    options |= {"stream": True, "stream_options": {"include_usage": True}}
    *_, last = client.completions.create(prompt=texts, **options)
    assert last.usage.prompt_tokens_details.cached_tokens == 32 + 16
    messages: Any = [{"role": "user", "content": "z" * 40}]
    for cached in (0, 48):
        *_, last = client.chat.completions.create(messages=messages, **options)
        assert last.usage.prompt_tokens_details.cached_tokens == cached


@pytest.mark.parametrize("stop", [["zz", "e<", "~"], ["never said"]])
def test_a_stream_has_the_logprobs_of_tokens_without_text(
    client: openai.OpenAI, stop: list[str]
) -> None:
    """Special ones, and those that a stop string may begin with."""
    special = encode("a")[0]
    options: dict[str, Any] = {"model": "sql", "temperature": 0, "max_tokens": 12, "stop": stop}
    # The last two ids of the vocabulary are special.
    options["logit_bias"] = {"95": 3, "96": 3, str(special): 3}
    options["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(prompt="hello", logprobs=1, **options).choices[0]
    assert whole.logprobs is not None
    assert {"<s>", "</s>"} & set(whole.logprobs.tokens or ())
    chunks = list(client.completions.create(prompt="hello", logprobs=1, stream=True, **options))
    told = [chunk.choices[0].logprobs for chunk in chunks]
    assert [t for each in told if each for t in each.tokens or ()] == whole.logprobs.tokens
    offsets = [t for each in told if each for t in each.text_offset or ()]
    assert offsets == whole.logprobs.text_offset
    chat: dict[str, Any] = {"messages": MESSAGES, "logprobs": True, **options}
    (choice,) = client.chat.completions.create(**chat).choices
    assert choice.logprobs is not None
    parts = client.chat.completions.create(stream=True, **chat)
    entries = [part.choices[0].logprobs for part in parts]
    tokens = [entry.token for each in entries if each for entry in each.content or ()]
    assert tokens == [entry.token for entry in choice.logprobs.content or ()]
    assert len(tokens) > 3


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    whole = client.chat.completions.create(
        model="json", messages=messages, temperature=0, max_completion_tokens=8
    )
    message = whole.choices[0].message
    assert (message.role, whole.choices[0].finish_reason) == ("assistant", "length")
    chunks = list(
        client.chat.completions.create(
            model="json", messages=messages, temperature=0, max_tokens=8, stream=True
        )
    )
    first = chunks[0].choices[0].delta
    assert (first.role, first.content) == ("assistant", "")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == message.content
    # The template's text, as a plain prompt.
    prompt = "<s>system: be brief <s>user: hello assistant: "
    plain = client.completions.create(model="json", prompt=prompt, temperature=0, max_tokens=8)
    assert plain.choices[0].text == text
    assert plain.usage is not None
    assert whole.usage is not None
    assert plain.usage.total_tokens == whole.usage.total_tokens
    details = plain.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == 32, "two pages were in the prefix cache"


def test_chat_fills_the_context_by_default(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "x" * 200}]
    reply = client.chat.completions.create(model="base", messages=messages, temperature=0)
    assert reply.usage is not None
    assert reply.usage.total_tokens == 256


def test_echo_and_going_on_from_the_last_message(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="base", prompt="hello", echo=True, **GREEDY)
    assert completion.choices[0].text.startswith("hello")
    ids = client.completions.create(model="base", prompt=encode("hello"), echo=True, **GREEDY)
    assert ids.choices[0].text == completion.choices[0].text
    ids = client.completions.create(
        model="base", prompt=[95, *encode("hi"), 96], echo=True, logprobs=0, **GREEDY
    )
    assert ids.choices[0].text.startswith("<s>hi</s>")
    assert ids.choices[0].logprobs is not None
    assert (ids.choices[0].logprobs.text_offset or ())[:5] == [0, 3, 4, 5, 9]
    messages: Any = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "well"},
    ]
    options = {"add_generation_prompt": False, "continue_final_message": True, "echo": True}
    reply = client.chat.completions.create(
        model="base", messages=messages, max_tokens=4, temperature=0, extra_body=options
    )
    assert (reply.choices[0].message.content or "").startswith("well")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len("user: hi assistant: well") + 2


def test_stop_strings_and_seeds(client: openai.OpenAI) -> None:
    text = client.completions.create(model="base", prompt="hello", **GREEDY).choices[0].text
    reply = client.completions.create(model="base", prompt="hello", stop=text[3:5], **GREEDY)
    at = text.index(text[3:5])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (text[:at], "stop")
    assert reply.choices[0].model_dump()["stop_reason"] == text[3:5]
    seeded = [
        client.completions.create(model="sql", prompt="hello", max_tokens=20, seed=seed)
        for seed in (1, 1, 2)
    ]
    texts = [reply.choices[0].text for reply in seeded]
    assert texts[0] == texts[1] != texts[2]


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "sql", "prompt": "hello", "logprobs": 3, **GREEDY}
    whole = client.completions.create(**options)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == whole.choices[0].text
    assert logprobs.text_offset == list(range(12))
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs or (), logprobs.top_logprobs or (), strict=True
    ):
        assert len(top) == 3
        assert value == top[token] == max(top.values()) < 0
    parts = [c.choices[0].logprobs for c in client.completions.create(stream=True, **options)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        joined = [item for part in parts if part for item in getattr(part, name)]
        assert joined == getattr(logprobs, name), name
    echo = client.completions.create(echo=True, **options)
    echoed = echo.choices[0].logprobs
    assert echoed is not None
    assert "".join(echoed.tokens or ()) == echo.choices[0].text == "hello" + whole.choices[0].text
    assert (echoed.token_logprobs or [0])[0] is None
    assert (echoed.token_logprobs or [])[5:] == pytest.approx(logprobs.token_logprobs, abs=1e-4)
    assert echoed.text_offset == list(range(17))
    ids = client.completions.create(
        extra_body={"return_tokens_as_token_ids": True, "prompt_logprobs": 1}, **options
    ).choices[0]
    assert ids.logprobs is not None
    assert ids.logprobs.tokens == [f"token_id:{i}" for i in encode(whole.choices[0].text)]
    first, *rest = ids.model_dump()["prompt_logprobs"]
    assert first is None
    for token, place in zip(encode("ello"), rest, strict=True):
        assert place[str(token)]["decoded_token"] == chr(token + 32)


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    options: dict[str, Any] = {"model": "sql", "messages": messages, "logprobs": True, **GREEDY}
    whole = client.chat.completions.create(top_logprobs=2, **options).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content or []
    assert "".join(each.token for each in content) == whole.message.content
    for each in content:
        assert bytes(each.bytes or ()).decode() == each.token
        assert each.top_logprobs[0].token == each.token
        values = [top.logprob for top in each.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 2
    alone = client.chat.completions.create(**options).choices[0].logprobs
    assert alone is not None
    assert [each.top_logprobs for each in alone.content or []] == [[]] * 12
    chunks = client.chat.completions.create(top_logprobs=2, stream=True, **options)
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [each.token for each in streamed] == [each.token for each in content]


def test_a_prompt_alone_is_scored(client: openai.OpenAI) -> None:
    """As evaluation harnesses ask it."""
    options: dict[str, Any] = {"model": "sql", "prompt": "hello", "logprobs": 2, "echo": True}
    reply = client.completions.create(max_tokens=0, **options)
    more = client.completions.create(max_tokens=1, temperature=0, **options)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("hello", "length")
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 0)
    scored, longer = reply.choices[0].logprobs, more.choices[0].logprobs
    assert scored is not None
    assert longer is not None
    assert scored.tokens == list("hello")
    for name in ("tokens", "text_offset"):
        assert getattr(scored, name) == getattr(longer, name)[:5]
    assert (scored.token_logprobs or ())[1:] == pytest.approx((longer.token_logprobs or ())[1:5])
    # The prompt, then an end without text.
    first, last = client.completions.create(max_tokens=0, stream=True, **options)
    assert (first.choices[0].text, last.choices[0].text) == ("hello", "")
    assert last.choices[0].finish_reason == "length"


def test_beam_search(client: openai.OpenAI, reference: Reference) -> None:
    options: dict[str, Any] = {"model": "sql", "prompt": "hello", "n": 3, "max_tokens": 5}
    options["extra_body"] = {
        "use_beam_search": True,
        "length_penalty": 0,
        "return_token_ids": True,
        "ignore_eos": True,
    }
    reply = client.completions.create(logprobs=1, **options)
    expected = reference.beam_search(encode("hello"), "r8-qv", 3, 5).sequences.tolist()
    found = [choice.model_dump()["token_ids"] for choice in reply.choices]
    assert found == [beam[len("hello") :] for beam in expected]
    for choice, ids in zip(reply.choices, found, strict=True):
        assert encode(choice.text) == ids
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or ()) == choice.text
        assert all(1 <= len(top) <= 2 for top in choice.logprobs.top_logprobs or ())
    chunks = client.completions.create(stream=True, **options)
    assert [chunk.choices[0].text for chunk in chunks] == [each.text for each in reply.choices]
    messages: Any = [{"role": "user", "content": "hello"}]
    body = {"use_beam_search": True}
    chat = client.chat.completions.create(
        model="base", messages=messages, n=2, max_tokens=4, extra_body=body
    )
    assert [choice.index for choice in chat.choices] == [0, 1]
    assert chat.choices[0].message.content != chat.choices[1].message.content


def test_what_shapes_the_choice_of_tokens(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "base", "prompt": "hello", **GREEDY}
    text = client.completions.create(**options).choices[0].text
    (token,) = encode("Q")
    biased = client.completions.create(logit_bias={str(token): 100}, **options)
    assert biased.choices[0].text == "Q" * 12
    allowed = client.completions.create(extra_body={"allowed_token_ids": [token]}, **options)
    assert allowed.choices[0].text == "Q" * 12
    bad = client.completions.create(extra_body={"bad_words": [text[:2]]}, **options)
    assert text[:2] not in bad.choices[0].text
    penalized = client.completions.create(
        frequency_penalty=2, presence_penalty=2, extra_body={"repetition_penalty": 2}, **options
    )
    assert len(set(penalized.choices[0].text)) >= len(set(text))


class Answer(pydantic.BaseModel):
    """What the client asks for, as a type."""

    kind: Literal["cat", "dog"]
    tame: bool
    ears: Literal[1, 2]


@pytest.mark.parametrize("model", ["base", "sql"])
def test_the_client_s_own_types_come_back(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": 150}
    for seed in range(3):
        reply = client.chat.completions.parse(response_format=Answer, seed=seed, **options)
        (choice,) = reply.choices
        assert isinstance(choice.message.parsed, Answer)
        assert choice.finish_reason == "stop"
        with client.chat.completions.stream(response_format=Answer, seed=seed, **options) as stream:
            streamed = stream.get_final_completion().choices[0].message.parsed
        assert streamed == choice.message.parsed
        assert seed or json.loads(choice.message.content or "") == streamed.model_dump()


def test_json_of_no_schema(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="sql",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        logit_bias={str(encode("}")[0]): 100},
    )
    assert isinstance(json.loads(reply.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"choice": ["yes", "no", "may be"]}, "yes|no|may be"),
        ({"regex": "[0-9]{3}-[a-f]+!"}, "[0-9]{3}-[a-f]+!"),
        ({"grammar": 'start: "x" WORD\nWORD: /[a-c]{2,4}/'}, "x[a-c]{2,4}"),
        ({"json": {"type": "integer", "minimum": 10, "maximum": 99}}, "[1-9][0-9]"),
        ({"json": '{"const": "a b"}'}, '"a b"'),
    ],
)
def test_structured_outputs(
    client: openai.OpenAI, constraint: dict[str, Any], pattern: str
) -> None:
    options: dict[str, Any] = {"model": "json", "prompt": "hello", "max_tokens": 200, "seed": 3}
    options["extra_body"] = {"structured_outputs": constraint}
    texts = [choice.text for choice in client.completions.create(n=3, **options).choices]
    for text in texts:
        assert re.fullmatch(pattern, text.strip()), text
    chunks = client.completions.create(stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts[0]


def test_many_prompts_with_many_completions_each(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="sql", prompt=["hello", "you"], n=3, seed=5, max_tokens=6
    )
    assert [choice.index for choice in reply.choices] == list(range(6))
    alone = client.completions.create(model="sql", prompt="you", n=3, seed=5, max_tokens=6)
    assert [c.text for c in reply.choices[3:]] == [c.text for c in alone.choices]
    texts = [""] * 6
    for chunk in client.completions.create(
        model="sql", prompt=["hello", "you"], n=3, seed=5, max_tokens=6, stream=True
    ):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
    assert texts == [choice.text for choice in reply.choices]


def test_a_chunk_has_one_choice(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "sql", "messages": MESSAGES, "seed": 5, "max_tokens": 6}
    whole = client.chat.completions.create(n=3, **options)
    deltas: list[list[Any]] = [[], [], []]
    for chunk in client.chat.completions.create(n=3, stream=True, **options):
        (choice,) = chunk.choices
        deltas[choice.index].append(choice.delta)
    for one, choice in zip(deltas, whole.choices, strict=True):
        assert [delta.role for delta in one] == ["assistant"] + [None] * (len(one) - 1)
        assert "".join(delta.content or "" for delta in one) == choice.message.content


@awaited
async def test_many_clients_at_once(server: Server, client: openai.OpenAI) -> None:
    def text(model: str, i: int) -> str:
        reply = client.completions.create(model=model, prompt=f"hello {i}", **GREEDY)
        return reply.choices[0].text

    names = list(ADAPTERS)
    expected = {(name, i): text(name, i) for name in names for i in range(3)}

    async def stream(api: openai.AsyncOpenAI, model: str, i: int) -> None:
        chunks = await api.completions.create(
            model=model, prompt=f"hello {i}", stream=True, **GREEDY
        )
        parts = [chunk.choices[0].text async for chunk in chunks]
        assert "".join(parts) == expected[model, i]

    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as api:
        await asyncio.gather(*(stream(api, names[i % 3], i % 9 // 3) for i in range(60)))


@awaited
async def test_512_streams_at_once(server: Server) -> None:
    """More than the engine's rows by far; each gets what it gets alone."""
    names = list(ADAPTERS)
    # A connection for each: the server closes those that are idle for five seconds, which this
    # client, with 512 to look after, may not see before it sends the next request.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=SECONDS, limits=limits) as http:

        async def ask(i: int, *, stream: bool) -> str:
            body = {
                "model": names[i % 3],
                "prompt": f"hello {i % 9}",
                "stream": stream,
                "max_tokens": 4,
                "temperature": 0,
            }
            reply = await http.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            if not stream:
                return str(reply.json()["choices"][0]["text"])
            *events, done = reply.text.removesuffix("\n\n").split("\n\n")
            assert done == "data: [DONE]"
            return "".join(json.loads(each[6:])["choices"][0]["text"] for each in events)

        alone = [await ask(i, stream=False) for i in range(9)]
        texts = await asyncio.gather(*(ask(i, stream=True) for i in range(512)))
        assert texts == [alone[i % 9] for i in range(512)]
