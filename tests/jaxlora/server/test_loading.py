"""Loading and unloading over HTTP: each row of the table, beside traffic that must not notice."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.numpy import load_file, save_file

from tests.jaxlora.peft_models import KINDS, Reference
from tests.jaxlora.server.processes import SECONDS, Server
from tests.jaxlora.tiny_tokenizer import encode

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def load(http: httpx.Client, name: str, path: str | Path, **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path)} | fields
    return http.post("/v1/load_lora_adapter", json=body)


def unload(http: httpx.Client, name: str) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def complete(http: httpx.Client, model: str, prompt: str = "hello you") -> list[int]:
    body = {"model": model, "prompt": prompt, "return_token_ids": True} | GREEDY
    reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    ids: list[int] = reply.json()["choices"][0]["token_ids"]
    return ids


def copy(reference: Reference, name: str, to: Path, **config: Any) -> Path:
    """A copy of an adapter, with changes to its adapter_config.json."""
    shutil.copytree(reference.paths[name], to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return to


def test_an_adapter_is_loaded_used_and_unloaded(http: httpx.Client, reference: Reference) -> None:
    reply = load(http, "new", reference.paths["r1-all"])
    assert (reply.status_code, reply.text) == (
        200,
        "Success: LoRA adapter 'new' added successfully.",
    )
    assert reply.headers["content-type"].startswith("text/plain")
    card = http.get("/v1/models").json()["data"][-1]
    assert (card["id"], card["parent"]) == ("new", "base")
    assert card["root"] == reference.paths["r1-all"]
    reference.check_greedy(encode("hello you"), complete(http, "new"), "r1-all")
    reply = unload(http, "new")
    assert (reply.status_code, reply.text) == (
        200,
        "Success: LoRA adapter 'new' removed successfully.",
    )
    reply = http.post("/v1/completions", json={"model": "new", "prompt": "x"})
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "The model `new` does not exist."


BOTH = "Both 'lora_name' and 'lora_path' must be provided."
ALREADY = (
    "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place, "
    "set 'load_inplace' to True."
)


@pytest.mark.parametrize(
    ("body", "status", "kind", "message"),
    [
        ({}, 400, "InvalidUserInput", BOTH),
        ({"lora_name": "x"}, 400, "InvalidUserInput", BOTH),
        ({"lora_path": "x"}, 400, "InvalidUserInput", BOTH),
        ({"lora_name": "", "lora_path": "x"}, 400, "InvalidUserInput", BOTH),
        (
            {"lora_name": "base", "lora_path": "x"},
            *(400, "BadRequestError"),
            "The lora adapter 'base' conflicts with a served base model.",
        ),
        (
            {"lora_name": "alias", "lora_path": "x"},
            *(400, "BadRequestError"),
            "The lora adapter 'alias' conflicts with a served base model.",
        ),
        ({"lora_name": "sql", "lora_path": "x"}, 400, "InvalidUserInput", ALREADY),
        (
            {"lora_name": "x", "lora_path": "x", "base_model_name": "y" * 257},
            *(400, "BadRequestError"),
            "base_model_name must have at most 256 characters",
        ),
        (
            {"lora_name": "x", "lora_path": "/nowhere/x"},
            *(404, "NotFoundError"),
            "Loading lora x failed: No adapter found for /nowhere/x",
        ),
        (
            {"lora_name": "x", "lora_path": "."},
            *(404, "NotFoundError"),
            "Loading lora x failed: No adapter found for .",
        ),
        *(
            (
                {"lora_name": "x", "lora_path": path},
                *(404, "NotFoundError"),
                f"Loading lora x failed: No adapter found for {path}",
            )
            for path in ("x" * 5000, "/" + "x" * 5000, "~nobody-of-that-name/x", "a\0b")
        ),
    ],
)
def test_loads_that_are_refused(
    http: httpx.Client, body: dict[str, str], status: int, kind: str, message: str
) -> None:
    for route in ("/v1/load_lora_adapter", "/load_lora_adapter"):
        reply = http.post(route, json=body)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (status, status)
        assert (error["type"], error["message"]) == (kind, message)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "'lora_name' needs to be provided to unload a LoRA adapter."),
        ({"lora_name": "nobody"}, 404, "The lora adapter 'nobody' cannot be found."),
        ({"lora_int_id": 99}, 404, "The lora adapter '99' cannot be found."),
    ],
)
def test_unloads_that_are_refused(
    http: httpx.Client, body: dict[str, Any], status: int, message: str
) -> None:
    for route in ("/v1/unload_lora_adapter", "/unload_lora_adapter"):
        reply = http.post(route, json=body)
        assert (reply.status_code, reply.json()["error"]["message"]) == (status, message)


def test_bad_adapters_are_refused_with_the_reason(
    http: httpx.Client, reference: Reference, tmp_path: Path
) -> None:
    high = reference.add("high", tmp_path, r=32, target_modules=["q_proj"]).lora_path
    reference.delete("high")
    broken = copy(reference, "r8-qv", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    odd = copy(reference, "r8-qv", tmp_path / "odd", bias="all")
    other = copy(reference, "r8-qv", tmp_path / "other")
    (other / "added_tokens.json").write_text('{"<s>": 95, "<think>": 90}')
    for path, message in (
        (high, "LoRA rank 32 is greater than max_lora_rank 16."),
        (broken, "adapter_model.safetensors is truncated or damaged"),
        (odd, "Adapter bias is not supported."),
        (other, "start the engine with the adapter's (tokenizer)"),
        (other, "folder: 90 <think>"),
    ):
        reply = load(http, "bad", path)
        error = reply.json()["error"]
        assert (reply.status_code, error["type"]) == (500, "InternalServerError")
        assert message in error["message"]
        assert "Traceback" not in reply.text
    assert load(http, "bad", reference.paths["r8-qv"]).status_code == 200


def test_in_place_reload_is_another_version(
    http: httpx.Client, reference: Reference, tmp_path: Path
) -> None:
    path = copy(reference, "r1-all", tmp_path / "adapter")
    assert load(http, "live", path).status_code == 200
    old = complete(http, "live")
    shutil.rmtree(path)
    copy(reference, "r16-all", path)
    assert complete(http, "live") == old
    assert load(http, "live", path).status_code == 400
    assert load(http, "live", path, load_inplace=True).status_code == 200
    new = complete(http, "live")
    reference.check_greedy(encode("hello you"), old, "r1-all")
    reference.check_greedy(encode("hello you"), new, "r16-all")
    # A reload that fails leaves what there was.
    (path / "adapter_model.safetensors").write_bytes(b"no")
    assert load(http, "live", path, load_inplace=True).status_code == 500
    assert complete(http, "live") == new
    ids = [card["id"] for card in http.get("/v1/models").json()["data"]]
    assert ids.count("live") == 1


def test_an_adapter_brings_its_chat_template(
    http: httpx.Client, reference: Reference, tmp_path: Path
) -> None:
    path = copy(reference, "r1-all", tmp_path / "adapter")
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    messages = [{"role": "user", "content": "hello"}]

    def count(model: str) -> int:
        body = {"model": model, "messages": messages}
        return int(http.post("/tokenize", json=body).json()["count"])

    assert load(http, "own", path).status_code == 200
    assert (count("own"), count("base")) == (6, len("user: hello assistant: ") + 1)
    # Tools, and a request's own variables, reach it.
    text = "{{ messages[0].content }} {{ tools[0].function.name }} {{ mood }} "
    text += "{{ documents[0].text }} {{ enable_thinking }} {{ add_generation_prompt }}"
    (path / "chat_template.jinja").write_text(text)
    assert load(http, "own", path, load_inplace=True).status_code == 200
    body = {
        "model": "own",
        "messages": messages,
        "max_tokens": 1,
        "return_token_ids": True,
        "tools": [{"type": "function", "function": {"name": "look_up"}}],
        "tool_choice": "auto",
        "chat_template_kwargs": {"mood": "glad"},
        "documents": [{"text": "doc"}],
        "reasoning_effort": "none",
        "add_generation_prompt": False,
    }
    reply = http.post("/v1/chat/completions", json=body).json()
    assert reply["prompt_token_ids"] == encode("hello look_up glad doc False False")
    assert http.post("/tokenize", json=body).json()["tokens"] == reply["prompt_token_ids"]
    # With a template for tools of its own, that.
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (path / "chat_template.jinja").write_text("none")
    assert load(http, "own", path, load_inplace=True).status_code == 200
    for tools, text in ((body["tools"], "tools"), (None, "none")):
        reply = http.post("/tokenize", json=body | {"tools": tools}).json()
        assert reply["tokens"] == encode(text)
    (path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    reply = load(http, "own", path, load_inplace=True)
    assert "chat_template.jinja cannot be read: 'utf-8'" in reply.json()["error"]["message"]
    # What a template makes of a few words is bounded too.
    (path / "chat_template.jinja").write_text("{{ 'x' * 10**7 }}")
    assert load(http, "own", path, load_inplace=True).status_code == 200
    reply = http.post("/v1/chat/completions", json={"model": "own", "messages": messages})
    assert reply.status_code == 400
    assert "10000000 characters" in reply.json()["error"]["message"]
    # And how long it takes, during which others are answered.
    (path / "chat_template.jinja").write_text("{% set n = messages|length + 6 %}{{ n**30000000 }}")
    assert load(http, "own", path, load_inplace=True).status_code == 200
    with ThreadPoolExecutor() as threads:
        body = {"model": "own", "messages": messages}
        slow = threads.submit(http.post, "/v1/chat/completions", json=body)
        num_others = 0
        while not slow.done():
            assert http.post("/tokenize", json={"prompt": "x"}).status_code == 200
            num_others += 1
    assert num_others > 3
    assert slow.result().status_code == 400
    assert "it takes more than 2 s" in slow.result().json()["error"]["message"]


def test_fifty_bad_loads_change_no_token_of_a_running_stream(
    http: httpx.Client, client: openai.OpenAI, reference: Reference, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 200}
    quiet = client.completions.create(model="sql", prompt="hello", **options).choices[0].text
    compilations = _metric(http, "jaxlora:compilations_total")
    truncated = copy(reference, "r1-all", tmp_path / "truncated")
    file = truncated / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    high = copy(reference, "r16-all", tmp_path / "high", r=64)
    bad: list[Callable[[], httpx.Response]] = [
        lambda: load(http, "bad", truncated),
        lambda: load(http, "bad", high),
        lambda: load(http, "bad", "/nowhere"),
        lambda: load(http, "sql", reference.paths["r1-all"]),
        lambda: http.post("/v1/load_lora_adapter", content=b"{" * 1000),
    ]
    texts: list[str] = []
    stop = threading.Event()

    def stream() -> None:
        while not stop.is_set():
            chunks = client.completions.create(model="sql", prompt="hello", stream=True, **options)
            texts.append("".join(chunk.choices[0].text for chunk in chunks))

    thread = threading.Thread(target=stream)
    thread.start()
    for number in range(50):
        assert bad[number % len(bad)]().status_code >= 400
    stop.set()
    thread.join()
    assert texts
    assert set(texts) == {quiet}
    assert _metric(http, "jaxlora:compilations_total") == compilations


def test_more_adapters_than_slots_and_host_copies_loaded_and_used_at_once(
    server: Server, http: httpx.Client, reference: Reference
) -> None:
    """14 of them and two more, with 4 slots and --max-cpu-loras 2."""
    names = [f"{kind}-{i}" for i in range(2) for kind in KINDS]
    failures: list[BaseException] = []

    def one(name: str) -> None:
        try:
            with httpx.Client(base_url=server.url, timeout=SECONDS) as own:
                kind = name.rpartition("-")[0]
                assert load(own, name, reference.paths[kind]).status_code == 200
                for prompt in ("hello", "and then"):
                    ids = complete(own, name, prompt)
                    tokens.append((prompt, ids, kind))
        except BaseException as error:  # noqa: BLE001  raised again in the test's own thread
            failures.append(error)

    tokens: list[tuple[str, list[int], str]] = []
    threads = [threading.Thread(target=one, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for prompt, ids, kind in tokens:
        reference.check_greedy(encode(prompt), ids, kind)


def _metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name}{{")).rpartition(" ")[2])


@pytest.mark.parametrize("name", ["\ud800", "two\nlines", "\x1b[31m", "a,b", "x" * 257])
def test_names_that_could_not_be_shown_are_refused(
    http: httpx.Client, reference: Reference, name: str
) -> None:
    """Of which one made /v1/models and /metrics unreadable."""
    body = json.dumps({"lora_name": name, "lora_path": reference.paths["r8-qv"]})
    headers = {"content-type": "application/json"}
    reply = http.post("/v1/load_lora_adapter", content=body, headers=headers)
    assert reply.status_code == 400
    assert "must have 1 to 256 printable characters, and no comma" in reply.text
    cards = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["base", "alias", "sql", "json"]
    assert http.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "base:new",
        "base:base:x",
        "\u540d e\u0301",
        "a/b:c d",
        "/a//b/",
        "/",
        "%2F",
        "a?b#c&d",
        "../x",
    ],
)
def test_odd_names_are_served(
    http: httpx.Client, client: openai.OpenAI, reference: Reference, name: str
) -> None:
    assert load(http, name, reference.paths["r8-qv"]).status_code == 200
    complete(http, name)
    assert f'adapter="{name}"' in http.get("/metrics").text
    assert name in [model.id for model in client.models.list()]
    # With and without the base model's name in front, as in a request.
    for model in (name, f"base:{name}", f"alias:{name}"):
        complete(http, model)
        assert client.models.retrieve(model).id == model


def test_an_adapter_that_overflows_is_told_of(
    http: httpx.Client, reference: Reference, tmp_path: Path
) -> None:
    """Each of its numbers is finite; what they make of a prompt is not."""
    path = copy(reference, "r16-all", tmp_path / "large") / "adapter_model.safetensors"
    save_file({key: each * 1e25 for key, each in load_file(path).items()}, path)
    assert load(http, "large", path.parent).status_code == 200
    told = {"model": "large", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}
    chat = told | {"messages": [{"role": "user", "content": "hello"}]}
    text, talk = "/v1/completions", "/v1/chat/completions"
    for route, body in (
        (text, told),
        (text, told | {"logprobs": 2, "echo": True}),
        (text, told | {"logprobs": 2, "n": 2, "use_beam_search": True}),
        (text, told | {"prompt_logprobs": 2}),
        (text, told | {"temperature": 0, "stream": True}),
        (talk, chat),
        (talk, chat | {"logprobs": True, "stream": True}),
    ):
        reply = http.post(route, json=body)
        assert reply.status_code == 500, reply.text
        assert "the arithmetic overflowed" in reply.json()["error"]["message"]
    reference.check_greedy(encode("hello you"), complete(http, "sql"), "r8-qv")
