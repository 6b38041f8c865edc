"""Bodies are refused by what they would be parsed to, before they are parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.server.body import MAX_CONTAINERS, _num_containers
from tests.jaxlora.server.test_app import app, run

LISTS = b"[]," * (MAX_CONTAINERS - 1) + b"[]"

texts = st.text(st.sampled_from('[{]}"\\/a\u1234\n')) | st.text()
values = st.recursive(
    st.none() | st.floats() | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


def num_lists_and_objects(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + sum(map(num_lists_and_objects, inner))


@given(value=values, ascii_only=st.booleans(), spaces=st.booleans())
def test_what_opens_outside_of_texts_is_counted(value: Any, ascii_only: bool, spaces: bool) -> None:
    indent = 1 if spaces else None
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert _num_containers(text.encode("utf-8", "surrogatepass")) == num_lists_and_objects(value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # One less, and the rest of the request makes it too many.
        (b'{"prompt": [%s]}' % LISTS[3:], f"the body has {MAX_CONTAINERS + 1} lists and objects"),
        (b'{"prompt": "x", "more": {"\\"": [%s]}}' % LISTS, f"at most {MAX_CONTAINERS}"),
        (b'{"prompt": [%s]}' % LISTS[6:], f"prompt has {MAX_CONTAINERS - 2} entries"),
        (b'{"prompt": "%s", "n": 0}' % (b'\\"[{' * MAX_CONTAINERS), "n: "),
        (b'{"prompt": "%s", "n": [1]}' % LISTS, "n: "),
        # What is a quote there cannot be told without knowing the encoding.
        ('{"prompt": "x"}'.encode("utf-16"), "the body is not JSON"),
        ('{"prompt": "x"}'.encode("utf-16-le"), "the body is not JSON"),
    ],
    ids=["lists", "ignored", "few enough", "texts", "text and list", "utf-16", "utf-16-le"],
)
def test_a_body_of_too_many_lists_is_not_parsed(body: bytes, message: str) -> None:
    async def main() -> None:
        async with app() as each:
            headers = {"content-type": "application/json"}
            reply = await each.client.post("/v1/completions", content=body, headers=headers)
            assert reply.status_code == 400
            assert message in reply.json()["error"]["message"]

    run(main)


def test_a_byte_order_mark_is_no_part_of_a_body() -> None:
    async def main() -> None:
        async with app() as each:
            body = json.dumps({"prompt": [1, 2], "max_tokens": 1}).encode("utf-8-sig")
            headers = {"content-type": "application/json"}
            reply = await each.client.post("/v1/completions", content=body, headers=headers)
            assert reply.status_code == 200

    run(main)
