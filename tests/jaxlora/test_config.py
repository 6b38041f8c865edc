"""config.json: every key that could change the mathematics is served or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers

from jaxlora import ConfigError
from jaxlora.config import ModelConfig, overridden

LLAMA: dict[str, Any] = {
    **transformers.LlamaConfig(num_hidden_layers=2).to_dict(),
    "architectures": ["LlamaForCausalLM"],
}


def test_the_first_architecture_that_is_served_counts() -> None:
    listed = ["GPT2LMHeadModel", "MistralForCausalLM", "LlamaForCausalLM"]
    for names in (listed, tuple(listed)):
        assert ModelConfig.from_hf(LLAMA | {"architectures": names}).architecture == "mistral"


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
    assert expected is not None
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


NO_MSCALE = {"mscale": 1.0, "mscale_all_dim": -1.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta": 1}}, "beta"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0.5}}, "beta_fast"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0} | NO_MSCALE}, "mscale_all"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_slow": -1}}, "beta_slow"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 8.0}},
            "high_freq_factor=4.0 must be more",
        ),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}},
            "high_freq_factor=4.0 must be more",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": "awq"}, "awq"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor=None"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": "high"}}, "rope_theta='high'"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings='long'"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_hidden_layers": 2.7}, "num_hidden_layers=2.7, which must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"vocab_size": "32000"}, "vocab_size='32000'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false', .* true or false"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": 0}}, "truncate=0"),
        ({"head_dim": 15}, "heads of 15 .* even"),
        ({"hidden_size": 16, "head_dim": None}, "heads of 0"),
        ({"eos_token_id": "2"}, "eos_token_id='2'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"num_key_value_heads": 7}, "num_key_value_heads"),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "sliding_window": 8,
                "layer_types": ["chunked_attention"],
            },
            "chunked_attention",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 8, "layer_types": 3},
            "layer_types=3",
        ),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "max_window_layers": None,
            },
            "max_window_layers=None",
        ),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_hf(LLAMA | changes)


@pytest.mark.parametrize(
    ("stored", "scaling", "most"),
    [
        (40960, {"original_max_position_embeddings": 32768}, 131072),
        (131072, {"original_max_position_embeddings": 32768}, 131072),
        (32768, {}, 131072),
    ],
)
def test_yarn_says_how_long_contexts_may_be(
    stored: int, scaling: dict[str, Any], most: int
) -> None:
    """It is added to a config whose other keys are left alone, as Qwen's model cards have it."""
    changes = {"rope_scaling": {"type": "yarn", "factor": 4.0} | scaling}
    config = ModelConfig.from_hf(LLAMA | {"max_position_embeddings": stored} | changes)
    assert config.max_position_embeddings == most


def test_what_tools_note_in_a_configuration_is_no_reason_to_refuse_it() -> None:
    """Nor what older versions of transformers wrote."""
    noted = {
        "unsloth_fixed": True,
        "unsloth_version": "2026.4.7",
        "_attn_implementation_autoset": True,
        "attn_implementation": "sdpa",
        "tokenizer_class": "LlamaTokenizer",
        "_flash_attn_2_enabled": True,
        "max_sequence_length": 2048,
        "length_penalty": 1.0,
        "num_beam_groups": 1,
        "num_return_sequences": 1,
        "typical_p": 1.0,
    }
    assert ModelConfig.from_hf(LLAMA | noted) == ModelConfig.from_hf(LLAMA)


def test_yarn_may_note_that_it_was_trained_with() -> None:
    """As the models of the paper's authors do."""
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
    plain, noted = (
        ModelConfig.from_hf(LLAMA | {"rope_scaling": yarn | note})
        for note in ({}, {"finetuned": True})
    )
    assert plain == noted


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("family", "changes", "window", "sees_past"),
    [
        ("Qwen2", {"layer_types": [FULL, SLIDING]}, 64, True),
        ("Qwen3", {"layer_types": [SLIDING, SLIDING]}, 64, False),
        ("Qwen3", {"layer_types": [FULL, FULL]}, None, False),
        ("Qwen2", {"layer_types": None, "max_window_layers": 0}, 64, False),
        ("Qwen2", {"layer_types": None, "max_window_layers": 1}, 64, True),
        ("Qwen3", {"layer_types": None, "max_window_layers": 2}, None, False),
        ("Qwen2", {"layer_types": [FULL, SLIDING], "use_sliding_window": False}, None, False),
        ("Mistral", {}, 64, False),
    ],
)
def test_a_window_is_known_by_the_layers_that_have_it(
    family: str, changes: dict[str, Any], window: int | None, sees_past: bool
) -> None:
    hf = getattr(transformers, f"{family}Config")(num_hidden_layers=2).to_dict()
    hf |= {"sliding_window": 64, "use_sliding_window": True} | changes
    config = ModelConfig.from_hf({**hf, "architectures": [f"{family}ForCausalLM"]})
    assert (config.sliding_window, config.sees_past_window) == (window, sees_past)


FIVE: dict[str, Any] = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
FOUR: dict[str, Any] = {"rope_theta": 5e5}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("stored", "overrides", "theta", "factor"),
    [
        (FIVE, {}, 5e5, None),
        (FIVE, {"rope_scaling": LINEAR}, 5e5, 2.0),
        (FIVE, {"rope_parameters": LINEAR}, 5e5, 2.0),
        (FIVE, {"rope_parameters": LINEAR | {"rope_theta": 7e5}}, 7e5, 2.0),
        (FIVE, {"rope_theta": 7e5}, 7e5, None),
        (FIVE, {"rope_theta": 7e5, "rope_scaling": LINEAR}, 7e5, 2.0),
        (FOUR, {"rope_parameters": LINEAR}, 5e5, 2.0),
        (FOUR, {"rope_theta": 7e5}, 7e5, None),
        ({"rope_scaling": LINEAR | {"rope_theta": 5e5}}, {"rope_theta": 7e5}, 7e5, 2.0),
        ({"rope_scaling": LINEAR}, {"rope_parameters": LINEAR | {"factor": 4.0}}, 10000.0, 4.0),
        ({"rope_parameters": LINEAR | {"rope_theta": 5e5}}, {"rope_scaling": None}, 5e5, None),
    ],
)
def test_overrides_leave_the_rest_of_rotary_positions(
    stored: dict[str, Any], overrides: dict[str, Any], theta: float, factor: float | None
) -> None:
    hf = {key: value for key, value in LLAMA.items() if not key.startswith("rope_")} | stored
    config = ModelConfig.from_hf(overridden(hf, overrides))
    scaling = config.rope_scaling
    assert (config.rope_theta, scaling.factor if scaling else None) == (theta, factor)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("max_position_embeddings", "max_position_embeddings"),
        ("rms_norm_eps", "rms_norm_eps"),
        ("num_key_value_heads", "num_kv_heads"),
        ("head_dim", "head_dim"),
    ],
)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_key_that_is_not_there_is_what_transformers_takes(
    family: str, key: str, field: str
) -> None:
    kind = getattr(transformers, f"{family}Config")
    hf = {**kind().to_dict(), "architectures": [f"{family}ForCausalLM"]}
    hf.pop(key, None)
    got, expected = getattr(ModelConfig.from_hf(hf), field), getattr(kind.from_dict(hf), key, None)
    # Of what a family's configuration does not have, transformers' layers take the quotient.
    assert got == (expected or hf["hidden_size"] // hf["num_attention_heads"])


@pytest.mark.parametrize("use", [True, False])
@pytest.mark.parametrize("window", [{}, {"sliding_window": None}, {"sliding_window": 8}])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_window_is_that_of_transformers(
    family: str, window: dict[str, int | None], use: bool
) -> None:
    kind = getattr(transformers, f"{family}Config")
    hf = {**kind().to_dict(), "architectures": [f"{family}ForCausalLM"]}
    hf = {k: v for k, v in hf.items() if k not in ("layer_types", "sliding_window")}
    hf |= {"use_sliding_window": use, "max_window_layers": 0} | window
    # transformers keeps the key of a Llama, and does not look at it.
    expected = None if family == "Llama" else kind.from_dict(hf).sliding_window
    assert ModelConfig.from_hf(hf).sliding_window == expected
