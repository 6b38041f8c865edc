"""Conversations as chat templates expect them, which is not quite as OpenAI's API has them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxlora.errors import RequestError

# What the template is given by other means, or what would change how it is called.
_RESERVED = frozenset(
    """self conversation conversations messages tools chat_template add_generation_prompt
    continue_final_message tokenize sanitize_control_tokens padding truncation max_length
    return_tensors return_dict tokenizer_kwargs return_assistant_tokens_mask""".split()
)


def check_variables(given: Mapping[str, Any]) -> None:
    """Raises RequestError for ``chat_template_kwargs`` that are not a template's own variables."""
    if reserved := sorted(_RESERVED & given.keys()):
        raise RequestError(f"chat_template_kwargs may not have {', '.join(reserved)}")


def as_templates_expect(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their content as text, the arguments of tool calls as objects instead of
    JSON, and without fields that are null or calls that are none: so clients send a reply back.

    Raises RequestError for what is no message, a part of a content that is no text, and arguments
    that are no JSON.
    """
    given: Any = messages
    if isinstance(given, Iterator):
        given = list(given)
    if not isinstance(given, Iterable) or not all(isinstance(each, Mapping) for each in given):
        raise RequestError(
            f"messages must be objects with role and content, got {reprlib.repr(given)}"
        )
    return [_message(message) for message in given]


def text_of(content: Any) -> Any:
    """A message's content, which may be null or a list of parts, as text. Raises RequestError for
    a part that is none."""
    if content is None:
        return ""
    return "\n".join(map(_text_of_part, content)) if isinstance(content, list) else content


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in message.items() if value is not None}
    fields["content"] = text_of(message.get("content"))
    calls = fields.get("tool_calls")
    if isinstance(calls, list):
        fields["tool_calls"] = [_tool_call(call) for call in calls]
        if not calls:
            del fields["tool_calls"]
    return fields


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part  # Not OpenAI's way, but vLLM's.
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
    if kind != "text":
        raise RequestError(f"a message has a part of type {kind!r}; only text is served")
    if not isinstance(text, str):
        raise RequestError(f"a message has a text part whose text is {reprlib.repr(text)}")
    return text


def _tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str | None):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(
                f"the arguments of a call of {function.get('name')!r} are no JSON: {error}"
            ) from error
    return {**call, "function": {**function, "arguments": arguments}}
