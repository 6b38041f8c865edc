"""The wire: errors, odd bodies, headers, metrics, tokens, clients that leave."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxlora.errors import (
    AdapterCapacityError,
    AdapterError,
    AdapterNotFoundError,
    AdapterRefusedError,
    GenerationError,
)
from jaxlora.outputs import Logprob
from jaxlora.server.errors import as_api_error
from jaxlora.server.logprobs import prompt_logprobs
from tests.jaxlora.server.processes import SECONDS, Server

COMPLETION = {"model": "base", "prompt": "hello", "max_tokens": 4}


def metrics(http: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(sample name, labels) -> value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }


def labels(**given: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"model_name": "base", **given}.items()))


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (b"{", 400, None, "the body is not JSON"),
        (b"", 400, None, ""),
        (b"[]", 400, None, ""),
        (b"null", 400, None, ""),
        (b'"x"', 400, None, ""),
        (b"[" * 100_000, 400, None, ""),
        (b'{"prompt": ' + b"[" * 100_000, 400, None, ""),
        (b"\xff\xfe", 400, None, ""),
        (b'{"prompt": [' + b"9" * 100_000 + b"]}", 400, None, ""),
        (b'{"prompt": "x", "seed": ' + b"9" * 1000 + b"}", 400, None, "seed="),
        (b'{"prompt": "x", "temperature": 1e999}', 400, "temperature", ""),
        (b'{"prompt": "\\ud800"}', 400, None, "the text cannot be encoded"),
        (b'{"prompt": "x", "bad_words": ["\\ud800"]}', 400, None, ""),
        (b'{"prompt": "x", "model": "\\ud800"}', 404, "model", "The model `\\ud800` does not"),
        (b'{"prompt": "x", "request_id": "\\ud800"}', 400, None, ""),
        ({"prompt": None}, 400, "prompt", "prompt: must be text, token ids, or a list of texts"),
        ({"prompt": []}, 400, "prompt", "prompt has 0 entries"),
        ({"prompt": [[]]}, 400, None, "the prompt is empty"),
        ({"prompt": ""}, 400, None, "the prompt is empty"),
        (
            {"prompt": [1, "x"]},
            400,
            "prompt",
            "prompt: must be text, token ids, or a list of texts",
        ),
        (b"[" * 10**4, 400, None, "the body is not JSON: maximum recursion depth"),
        (b'{"prompt": "\xff"}', 400, None, "the body is not JSON: 'utf-8' codec can't decode"),
        (b'{"seed": 1%s}' % (b"0" * 5000), 400, None, "the body is not JSON: Exceeds the limit"),
        (b"", 400, None, "the body must be a JSON object"),
        ({"prompt": [-1]}, 400, "prompt", ""),
        ({"prompt": [97]}, 400, None, "prompt token 97 is outside the vocabulary of 97 ids"),
        ({"prompt": "x" * 256}, 400, None, "maximum context length is 256 tokens"),
        ({"max_tokens": 252}, 400, None, "requested 257 tokens (5 in the prompt, 252 in the"),
        ({"max_tokens": 254}, 400, "max_tokens", "is greater than --max-completion-tokens=253"),
        ({"prompt": ["x"] * 300}, 400, "prompt", "300 entries"),
        ({"model": "nobody"}, 404, "model", "The model `nobody` does not exist."),
        ({"model": "base:nobody"}, 404, "model", "The model `base:nobody` does not exist."),
        ({"model": 3}, 400, "model", ""),
        ({"max_tokens": 0}, 400, "max_tokens", "max_tokens=0 must be at least 1 without echo"),
        ({"max_tokens": -1}, 400, "max_tokens", ""),
        ({"max_tokens": "many"}, 400, "max_tokens", ""),
        ({"temperature": 3}, 400, None, "temperature=3.0 must be in [0, 2]"),
        ({"temperature": 1e400}, 400, "temperature", ""),
        ({"top_p": 0}, 400, None, "top_p=0.0 must be in (0, 1]"),
        ({"top_k": -2}, 400, None, "top_k=-2"),
        ({"n": 0}, 400, "n", ""),
        ({"n": 2, "temperature": 0}, 400, None, "n=2 must be 1 when sampling is greedy"),
        ({"stop": [""]}, 400, None, "stop"),
        ({"min_tokens": 9}, 400, None, "min_tokens=9 must be in [0, 4]"),
        ({"seed": 2**70}, 400, None, "seed"),
        ({"structured_outputs": {"json": "[" * 10**5}}, 400, "json", "maximum recursion depth"),
        (
            {"use_beam_search": True, "n": 11},
            *(400, "n", "n=11 must be at most 10 with use_beam_search: ask for fewer"),
        ),
        ({"use_beam_search": True, "stop": "x"}, 400, "stop", "stop cannot be used with"),
        ({"use_beam_search": True, "echo": True, "logprobs": 1}, 400, "logprobs", ""),
        ({"logprobs": 21}, 400, None, "logprobs=21 is more than max_logprobs=20"),
        ({"logprobs": -1}, 400, None, "logprobs=-1"),
        ({"logprobs": -2}, 400, "logprobs", ""),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "logit_bias='x' must be an integer"),
        (
            {"logit_bias": {"1": "x"}},
            400,
            "logit_bias",
            "must be an object of at most 262144 token",
        ),
        ({"stop": [5]}, 400, "stop", "stop: must be text or a list of at most 65536 texts"),
        ({"top_p": 2}, 400, "top_p", "top_p=2.0 must be in (0, 1]"),
        ({"logit_bias": {"97": 1}}, 400, None, "97"),
        ({"structured_outputs": {}}, 400, None, "structured_outputs must have exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, 400, None, "exactly one"),
        ({"structured_outputs": {"regex": "("}}, 400, None, "regex"),
        ({"structured_outputs": {"regex": "\ud800"}}, 400, None, ""),
        ({"structured_outputs": {"grammar": "start: x"}}, 400, None, "unknown name"),
        ({"structured_outputs": {"json": {"type": "nonsense"}}}, 400, None, "nonsense"),
        ({"structured_outputs": {"structural_tag": "x"}}, 400, None, "must be JSON"),
        ({"structured_outputs": {"nonsense": "x"}}, 400, "structured_outputs", ""),
        ({"response_format": {"type": "structural_tag"}}, 400, None, "triggers=None must be a"),
        ({"structured_outputs": {"choice": "yes"}}, 400, "structured_outputs", ""),
        ({"structured_outputs": {"json": "{"}}, 400, None, "must be a JSON schema"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "must be given"),
        ({"response_format": {"type": "xml"}}, 400, "response_format", ""),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            *(400, "response_format", "exclude each other"),
        ),
        ({"suffix": "x"}, 400, "suffix", "suffix is not supported"),
        ({"best_of": 2}, 400, "best_of", "best_of is not supported"),
        ({"guided_choice": ["a"]}, 400, "guided_choice", "use structured_outputs"),
        ({"prompt_embeds": "AAAA"}, 400, "prompt_embeds", "give the prompt as text or token ids"),
        ({"thinking_token_budget": 0}, 400, "thinking_token_budget", "is not supported"),
        ({"stop": "x" * 5000}, 400, None, "stop has 1 strings of up to 5000 characters"),
        ({"truncate_prompt_tokens": 0}, 400, None, "truncate_prompt_tokens=0"),
    ],
)
def test_bad_requests(
    http: httpx.Client, body: bytes | dict[str, Any], status: int, param: str | None, message: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(COMPLETION | body).encode()
    for stream in (False, True):
        if isinstance(body, dict):
            content = json.dumps(COMPLETION | body | {"stream": stream}).encode()
        reply = http.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (status, status), error
        assert set(error) == {"message", "type", "param", "code"}
        assert message in error["message"]
        if param is not None:
            assert error["param"].split(".")[0] == param


def test_what_is_unknown_or_asks_for_nothing_is_ignored(http: httpx.Client) -> None:
    more = {
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "user": "me",
        "priority": 0,
        "best_of": 1,
        "suffix": "",
        "top_k": 2**40,
        "something": {"new": 1},
        "guided_json": None,
        "watermarking": False,
    }
    assert http.post("/v1/completions", json=COMPLETION | more).status_code == 200
    more |= {"repetition_penalty": 1, "stop": [], "bad_words": [], "use_beam_search": True}
    reply = http.post("/v1/completions", json=COMPLETION | more)
    assert reply.status_code == 200, reply.text


def test_null_is_a_field_s_default(http: httpx.Client) -> None:
    """Many clients send every field they know."""
    document = http.get("/openapi.json").json()
    chat = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 4}
    for path, given, absent in (
        ("/v1/completions", COMPLETION | {"temperature": 0}, {"suffix", "best_of"}),
        ("/v1/chat/completions", chat, {"top_logprobs", "tools"}),
    ):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = schema["schema"]["$ref"].rpartition("/")[2]
        fields = document["components"]["schemas"][name]["properties"].keys()
        assert absent < fields
        plain = http.post(path, json=given).json()
        nulls = http.post(path, json=dict.fromkeys(fields) | given)
        assert nulls.status_code == 200, nulls.text
        assert nulls.json()["usage"]["total_tokens"] == plain["usage"]["total_tokens"]
        assert nulls.json()["choices"] == plain["choices"]
    nulls_within = COMPLETION | {"stream": True, "stream_options": {"include_usage": None}}
    assert http.post("/v1/completions", json=nulls_within).status_code == 200


def test_a_priority_is_accepted_and_changes_no_text(http: httpx.Client) -> None:
    greedy = COMPLETION | {"temperature": 0}
    plain = http.post("/v1/completions", json=greedy).json()
    urgent = http.post("/v1/completions", json=greedy | {"priority": -3}).json()
    assert urgent["choices"][0]["text"] == plain["choices"][0]["text"]
    reply = http.post("/v1/completions", json=greedy | {"priority": "high"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "priority")


def test_a_prompt_is_truncated_when_asked(http: httpx.Client) -> None:
    greedy = COMPLETION | {"temperature": 0}
    short = http.post("/v1/completions", json=greedy | {"prompt": "llo"}).json()
    cut = http.post("/v1/completions", json=greedy | {"truncate_prompt_tokens": 3}).json()
    assert cut["usage"]["prompt_tokens"] == 3
    assert cut["choices"][0]["text"] == short["choices"][0]["text"]
    # What is repeated is what the model read, and what log-probabilities are told of.
    echo = greedy | {"truncate_prompt_tokens": 3, "echo": True, "logprobs": 0}
    (choice,) = http.post("/v1/completions", json=echo).json()["choices"]
    assert choice["text"] == "llo" + short["choices"][0]["text"]
    assert choice["logprobs"]["text_offset"][:4] == [0, 1, 2, 3]
    kept = greedy | {"truncate_prompt_tokens": 3, "truncation_side": "right", "echo": True}
    (choice,) = http.post("/v1/completions", json=kept).json()["choices"]
    assert choice["text"].startswith("hel")
    for side, text in (("right", "<s>a</s>"), ("left", "</s>b<s>")):
        special = kept | {"truncation_side": side, "prompt": "<s>a</s>b<s>"}
        (choice,) = http.post("/v1/completions", json=special).json()["choices"]
        assert choice["text"].startswith(text)
    long = greedy | {"prompt": "x" * 999, "truncate_prompt_tokens": -1}
    reply = http.post("/v1/completions", json=long).json()
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (252, 4)
    scored = http.post("/v1/completions", json=long | {"max_tokens": 0, "echo": True}).json()
    assert scored["usage"]["prompt_tokens"] == 255


def test_prompts_of_another_salt_are_not_found(http: httpx.Client) -> None:
    prompt = "what nobody else has asked so far, and is long enough"
    chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 1}
    for path, body in (
        ("/v1/completions", COMPLETION | {"prompt": prompt}),
        ("/v1/chat/completions", chat),
    ):
        for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}):
            replies = [http.post(path, json=body | salt).json() for _ in range(2)]
            details = [reply["usage"]["prompt_tokens_details"] for reply in replies]
            assert details[0]["cached_tokens"] == 0
            assert details[1]["cached_tokens"] >= 32
    for salted, status in (("", 400), ("s" * 1024, 200), ("s" * 1025, 400)):
        body = COMPLETION | {"cache_salt": salted}
        assert http.post("/v1/completions", json=body).status_code == status


def test_a_body_that_is_too_large_is_refused(http: httpx.Client) -> None:
    def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 100_000

    for content in (b"x" * 1_000_001, chunks()):
        reply = http.post("/v1/completions", content=content)
        assert reply.status_code == 413
        assert "--max-request-bytes=1000000" in reply.json()["error"]["message"]


def test_headers(http: httpx.Client) -> None:
    reply = http.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "mine-1"})
    assert (reply.headers["x-request-id"], reply.json()["id"]) == ("mine-1", "cmpl-mine-1")
    own = COMPLETION | {"request_id": "mine-2"}
    assert http.post("/v1/completions", json=own).json()["id"] == "cmpl-mine-2"
    reply = http.post("/v1/completions", json=own, headers={"X-Request-Id": "mine-3"})
    assert reply.json()["id"] == "cmpl-mine-3"
    twice = [("X-Request-Id", "mine-4"), ("X-Request-Id", "mine 5")]
    for headers, mine in ((twice, True), (twice[::-1], False)):
        reply = http.post("/v1/completions", json=COMPLETION, headers=headers)
        assert reply.json()["id"] == f"cmpl-{reply.headers['x-request-id']}"
        assert (reply.headers["x-request-id"] == "mine-4") is mine
    ids = {http.get("/version").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert "x-request-id" in http.get("/v1/nothing").headers
    preflight = {
        "Origin": "http://example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    reply = http.options("/v1/completions", headers=preflight)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "*"
    huge = http.get("/version", headers={"X-Big": "x" * 100_000})
    assert huge.status_code == 400


def test_headers_that_are_a_bomb_end_the_connection(server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    many = b"".join(b"X-%d: 1\r\n" % i for i in range(20_000))
    for headers in (b"X-Big: " + b"x" * 100_000, b"x" * 100_000, many):
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n")
            # In pieces, so that the server never has a whole header.
            with contextlib.suppress(OSError):
                for at in range(0, len(headers), 10_000):
                    connection.sendall(headers[at : at + 10_000])
                    time.sleep(0.002)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_small_routes(http: httpx.Client) -> None:
    assert (http.get("/health").status_code, http.get("/health").content) == (200, b"")
    assert http.get("/ping").status_code == http.post("/ping").status_code == 200
    assert http.get("/load").json() == {"server_load": 0}
    assert set(http.get("/version").json()) == {"version"}
    assert http.get("/nothing").json()["error"]["type"] == "NotFoundError"
    assert http.delete("/v1/completions").json()["error"]["code"] == 405


def test_the_server_itself_never_starts_jax(server: Server) -> None:
    """On a GPU it would take memory. XLA's threads have names of their own."""
    children = psutil.Process(server.process.pid).children()
    # Beside those that render templates.
    (engine,) = (each for each in children if "engine_worker" in " ".join(each.cmdline()))

    def thread_names(pid: int) -> set[str]:
        return {each.read_text().strip() for each in Path(f"/proc/{pid}/task").glob("*/comm")}

    assert "tf_XLAEigen" in thread_names(engine.pid)
    assert "tf_XLAEigen" not in thread_names(server.process.pid)


def test_the_playground_is_one_page_that_asks_for_nothing_else(http: httpx.Client) -> None:
    reply = http.get("/")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=|https?://|@import", reply.text)
    routes = re.findall(r'fetch\("([^"]+)"', reply.text)
    assert set(routes) == {"v1/models", "v1/chat/completions"}
    # It must not write what a model says as HTML.
    assert "innerHTML" not in reply.text


def test_tokens(http: httpx.Client) -> None:
    reply = http.post("/tokenize", json={"prompt": "abc", "return_token_strs": True}).json()
    assert reply == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [65, 66, 67],
        "token_strs": ["a", "b", "c"],
    }
    messages = [{"role": "user", "content": "a"}]
    chat = http.post("/tokenize", json={"messages": messages, "model": "sql"}).json()
    text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<s>user: a assistant: "
    chat = http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})
    assert chat.json()["count"] == len(text) - len("<s>assistant: ") + 1
    for more in (
        {"chat_template_kwargs": {"add_generation_prompt": True}},
        {"chat_template": "{{ x }}"},
    ):
        assert http.post("/tokenize", json={"messages": messages} | more).status_code == 400
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/tokenize", json={"prompt": "a", "model": "x"}).status_code == 404
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert http.post("/detokenize", json={"tokens": [96]}).status_code == 200
    refused = http.post("/detokenize", json={"tokens": [3, 97]})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "token 97 is outside the vocabulary of 97 ids"


def test_parts_of_a_content_may_be_plain_texts(http: httpx.Client) -> None:
    def prompt_of(content: Any) -> list[int]:
        reply = http.post("/tokenize", json={"messages": [{"role": "user", "content": content}]})
        assert reply.status_code == 200, reply.text
        return reply.json()["tokens"]

    parts = ["hello", {"type": "text", "text": "x"}]
    assert prompt_of(parts) == prompt_of("hello\nx")
    chat = {"max_tokens": 4, "temperature": 0, "echo": True, "add_generation_prompt": False}
    chat |= {"continue_final_message": True}
    texts = []
    for content in (parts, "hello\nx"):
        given = chat | {"messages": [{"role": "user", "content": content}]}
        reply = http.post("/v1/chat/completions", json=given)
        assert reply.status_code == 200, reply.text
        texts.append(reply.json()["choices"][0]["message"]["content"])
    assert texts[0] == texts[1]
    assert texts[0].startswith("hello\nx")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ["x", 5]}]}, "or a list of at most 65536 parts"),
        ({"messages": [{"role": "user", "content": ["x"] * 65537}]}, "at most 65536 parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
        ({"chat_template": "{{ x }}"}, "chat_template is not supported"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs may not have tokenize",
        ),
        (
            {"chat_template_kwargs": {"conversations": 1}},
            "chat_template_kwargs may not have conversations",
        ),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs may not have self"),
        ({"chat_template_kwargs": {"documents": 5}}, "the chat template refuses these messages"),
        ({"continue_final_message": True}, ""),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
            "the arguments of a call of None are no JSON",
        ),
        ({"functions": [{"name": "f"}]}, "functions is not supported: use tools"),
        ({"tool_choice": "required"}, "tool_choice='required' is not supported"),
        ({"top_logprobs": 2}, "top_logprobs can only be given when logprobs is true"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "is not supported"),
        ({"max_completion_tokens": 300}, "--max-completion-tokens=253"),
        ({"stream_options": {"include_usage": True}}, "can only be given when stream is true"),
    ],
)
def test_bad_chats(http: httpx.Client, body: dict[str, Any], message: str) -> None:
    given = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2} | body
    reply = http.post("/v1/chat/completions", json=given)
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenized(http: httpx.Client) -> None:
    text = "x" * 100_000
    # Four bytes of text are the most that a token has, of which "</s>" is one.
    message = (
        "This model's maximum context length is 256 tokens. However, you requested at least 25002 "
        "tokens (at least 25000 in the prompt, 2 in the completion). Please reduce one of them."
    )
    reply = http.post("/v1/completions", json=COMPLETION | {"prompt": ["a", text], "max_tokens": 2})
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, message)
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    reply = http.post("/v1/chat/completions", json=chat)
    assert reply.status_code == 400
    assert "you requested at least 2500" in reply.json()["error"]["message"]
    # What is cut is not too long, and counting has no limit.
    cut = COMPLETION | {"prompt": text, "truncate_prompt_tokens": 5}
    assert http.post("/v1/completions", json=cut).json()["usage"]["prompt_tokens"] == 5
    assert http.post("/tokenize", json={"prompt": text}).json()["count"] == len(text)


def test_no_completion_is_longer_than_the_model_recommends(http: httpx.Client) -> None:
    for asked, got in ((249, 249), (251, 250)):
        body = COMPLETION | {"prompt": "hello", "max_tokens": asked, "ignore_eos": True}
        reply = http.post("/v1/completions", json=body).json()
        assert reply["usage"]["completion_tokens"] == got
        assert reply["choices"][0]["finish_reason"] == "length"
    body = {"messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["completion_tokens"] == min(250, 256 - usage["prompt_tokens"])


def test_metrics_count_what_was_asked(http: httpx.Client) -> None:
    before = metrics(http)
    for model, count in (("base", 2), ("sql", 3)):
        for _ in range(count):
            body = {"model": model, "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200
    chunks = http.post("/v1/completions", json=COMPLETION | {"stream": True, "ignore_eos": True})
    assert chunks.text.endswith("data: [DONE]\n\n")
    after = metrics(http)

    def grown(name: str, **given: str) -> float:
        key = (name, labels(**given))
        return after[key] - before.get(key, 0)

    assert grown("vllm:request_success_total", finished_reason="length") == 6
    assert grown("vllm:prompt_tokens_total") == 30
    assert grown("vllm:generation_tokens_total") == 24
    assert grown("jaxlora:generation_tokens_total", adapter="sql") == 12
    assert grown("jaxlora:prompt_tokens_total", adapter="") == 15
    assert grown("jaxlora:requests_total", adapter="sql", finished_reason="length") == 3
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_time_per_output_token_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        assert grown(f"vllm:{name}_count") == 6
    assert grown("vllm:request_prompt_tokens_sum") == 30
    assert grown("vllm:request_generation_tokens_sum") == 24
    assert grown("jaxlora:time_to_first_token_seconds_count", adapter="sql") == 3
    assert grown("vllm:e2e_request_latency_seconds_sum") >= grown(
        "vllm:time_to_first_token_seconds_sum"
    )
    # Whole pages only, and a prompt here is shorter than one.
    assert grown("vllm:prefix_cache_queries_total") == 30
    assert grown("vllm:prefix_cache_hits_total") == 0
    assert grown("vllm:num_preemptions_total") == 0
    assert grown("vllm:inter_token_latency_seconds_count") == 18
    assert (
        0
        < grown("vllm:inter_token_latency_seconds_sum")
        <= grown("vllm:request_decode_time_seconds_sum")
    )
    assert grown("jaxlora:compilations_total") == 0
    assert after["vllm:num_requests_running", labels()] == 0
    assert after["vllm:num_requests_waiting", labels()] == 0
    assert after["vllm:kv_cache_usage_perc", labels()] == 0
    cache = (("block_size", "16"), ("num_gpu_blocks", "24"))
    assert after["vllm:cache_config_info", cache] == 1


def test_metrics_count_the_beams_of_a_search(http: httpx.Client) -> None:
    before = metrics(http)
    body = COMPLETION | {"model": "sql", "n": 3, "use_beam_search": True, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    after = metrics(http)
    ended = labels(adapter="sql", finished_reason="length")
    for key in (
        ("vllm:request_success_total", labels(finished_reason="length")),
        ("jaxlora:requests_total", ended),
    ):
        assert after[key] - before.get(key, 0) == 3


def test_the_time_of_a_token_is_that_of_its_completion(http: httpx.Client) -> None:
    name = "vllm:request_time_per_output_token_seconds_sum"
    before = metrics(http)
    body = COMPLETION | {"n": 4, "max_tokens": 11, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    after = metrics(http)
    decode = "vllm:request_decode_time_seconds_sum"
    seconds = after[decode, labels()] - before[decode, labels()]
    assert after[name, labels()] - before[name, labels()] == pytest.approx(seconds / 10)


def test_metrics_have_the_types_that_dashboards_expect(http: httpx.Client) -> None:
    families = {
        family.name: family.type
        for family in text_string_to_metric_families(http.get("/metrics").text)
    }
    expected = {
        "gauge": "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info "
        "lora_requests_info",
        "counter": "prefix_cache_queries prefix_cache_hits num_preemptions prompt_tokens "
        "generation_tokens request_success",
        "histogram": "time_to_first_token_seconds inter_token_latency_seconds "
        "request_time_per_output_token_seconds e2e_request_latency_seconds "
        "request_queue_time_seconds",
    }
    for kind, names in expected.items():
        for name in names.split():
            assert families[f"vllm:{name}"] == kind, name


def test_the_gateway_s_metric_lists_adapters_that_are_ready(http: httpx.Client) -> None:
    http.post("/v1/completions", json=COMPLETION | {"model": "sql"})
    ((name, found),) = [key for key in metrics(http) if key[0] == "vllm:lora_requests_info"]
    info = dict(found)
    assert (info["max_lora"], info["waiting_lora_adapters"]) == ("4", "")
    assert "sql" in info["running_lora_adapters"].split(",")
    assert abs(metrics(http)[name, found] - time.time()) < 60
    now = {name: value for (name, _), value in metrics(http).items()}
    assert now["jaxlora:adapter_writes_total"] >= now["jaxlora:adapters_resident"] >= 1
    assert now["jaxlora:adapter_host_bytes"] > now["jaxlora:adapters_on_host"] >= 1
    assert now["jaxlora:adapter_staged_bytes"] == 0
    residency = [
        dict(found) for name, found in metrics(http) if name == "jaxlora:adapter_residency"
    ]
    assert {"adapter": "sql", "tier": "device", "pinned": "false", "rank": "8"}.items() <= next(
        each for each in residency if each["adapter"] == "sql"
    ).items()


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (AdapterNotFoundError("gone"), 404, "NotFoundError"),
        (AdapterRefusedError("odd"), 400, "BadRequestError"),
        (AdapterCapacityError("no slot"), 503, "ServiceUnavailableError"),
    ],
)
def test_what_is_wrong_with_an_adapter_has_its_status(
    error: AdapterError, status: int, kind: str
) -> None:
    told = as_api_error(error).body()["error"]
    assert (told["code"], told["type"], told["message"]) == (status, kind, str(error))


def test_what_ended_a_request_is_told_to_its_client() -> None:
    told = as_api_error(GenerationError("structured_outputs: too costly")).body()["error"]
    assert (told["code"], told["type"]) == (500, "InternalServerError")
    assert told["message"] == "structured_outputs: too costly"


def test_log_probabilities_that_are_no_numbers_are_the_lowest() -> None:
    values = {3: float("nan"), 4: float("-inf"), 5: -0.5}
    (told,) = prompt_logprobs([{key: Logprob(value) for key, value in values.items()}])
    assert told is not None
    assert [each["logprob"] for each in told.values()] == [-9999.0, -9999.0, -0.5]


def test_a_constraint_that_is_too_costly_is_its_client_s(http: httpx.Client) -> None:
    """Which is found out after its first token."""
    names = [f"p{i}" for i in range(3000)]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    body = COMPLETION | {"structured_outputs": {"json": schema}, "max_tokens": 30}
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 400
    assert "max is 2000" in reply.json()["error"]["message"]
    # Nothing can be of this one.
    body = COMPLETION | {"structured_outputs": {"json": {"$ref": "#"}}}
    assert http.post("/v1/completions", json=body).status_code == 400


def test_a_client_that_leaves_cancels_its_request(server: Server, http: httpx.Client) -> None:
    def running() -> float:
        return metrics(http)["vllm:num_requests_running", labels()]

    # Far more than is done before the client leaves, however busy the machine is.
    body = COMPLETION | {"max_tokens": 250, "ignore_eos": True, "n": 100}
    impatient = httpx.Timeout(SECONDS, read=0.05)
    before = metrics(http)["vllm:generation_tokens_total", labels()]
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        next(reply.iter_bytes())
    for more in ({}, {"use_beam_search": True, "n": 10}, {"prompt": ["a", "b"]}):
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body | more, timeout=impatient)
    # What was sent last may not have been looked at yet, and is not running then.
    server.wait_for(lambda: http.get("/load").json() == {"server_load": 0} and not running())
    assert metrics(http)["vllm:generation_tokens_total", labels()] - before < 2000


def test_the_log_has_no_prompts(server: Server, http: httpx.Client) -> None:
    http.post("/v1/completions", json=COMPLETION | {"prompt": "a secret prompt"})
    http.post("/v1/completions?key=a-secret-query", json=COMPLETION)
    http.get("/a%0Aforged line")
    log = server.log.read_text()
    assert '"POST /v1/completions" 200' in log
    assert "secret" not in log
    assert "\nforged" not in log
