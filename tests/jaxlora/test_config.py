"""config.json: every key that could change the mathematics is served or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from jaxlora import ConfigError, EngineArgs
from jaxlora.config import ModelConfig

LLAMA: dict[str, Any] = {
    **transformers.LlamaConfig(num_hidden_layers=2).to_dict(),
    "architectures": ["LlamaForCausalLM"],
}


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("Llama", "llama"), ("Mistral", "mistral"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3")],
)
def test_a_default_configuration_is_read(family: str, architecture: str) -> None:
    hf = getattr(transformers, f"{family}Config")()
    config = ModelConfig.from_hf({**hf.to_dict(), "architectures": [f"{family}ForCausalLM"]})
    assert config.architecture == architecture
    assert config.num_layers == hf.num_hidden_layers
    assert config.q_size == hf.num_attention_heads * config.head_dim
    assert config.sliding_window == (4096 if family == "Mistral" else None)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 2e5},
        {"rope_theta": 2e5, "rope_scaling": None},
        {"rope_theta": 2e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 3e5}},
        {"rope_theta": 2e5, "rope_scaling": {"rope_type": "default", "rope_theta": 3e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 4e5}},
        {"rope_theta": 2e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5},
            "rope_parameters": {"rope_type": "default", "rope_theta": 4e5},
        },
    ],
)
def test_rotary_positions_are_those_of_transformers(rope: dict[str, Any]) -> None:
    """Whatever the spelling, and where several are given."""
    hf = {key: value for key, value in LLAMA.items() if not key.startswith("rope_")} | rope
    expected = transformers.LlamaConfig(**copy.deepcopy(hf)).rope_parameters
    config = ModelConfig.from_hf(hf)
    assert config.rope_theta == expected["rope_theta"]
    scaling = config.rope_scaling
    assert (scaling.kind if scaling else "default") == expected["rope_type"]
    assert (scaling.factor if scaling else None) == expected.get("factor")


def test_llama_3_1_as_published() -> None:
    """The older spelling: rope_theta and rope_scaling at the top level, torch_dtype."""
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 128256,
    }
    config = ModelConfig.from_hf(hf)
    assert config.head_dim == 128
    assert config.rope_theta == 500000.0
    assert config.rope_scaling is not None
    assert config.rope_scaling.kind == "llama3"
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"num_key_value_heads": 7}, "num_key_value_heads"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_hf(LLAMA | changes)


def test_what_tools_note_in_a_configuration_is_no_reason_to_refuse_it() -> None:
    noted = {
        "unsloth_fixed": True,
        "unsloth_version": "2026.4.7",
        "_attn_implementation_autoset": True,
        "attn_implementation": "sdpa",
        "tokenizer_class": "LlamaTokenizer",
    }
    assert ModelConfig.from_hf(LLAMA | noted) == ModelConfig.from_hf(LLAMA)


def test_a_window_on_some_layers_only_is_refused() -> None:
    hf = transformers.Qwen2Config(use_sliding_window=True, max_window_layers=1).to_dict()
    with pytest.raises(ConfigError, match="sliding_window"):
        ModelConfig.from_hf({**hf, "architectures": ["Qwen2ForCausalLM"]})


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


def test_vllms_options_without_meaning_warn() -> None:
    with pytest.warns(UserWarning, match="option enforce_eager=True has no effect here"):
        args = EngineArgs("m", enforce_eager=True)
    assert args == EngineArgs(model="m")
    assert dataclasses.replace(args, seed=3) == EngineArgs("m", seed=3)


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
        ({"seed": None}, "seed=None must be an integer"),
        ({"max_logprobs": None}, "max_logprobs=None must be an integer"),
        ({"num_gpu_blocks_override": 1.5}, "num_gpu_blocks_override=1.5 must be an integer"),
        ({"num_gpu_blocks_override": 0}, "num_gpu_blocks_override=0 must be at least 1"),
        ({"enable_lora": "false"}, "enable_lora='false' must be True or False"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules='q_proj' must be a list of"),
        ({"lora_extras": 5}, "lora_extras=5 must be a list"),
        ({"lora_extras": ["dora", 5]}, "lora_extras=5 must be a string"),
        ({"quantization": "awq"}, "quantization='awq' is not served: use the unquantized"),
    ],
)
@pytest.mark.usefixtures("without_types")
def test_options_of_another_type_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        EngineArgs(**{"model": "m"} | options)
    assert EngineArgs(Path("a/b")).model == "a/b"  # type: ignore[arg-type]
