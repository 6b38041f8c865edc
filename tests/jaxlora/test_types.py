from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlora.types import BeamSearchParams, LoRARequest, RequestOutputKind, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("n", 0, "in [1, 16384]"),
        ("n", 10**9, "in [1, 16384]"),
        ("presence_penalty", 2.1, "in [-2, 2]"),
        ("presence_penalty", float("nan"), "in [-2, 2]"),
        ("frequency_penalty", -2.1, "in [-2, 2]"),
        ("repetition_penalty", 0.0, "in [1e-30, 1e+30]"),
        ("repetition_penalty", -1.0, "in [1e-30, 1e+30]"),
        ("repetition_penalty", 1e-40, "in [1e-30, 1e+30]"),
        ("repetition_penalty", float("inf"), "in [1e-30, 1e+30]"),
        ("repetition_penalty", float("nan"), "in [1e-30, 1e+30]"),
        ("logprobs", -2, "-1 (all) or at least 0"),
        ("prompt_logprobs", -5, "-1 (all) or at least 0"),
        ("logit_bias", {3: float("inf")}, "of values in [-1e+30, 1e+30]"),
        ("logit_bias", {3: 1e308}, "of values in [-1e+30, 1e+30]"),
        ("allowed_token_ids", (), "not empty"),
        ("bad_words", ("a", ""), "without an empty string"),
        ("temperature", -0.1, "in [0, 2]"),
        ("temperature", 2.1, "in [0, 2]"),
        ("temperature", float("nan"), "in [0, 2]"),
        ("temperature", float("inf"), "in [0, 2]"),
        ("top_p", 0.0, "in (0, 1]"),
        ("top_p", 1.5, "in (0, 1]"),
        ("top_p", float("nan"), "in (0, 1]"),
        ("top_k", -2, "-1 or 0 (off), or at least 1"),
        ("min_p", -0.5, "in [0, 1]"),
        ("min_p", 1.5, "in [0, 1]"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -3, "at least 1"),
        ("min_tokens", 17, "in [0, 16]"),
        ("min_tokens", -1, "in [0, 16]"),
        ("seed", 2**64, "a 64-bit integer"),
        ("seed", -(2**63) - 1, "a 64-bit integer"),
        ("stop", ["a", ""], "without an empty string"),
        ("stop", [""], "without an empty string"),
    ],
)
def test_what_is_out_of_range_is_named(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r} must be {expected}")):
        SamplingParams(**{field: value})


def test_params_may_be_changed_and_have_no_other_names() -> None:
    params = SamplingParams(max_tokens=4)
    params.max_tokens = 5
    assert params == SamplingParams(max_tokens=5)
    assert hash(params) == hash(SamplingParams(max_tokens=5))
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    with pytest.raises(AttributeError, match="max_token"):
        params.max_token = 6  # type: ignore[attr-defined]


def test_of_a_long_value_the_beginning_is_named() -> None:
    with pytest.raises(ValueError, match=r"stop=\['a', .*\.\.\. must be") as refusal:
        SamplingParams(stop=["a"] * 10_000 + [""])
    assert len(str(refusal.value)) < 500


def test_of_many_biases_the_first_that_is_out_of_range_is_named() -> None:
    with pytest.raises(ValueError, match=re.escape("logit_bias={2: inf} must be of values in")):
        SamplingParams(logit_bias={1: 1.0, 2: float("inf"), 3: float("inf")})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n": 1.5}, "n=1.5 must be an integer"),
        ({"seed": 0.5}, "seed=0.5 must be an integer"),
        ({"seed": "1"}, "seed='1' must be an integer"),
        ({"top_k": float("inf")}, "top_k=inf must be an integer"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 must be an integer"),
        ({"min_tokens": None}, "min_tokens=None must be an integer"),
        ({"logprobs": 1.5}, "logprobs=1.5 must be an integer"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs=1.5 must be an integer"),
        ({"stop_token_ids": [1, 2.0]}, "stop_token_ids=2.0 must be an integer"),
        ({"stop_token_ids": 5}, "stop_token_ids=5 must be a list"),
        ({"allowed_token_ids": [None]}, "allowed_token_ids=None must be an integer"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"top_p": None}, "top_p=None must be a number"),
        ({"presence_penalty": "x"}, "presence_penalty='x' must be a number"),
        ({"stop": 5}, "stop=5 must be a list"),
        ({"stop": [b"x"]}, "stop=b'x' must be a string, or several"),
        ({"bad_words": [5]}, "bad_words=5 must be a string, or several"),
        ({"logit_bias": [1]}, "logit_bias=[1] must be a mapping of token ids to numbers"),
        ({"logit_bias": {"a": 1}}, "logit_bias='a' must be an integer"),
        ({"logit_bias": {1: "a"}}, "logit_bias='a' must be a number"),
        ({"logit_bias": {1: 10**400}}, "000... must be a number that a float can hold"),
        ({"logit_bias": {"9" * 5000: 1}}, "999... must be an integer"),
        ({"seed": 10**5000}, "seed=a huge int must be a 64-bit integer"),
        ({"ignore_eos": "false"}, "ignore_eos='false' must be true or false"),
        ({"skip_special_tokens": None}, "skip_special_tokens=None must be true or false"),
        ({"include_stop_str_in_output": 0}, "include_stop_str_in_output=0 must be true or false"),
        ({"output_kind": "DELTA"}, "output_kind='DELTA' must be a RequestOutputKind"),
    ],
)
@pytest.mark.usefixtures("without_types")
def test_what_is_of_another_type_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(**params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"beam_width": 1.5, "max_tokens": 1}, "beam_width=1.5 must be an integer"),
        ({"beam_width": 1, "max_tokens": "1"}, "max_tokens='1' must be an integer"),
        ({"beam_width": 1, "max_tokens": 1, "length_penalty": "x"}, "must be a number"),
        ({"beam_width": 1, "max_tokens": 1, "ignore_eos": "no"}, "must be true or false"),
    ],
)
@pytest.mark.usefixtures("without_types")
def test_beams_of_another_type_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BeamSearchParams(**params)


@pytest.mark.usefixtures("without_types")
def test_integers_may_be_of_any_type() -> None:
    numbers: Any = np.arange(5)
    params = SamplingParams(seed=numbers[3], top_k=numbers[4], stop_token_ids=list(numbers[:2]))
    assert (params.seed, params.top_k, params.stop_token_ids) == (3, 4, (0, 1))
    assert type(params.seed) is int
    floats = SamplingParams(temperature=np.float32(0.5), logit_bias={"5": 1})
    assert (floats.temperature, floats.logit_bias) == (0.5, {5: 1.0})


@pytest.mark.usefixtures("without_types")
def test_booleans_may_be_of_numpy() -> None:
    flags: Any = np.array([True, False])
    params = SamplingParams(ignore_eos=flags[0], detokenize=flags[1])
    assert (params.ignore_eos, params.detokenize) == (True, False)
    assert type(params.ignore_eos) is type(params.detokenize) is bool
    with pytest.raises(ValueError, match=r"ignore_eos=.* must be true or false"):
        SamplingParams(ignore_eos=flags[:1])


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop=\[''\] must be without an empty string"):
        SamplingParams(stop="")


def test_min_tokens_without_max_tokens() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=1000).min_tokens == 1000
    with pytest.raises(ValueError, match="min_tokens=-1 must be at least 0"):
        SamplingParams(max_tokens=None, min_tokens=-1)


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValueError, match=r"stop=\['a'\] must be empty when detokenize is off"):
        SamplingParams(stop="a", detokenize=False)


def test_greedy_completions_would_all_be_the_same() -> None:
    with pytest.raises(ValueError, match=r"n=2 must be 1 when sampling is greedy"):
        SamplingParams(n=2, temperature=0)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 1e-3},
        {"repetition_penalty": 5},
        {"logprobs": -1, "prompt_logprobs": 20},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"logit_bias": {}},
        {"n": 1000},
        {"temperature": 2},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"min_p": 1},
        {"max_tokens": 1},
        {"max_tokens": None},
        {"min_tokens": 16},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
    ],
)
def test_the_ends_of_ranges_are_allowed(params: dict[str, Any]) -> None:
    SamplingParams(**params)


def test_defaults_are_those_of_vllm() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "stop_token_ids": (),
        "bad_words": (),
        "include_stop_str_in_output": False,
        "ignore_eos": False,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": True,
        "logit_bias": None,
        "allowed_token_ids": None,
        "structured_outputs": None,
        "output_kind": RequestOutputKind.CUMULATIVE,
    }


@pytest.mark.parametrize(
    ("params", "shapes"),
    [
        ({}, False),
        ({"logprobs": 3, "top_k": 4, "min_tokens": 2, "bad_words": [], "logit_bias": {}}, False),
        ({"presence_penalty": -1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"repetition_penalty": 0.5}, True),
        ({"logit_bias": {0: 0.0}}, True),
        ({"allowed_token_ids": [0]}, True),
        ({"bad_words": ["a"]}, True),
    ],
)
def test_what_shapes_logits(params: dict[str, Any], shapes: bool) -> None:
    assert SamplingParams(**params).shapes_logits is shapes


def test_stops_are_taken_over_as_tuples() -> None:
    stops, ids = ["a", "b"], [1, 2]
    params = SamplingParams(stop=stops, stop_token_ids=ids)
    stops.append("")
    ids.append(-1)
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert hash(params) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(1, 2)))


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9e-6, True), (1e-5, False)])
def test_greedy_is_a_temperature_below_a_limit(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_a_lora_request_is_positional() -> None:
    request = LoRARequest("sql_adapter", 1, "/path")
    assert (request.lora_name, request.lora_int_id, request.lora_path) == (
        "sql_adapter",
        1,
        "/path",
    )
    assert LoRARequest("a") == LoRARequest("a", None, "", None)


@pytest.mark.parametrize("lora_int_id", [0, -1])
def test_a_lora_id_is_positive(lora_int_id: int) -> None:
    with pytest.raises(ValueError, match=f"^id must be > 0, got {lora_int_id}$"):
        LoRARequest("x", lora_int_id)


@pytest.mark.usefixtures("without_types")
def test_a_lora_id_is_an_integer() -> None:
    with pytest.raises(ValueError, match=r"lora_int_id=1\.5 must be an integer"):
        LoRARequest("x", 1.5)


@pytest.mark.usefixtures("without_types")
def test_loading_in_place_is_asked_for_or_not() -> None:
    with pytest.raises(ValueError, match="load_inplace='no' must be true or false"):
        LoRARequest("x", 1, load_inplace="no")


@pytest.mark.usefixtures("without_types")
def test_a_lora_path_may_be_a_path() -> None:
    assert LoRARequest("x", 1, Path("a/b")).lora_path == "a/b"


@pytest.mark.usefixtures("without_types")
def test_a_lora_request_is_of_text() -> None:
    for wrong in ({"lora_name": 5}, {"lora_name": "x", "lora_path": 5}):
        with pytest.raises(ValueError, match="=5 must be a"):
            LoRARequest(**wrong)
    with pytest.raises(ValueError, match=r"tensors={'a': 1} must be left to .*from_tensors"):
        LoRARequest("x", tensors={"a": 1})


@pytest.mark.usefixtures("without_types")
@pytest.mark.parametrize(
    ("tensors", "config", "field"),
    [([1], {}, "tensors"), ({5: 1}, {}, "tensors"), ({}, None, "config"), ({}, [1], "config")],
)
def test_tensors_have_names_and_a_configuration(tensors: Any, config: Any, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}="):
        LoRARequest.from_tensors("x", tensors, config)


def test_a_lora_request_needs_a_name() -> None:
    with pytest.raises(ValueError, match="lora_name must not be empty"):
        LoRARequest("", 1)
