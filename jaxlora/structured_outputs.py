"""What a completion's text must be like: JSON of a schema, a pattern, one of several, a grammar."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlora.checks import boolean, convert, require, strings, wrong

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one constraint on a completion's text, under vLLM's names.

    ``json`` is a JSON schema, as text or as what it parses to (kept as text); ``regex`` a pattern
    that the whole text matches; ``choice`` the texts to choose from; ``grammar`` a context-free
    grammar in Lark's or llama.cpp's notation; ``json_object`` any JSON object. ``structural_tag``
    is free text in which each of some ``triggers`` begins one of some ``structures``: JSON of a
    ``schema`` between a ``begin`` and an ``end``. It is an object with these two lists, or text of
    one. With ``disable_any_whitespace`` JSON has no space between its tokens;
    ``whitespace_pattern`` is a regular expression for what may stand there instead.

    Raises ValueError unless there is exactly one constraint, or if a schema is no JSON.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    @property
    def kind(self) -> str:
        """Which of them it is."""
        return self._kinds()[0]

    def __post_init__(self) -> None:
        convert(self, boolean, "json_object", "disable_any_whitespace", optional=True)
        self._check_kinds()
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            require(name, value, value is None or isinstance(value, str), "a text")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", _tag_text(self.structural_tag))
        if self.choice is not None:
            if isinstance(self.choice, str) or not self.choice:
                raise ValueError(f"choice={self.choice!r} must be one or more strings")
            object.__setattr__(self, "choice", strings("choice", self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value == "":
                raise ValueError(f"{name}={value!r} must not be empty")
        self._check_whitespace()

    def _kinds(self) -> list[str]:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if self.json_object is False:
            given.remove("json_object")
        return given

    def _check_kinds(self) -> None:
        given = self._kinds()
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs must have exactly one of {', '.join(_KINDS)}; it has "
                f"{', '.join(given) or 'none'}"
            )

    def _check_whitespace(self) -> None:
        for name in ("disable_any_whitespace", "whitespace_pattern"):
            value = getattr(self, name)
            if value and self.json is None and not self.json_object:
                raise ValueError(f"{name}={value!r} applies to json and json_object only")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise ValueError(
                f"whitespace_pattern={self.whitespace_pattern!r} and disable_any_whitespace "
                "exclude each other"
            )


def of_response_format(given: Any) -> StructuredOutputsParams | None:
    """What OpenAI's ``response_format`` asks for, or vLLM's for JSON within a text; None for any
    text. Raises ValueError."""
    expected = "an object whose type is text, json_object, json_schema or structural_tag"
    require("response_format", given, isinstance(given, Mapping), expected)
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return StructuredOutputsParams(json_object=True)
        case "structural_tag":
            return StructuredOutputsParams(structural_tag=given)
        case "json_schema":
            named = given.get("json_schema")
            schema = named.get("schema") if isinstance(named, Mapping) else None
            require("response_format", given, schema is not None, "given with json_schema.schema")
            return StructuredOutputsParams(json=schema)
    raise wrong("response_format", given, expected)


def _schema_text(schema: Any) -> str:
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        text = schema if isinstance(schema, str) else json.dumps(schema)
    except (ValueError, TypeError, RecursionError) as error:
        raise wrong("json", schema, f"a JSON schema: {error}") from error
    if not isinstance(parsed, Mapping | bool):
        raise wrong("json", schema, "a JSON schema: an object, true or false")
    return text


def _tag_text(tag: Any) -> str:
    """A structural tag as text. Raises ValueError for what is none."""
    try:
        parsed = json.loads(tag) if isinstance(tag, str) else tag
        text = tag if isinstance(tag, str) else json.dumps(tag)
    except (ValueError, TypeError, RecursionError) as error:
        raise wrong("structural_tag", tag, f"JSON: {error}") from error
    if not isinstance(parsed, Mapping) or "format" in parsed:
        expected = "an object with 'structures' and 'triggers'; other formats are not served"
        raise wrong("structural_tag", tag, expected)
    triggers = _several(parsed, "triggers", str)
    for each in _several(parsed, "structures", Mapping):
        begin, schema, end = (each.get(name) for name in ("begin", "schema", "end"))
        if not (isinstance(begin, str) and begin.startswith(tuple(triggers))):
            raise ValueError(f"structural_tag: begin={begin!r} must start with one of {triggers}")
        if not isinstance(end, str):
            raise ValueError(f"structural_tag: end={end!r} must be a text")
        if not isinstance(schema, Mapping):
            raise ValueError(f"structural_tag: schema={schema!r} must be a JSON schema, an object")
    return text


def _several(tag: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values = tag.get(name)
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"structural_tag: {name}={values!r} must be a list of one or more")
    for each in values:
        # An empty trigger would begin everywhere.
        if not isinstance(each, kind) or each == "":
            raise ValueError(f"structural_tag: {name} has {each!r}, which makes no sense there")
    return list(values)
