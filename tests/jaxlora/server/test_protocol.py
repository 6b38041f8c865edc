"""Requests that are wrong in a million places cost no more than those that are wrong in one."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

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
        (CompletionRequest, {"prompt": [1.5] * MANY}),
        (CompletionRequest, {"prompt": [[]] * MANY + ["x"]}),
        (CompletionRequest, {"prompt": [[-1] * MANY]}),
        (CompletionRequest, COMPLETION | {"stop": [1] * MANY}),
        (CompletionRequest, COMPLETION | {"bad_words": [1] * MANY}),
        (CompletionRequest, COMPLETION | {"stop_token_ids": [-1] * MANY}),
        (CompletionRequest, COMPLETION | {"allowed_token_ids": ["x"] * MANY}),
        (CompletionRequest, COMPLETION | {"logit_bias": {str(i): "x" for i in range(MANY)}}),
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
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [1] * MANY}]}),
        (ChatCompletionRequest, CHAT | {"tools": [1] * MANY}),
        (TokenizeRequest, {"messages": [{}] * MANY}),
        (DetokenizeRequest, {"tokens": ["x"] * MANY}),
    ],
)
def test_only_the_first_error_is_told(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() == 1
