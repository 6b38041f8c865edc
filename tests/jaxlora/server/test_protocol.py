"""Requests that are wrong in a million places cost no more than those that are wrong in one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from jaxlora.server import protocol
from jaxlora.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

MANY = 1000
COMPLETION = {"prompt": "x"}
CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, COMPLETION | {"bad_words": [1] * MANY}),
        (CompletionRequest, COMPLETION | {"stop_token_ids": [-1] * MANY}),
        (CompletionRequest, COMPLETION | {"allowed_token_ids": ["x"] * MANY}),
        (CompletionRequest, COMPLETION | {"structured_outputs": {"choice": [1] * MANY}}),
        (
            CompletionRequest,
            COMPLETION | {"response_format": {"type": "structural_tag", "structures": [1] * MANY}},
        ),
        (
            CompletionRequest,
            COMPLETION | {"response_format": {"type": "structural_tag", "triggers": [1] * MANY}},
        ),
        (ChatCompletionRequest, {"messages": [{}] * MANY}),
        (ChatCompletionRequest, CHAT | {"tools": [1] * MANY}),
        (TokenizeRequest, {"messages": [{}] * MANY}),
        (DetokenizeRequest, {"tokens": ["x"] * MANY}),
    ],
)
def test_only_the_first_error_is_told(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("model", "body", "kinds"),
    [
        (CompletionRequest, {"prompt": [1.5] * MANY}, 4),
        (CompletionRequest, {"prompt": [[]] * MANY + ["x"]}, 4),
        (CompletionRequest, {"prompt": [[-1] * MANY]}, 4),
        (CompletionRequest, COMPLETION | {"stop": [1] * MANY}, 2),
        (CompletionRequest, COMPLETION | {"logit_bias": {str(i): "x" for i in range(MANY)}}, 1),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}, 3),
    ],
)
def test_of_each_form_only_the_first_error_is_made(
    model: type[BaseModel], body: dict[str, Any], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message replaces what was told of them, so it is counted where that is made."""
    made: list[int] = []

    class Counted(PydanticCustomError):
        def __new__(cls, *args: Any) -> Counted:
            inner = sys.exception()
            assert isinstance(inner, ValidationError)
            made.append(inner.error_count())
            return super().__new__(cls, *args)

    monkeypatch.setattr(protocol, "PydanticCustomError", Counted)
    with pytest.raises(ValidationError):
        model.model_validate(body)
    assert made == [kinds]


@pytest.mark.parametrize("name", ["stop", "bad_words", "stop_token_ids", "allowed_token_ids"])
def test_lists_that_are_far_too_long_are_refused_as_such(name: str) -> None:
    element: Any = 1 if name.endswith("ids") else "x"
    body = COMPLETION | {name: [element] * (1 + (1 << 18))}
    with pytest.raises(ValidationError, match=r"at most (65536|262144) (texts|items)"):
        CompletionRequest.model_validate(body)
