"""What an engine can be asked for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from jaxlora import ConfigError, EngineArgs


@pytest.mark.parametrize(
    "options",
    [
        {"max_loras": 0},
        {"max_model_len": 0},
        {"gpu_memory_utilization": 1.5},
        {"dtype": "int8"},
    ],
)
def test_engine_args_name_option_and_value(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ConfigError, match=name) as refused:
        EngineArgs(model="somewhere", **options)
    assert repr(value) in str(refused.value)


def test_vllms_other_names_of_types() -> None:
    args = EngineArgs("m", dtype="half", lora_dtype="float")
    assert args == EngineArgs("m", dtype="float16", lora_dtype="float32")


def test_vllms_options_without_meaning_warn() -> None:
    with pytest.warns(UserWarning, match="option enforce_eager=True has no effect here"):
        args = EngineArgs("m", enforce_eager=True)
    assert args == EngineArgs(model="m")
    assert dataclasses.replace(args, seed=3) == EngineArgs("m", seed=3)
    with pytest.warns(UserWarning, match="option disable_log_requests=True has no effect here"):
        assert EngineArgs("m", disable_log_requests=True, pipeline_parallel_size=1) == args


@pytest.mark.parametrize(
    ("option", "value"),
    [("pipeline_parallel_size", 2), ("data_parallel_size", 2), ("kv_cache_dtype", "fp8")],
)
def test_what_is_served_in_one_way_only_is_refused_in_another(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option}={value!r} is not served, only"):
        EngineArgs("m", **{option: value})


def test_the_share_of_memory_has_two_names_and_one_value() -> None:
    assert EngineArgs("m").gpu_memory_utilization == 0.9
    args = EngineArgs("m", hbm_utilization=0.5)
    assert args == EngineArgs("m", gpu_memory_utilization=0.5)
    assert dataclasses.replace(args, seed=3).gpu_memory_utilization == 0.5
    for share in (0.5, 0.9):
        with pytest.raises(TypeError, match="hbm_utilization and gpu_memory_utilization are one"):
            EngineArgs("m", hbm_utilization=0.5, gpu_memory_utilization=share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 1.5}, "max_num_seqs=1.5 must be an integer"),
        ({"max_loras": "8"}, "max_loras='8' must be an integer"),
        ({"max_model_len": "32k"}, "max_model_len='32k' must be an integer"),
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
        ({"gpu_memory_utilization": "x"}, "gpu_memory_utilization='x' must be a number"),
        ({"model": 5}, "model=5 must be a path"),
        ({"tokenizer": 5}, "tokenizer=5 must be a path"),
        ({"max_loras": None}, "max_loras=None must be an integer"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": None}, "seed=None must be an integer"),
        ({"max_logprobs": None}, "max_logprobs=None must be an integer"),
        ({"stream_interval": 0}, "stream_interval=0 must be at least 1"),
        ({"num_gpu_blocks_override": 1.5}, "num_gpu_blocks_override=1.5 must be an integer"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override=0 must be at least 1"),
        ({"enable_lora": "false"}, "enable_lora='false' must be true or false"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules='q_proj' must be a list of"),
        ({"hf_overrides": "{}"}, "hf_overrides='{}' must be a dict"),
        ({"hf_overrides": {5: 6}}, "hf_overrides=5 must be a string"),
        ({"lora_extras": 5}, "lora_extras=5 must be a list"),
        ({"lora_extras": ["dora", 5]}, "lora_extras=5 must be a string"),
        ({"quantization": "awq"}, "quantization='awq' is not served: use the unquantized"),
    ],
)
@pytest.mark.usefixtures("without_types")
def test_options_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineArgs(**{"model": "m"} | options)
    assert EngineArgs(Path("a/b")).model == "a/b"
