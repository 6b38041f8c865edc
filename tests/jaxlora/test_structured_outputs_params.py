from __future__ import annotations

import json
import re
from typing import Any

import pytest

from jaxlora import SamplingParams, StructuredOutputsParams

_TAG = {"begin": "<f>", "schema": {}, "end": "</f>"}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


_DEEP: dict[str, Any] = {}
for _ in range(10_000):
    _DEEP = {"items": _DEEP}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "none"),
        ({"json_object": False}, "none"),
        ({"regex": "a", "choice": ["a"]}, "regex, choice"),
        ({"json": _SCHEMA, "grammar": "start: /a/", "json_object": True}, "json, grammar, json_ob"),
    ],
)
def test_there_is_exactly_one_constraint(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"must have exactly one of json, .*; it has {named}"):
        StructuredOutputsParams(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json": "{"}, "json='{' must be a JSON schema: "),
        ({"json": "[]"}, "json='[]' must be a JSON schema: an object, true or false"),
        ({"json": {"a": {1}}}, "json={'a': {1}} must be a JSON schema: "),
        ({"choice": []}, "choice=[] must be one or more strings"),
        ({"choice": "ab"}, "choice='ab' must be one or more strings"),
        ({"json_object": "false"}, "json_object='false' must be true or false"),
        ({"json": {}, "disable_any_whitespace": "no"}, "disable_any_whitespace='no' must be true"),
        ({"regex": ""}, "regex='' must not be empty"),
        ({"grammar": ""}, "grammar='' must not be empty"),
        ({"structural_tag": "{"}, "structural_tag='{' must be JSON: "),
        ({"structural_tag": {"format": {}}}, "other formats are not served"),
        ({"structural_tag": {"structures": [_TAG]}}, "triggers=None must be a list of one or more"),
        ({"structural_tag": {"triggers": [""]}}, "triggers has '', which makes no sense there"),
        ({"structural_tag": {"triggers": ["<"], "structures": []}}, "structures=[] must be a list"),
        (
            {"structural_tag": {"triggers": ["<g"], "structures": [_TAG]}},
            "begin='<f>' must start with one of ['<g']",
        ),
        (
            {"structural_tag": {"triggers": ["<"], "structures": [_TAG | {"schema": "{}"}]}},
            "schema='{}' must be a JSON schema, an object",
        ),
        (
            {"structural_tag": {"triggers": ["<"], "structures": [_TAG | {"end": 1}]}},
            "end=1 must be a text",
        ),
        ({"json": "[" * 100_000}, "[... must be a JSON schema: maximum recursion depth"),
        ({"structural_tag": "[" * 100_000}, "[... must be JSON: maximum recursion depth"),
        ({"json": _DEEP}, "json=a huge dict must be a JSON schema: maximum recursion depth"),
        ({"regex": 5}, "regex=5 must be a text"),
        ({"grammar": ["x"]}, "grammar=['x'] must be a text"),
        ({"choice": [1, 2]}, "choice=1 must be a string"),
        ({"json": {}, "whitespace_pattern": 5}, "whitespace_pattern=5 must be a text"),
        ({"regex": "a", "whitespace_pattern": " "}, "applies to json and json_object only"),
        ({"choice": ["a"], "disable_any_whitespace": True}, "applies to json and json_object"),
        (
            {"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "},
            "exclude each other",
        ),
    ],
)
@pytest.mark.usefixtures("without_types")
def test_what_is_no_constraint_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StructuredOutputsParams(**given)


def test_a_schema_is_kept_as_text() -> None:
    as_object = StructuredOutputsParams(json=_SCHEMA)
    as_text = StructuredOutputsParams(json=json.dumps(_SCHEMA))
    assert as_object == as_text
    assert hash(as_object) == hash(as_text)
    assert StructuredOutputsParams(json=True).json == "true"


def test_it_is_a_sampling_parameter() -> None:
    constraint = StructuredOutputsParams(choice=["yes", "no"])
    assert constraint.choice == ("yes", "no")
    assert SamplingParams(structured_outputs=constraint).structured_outputs is constraint
