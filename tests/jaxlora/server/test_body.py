"""Bodies are refused by what they would be parsed to, before they are parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlora.server.body import MAX_COMMAS, MAX_CONTAINERS, _num_outside_texts
from tests.jaxlora.awaited import awaited
from tests.jaxlora.server.test_app import app

LISTS = b"[]," * (MAX_CONTAINERS - 1) + b"[]"

texts = st.text(st.sampled_from('[{]}"\\/a\u1234\n')) | st.text()
values = st.recursive(
    st.none() | st.floats() | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


def num_lists_and_commas(value: Any) -> tuple[int, int]:
    """Objects count as lists."""
    if not isinstance(value, list | dict):
        return 0, 0
    inner = value.values() if isinstance(value, dict) else value
    counts = [(1, max(len(value) - 1, 0)), *map(num_lists_and_commas, inner)]
    lists, commas = map(sum, zip(*counts, strict=True))
    return lists, commas


@given(value=values, ascii_only=st.booleans(), spaces=st.booleans())
def test_what_is_outside_of_texts_is_counted(value: Any, ascii_only: bool, spaces: bool) -> None:
    indent = 1 if spaces else None
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    body = text.encode("utf-8", "surrogatepass")
    counts = _num_outside_texts(body, b"[{"), _num_outside_texts(body, b",")
    assert counts == num_lists_and_commas(value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # One less, and the rest of the request makes it too many.
        (b'{"prompt": [%s]}' % LISTS[3:], f"the body has {MAX_CONTAINERS + 1} lists and objects"),
        (b'{"prompt": "x", "more": {"\\"": [%s]}}' % LISTS, f"at most {MAX_CONTAINERS}"),
        (b'{"prompt": [%s]}' % LISTS[6:], f"prompt has {MAX_CONTAINERS - 2} entries"),
        (b'{"prompt": "%s", "n": 0}' % (b'\\"[{' * MAX_CONTAINERS), "n: "),
        (b'{"prompt": "%s", "n": [1]}' % LISTS, "n: "),
        (b'{"prompt": [%s7]}' % (b"7," * (MAX_COMMAS + 1)), f"{MAX_COMMAS + 1} commas outside"),
        (b'{"prompt": "%s", "n": 0}' % (b"," * (MAX_COMMAS + 1)), "n: "),
        # What is a quote there cannot be told without knowing the encoding.
        ('{"prompt": "x"}'.encode("utf-16"), "the body is not JSON"),
        ('{"prompt": "x"}'.encode("utf-16-le"), "the body is not JSON"),
    ],
    ids="lists ignored few_enough texts text_and_list ids commas utf-16 utf-16-le".split(),
)
@awaited
async def test_a_body_of_too_much_is_not_parsed(body: bytes, message: str) -> None:
    async with app() as each:
        headers = {"content-type": "application/json"}
        reply = await each.client.post("/v1/completions", content=body, headers=headers)
        assert reply.status_code == 400
        assert message in reply.json()["error"]["message"]


@awaited
async def test_a_byte_order_mark_is_no_part_of_a_body() -> None:
    async with app() as each:
        body = json.dumps({"prompt": [1, 2], "max_tokens": 1}).encode("utf-8-sig")
        headers = {"content-type": "application/json"}
        reply = await each.client.post("/v1/completions", content=body, headers=headers)
        assert reply.status_code == 200
