"""What the model is: frozen, validated, no foreign names.

``ModelConfig.from_hf`` is the one place that knows Hugging Face's spelling of a Llama-family
config.json. A key it does not know is refused when it could change the mathematics.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from jaxlora.errors import ConfigError

_Number = TypeVar("_Number", int, float)
Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]

# Keys of config.json that say nothing about the forward pass, by family of reasons: bookkeeping,
# training only, generation defaults (read elsewhere), and facts implied by the tensors.
_HARMLESS_KEYS = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path
    use_cache return_dict output_attentions output_hidden_states is_encoder_decoder is_decoder
    attention_dropout initializer_range pretraining_tp gradient_checkpointing
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id max_window_layers
    chunk_size_feed_forward id2label label2id problem_type torchscript is_llama_config
    rope_interleaved transformers.js_config auto_map use_bfloat16 hidden_dropout attn_dropout
    max_length min_length do_sample temperature top_k top_p typical_p num_beams num_beam_groups
    num_return_sequences repetition_penalty length_penalty max_sequence_length
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters
    max_position_embeddings tie_word_embeddings attention_bias mlp_bias sliding_window
    use_sliding_window layer_types tokenizer_class _commit_hash attn_implementation
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    unsloth_fixed unsloth_version""".split()
)
_YARN_KEYS = frozenset(
    """original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim
    truncate finetuned""".split()
)
_ROPE_KEYS = ("rope_scaling", "rope_parameters")
# Values under which an unknown key cannot have an effect.
_INERT_VALUES: tuple[Any, ...] = (None, False, {}, [], "")

_ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What transformers takes where config.json lacks the key; null under it is another thing.
_DEFAULTS: dict[Architecture, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings: ``linear``, ``llama3`` (Llama 3.1's recipe) or
    ``yarn`` (arXiv:2309.00071)."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    beta_slow: float = 1.0
    """YaRN: what turns as often or less within ``original_max_len`` is stretched by ``factor``."""
    beta_fast: float = 32.0
    """YaRN: what turns as often or more is kept."""
    truncate: bool = True
    """YaRN: between the two whole dimensions are counted."""
    attention_factor: float = 1.0
    """YaRN: what queries and keys are multiplied with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and mathematics of one Llama-family decoder."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    sees_past_window: bool
    """Whether some layers see all keys in spite of the window."""
    dtype: str
    """The checkpoint's own dtype: float32, float16 or bfloat16."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def q_size(self) -> int:
        """Width of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face config.json of a supported architecture.

        Raises ConfigError naming the key for whatever would change the mathematics and is not
        served: unknown keys with a value, other activations, other rope scalings, quantization.
        """
        if quantization := hf.get("quantization_config"):
            method = quantization
            if isinstance(quantization, Mapping):
                method = quantization.get("quant_method", "unknown")
            raise ConfigError(
                f"quantization_config (quant_method={method!r}) is not served: use the unquantized "
                "checkpoint, or a GGUF file, which is dequantized while it loads"
            )
        names = hf.get("architectures")
        listed = names if isinstance(names, list | tuple) else ()
        name = next((n for n in map(str, listed) if n in _ARCHITECTURES), None)
        if name is None:
            raise ConfigError(
                f"architectures={names!r} is not served; supported: {', '.join(_ARCHITECTURES)}"
            )
        for key, value in hf.items():
            if key not in _HARMLESS_KEYS and value not in _INERT_VALUES:
                raise ConfigError(
                    f"config.json has {key}={value!r}, which jaxlora does not know: it may change "
                    "the model's mathematics, so the model is refused rather than served wrongly"
                )
        architecture = _ARCHITECTURES[name]
        hf = {"rms_norm_eps": 1e-6, **_DEFAULTS[architecture], **hf}
        if hf.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ConfigError(f"hidden_act={hf['hidden_act']!r} is not served (only silu)")
        hidden_size = _positive(hf, "hidden_size", int)
        num_heads = _positive(hf, "num_attention_heads", int)
        num_kv_heads = _positive(hf, "num_key_value_heads", int, num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_kv_heads}"
            )
        head_dim = _positive(hf, "head_dim", int, hidden_size // num_heads)
        if head_dim % 2 or not head_dim:
            raise ConfigError(
                f"heads of {head_dim} (head_dim, or hidden_size={hidden_size} by "
                f"num_attention_heads={num_heads}) are not served: rotary positions need an even "
                "width"
            )
        theta, scaling = _rope(hf)
        max_positions = _positive(hf, "max_position_embeddings", int)
        if scaling is not None and scaling.kind == "yarn":
            # The scaling is added to a config whose other keys are left as they were.
            max_positions = int(scaling.factor * scaling.original_max_len)
        window, sees_past_window = _sliding_window(hf, architecture)
        # Qwen2 has q/k/v biases and no switch for them; the others have one switch for q/k/v/o.
        attention_bias = _switch(hf, "attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=_positive(hf, "vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=_positive(hf, "intermediate_size", int),
            num_layers=_positive(hf, "num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive(hf, "rms_norm_eps", float),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=max_positions,
            tie_word_embeddings=_switch(hf, "tie_word_embeddings"),
            qkv_bias=architecture == "qwen2" or attention_bias,
            o_bias=architecture != "qwen2" and attention_bias,
            mlp_bias=_switch(hf, "mlp_bias"),
            qk_norm=architecture == "qwen3",
            sliding_window=window,
            sees_past_window=sees_past_window,
            dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "float32"),
            eos_token_ids=token_ids(hf, "eos_token_id", "config.json"),
            bos_token_id=next(iter(token_ids(hf, "bos_token_id", "config.json")), None),
        )


def overridden(hf: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with other values under some keys. Its rotary base and scaling stay what they
    are unless that very one is overridden, however either is spelled."""
    scaling = _rope_fields(hf)
    # Beside the scaling, where it counts if no other one does.
    own = {"rope_theta": scaling.pop("rope_theta", None) or hf.get("rope_theta")}
    if not overrides.keys() & set(_ROPE_KEYS):
        own["rope_scaling"] = scaling
    return {k: v for k, v in hf.items() if k not in _ROPE_KEYS} | own | dict(overrides)


def _positive(
    fields: Mapping[str, Any], key: str, kind: type[_Number], default: _Number | None = None
) -> _Number:
    """A number of config.json, or the default where there is none, or null."""
    value: Any = fields.get(key)
    if value is None and default is not None:
        return default
    is_number = isinstance(value, numbers.Real) and type(value) is not bool
    if not is_number or not 0 < value < 1 << 63 or kind(value) != value:
        expected = {int: "integer", float: "number"}[kind]
        raise ConfigError(f"config.json has {key}={value!r}, which must be a positive {expected}")
    return kind(value)


def _switch(fields: Mapping[str, Any], key: str, *, missing: bool = False) -> bool:
    """Whether something is so, as config.json says it; null is no."""
    value = fields.get(key, missing)
    if not isinstance(value, bool | None):
        raise ConfigError(f"config.json has {key}={value!r}, which must be true or false")
    return bool(value)


def token_ids(fields: Mapping[str, Any], key: str, file: str) -> tuple[int, ...]:
    """The ids under a key: none, one or a list. Raises ConfigError naming the file for others."""
    value = fields.get(key)
    ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
    if not all(type(i) is int for i in ids):
        raise ConfigError(f"{file} has {key}={value!r}, which must be a token id or a list of them")
    return tuple(ids)


def _sliding_window(hf: Mapping[str, Any], architecture: Architecture) -> tuple[int | None, bool]:
    """The window that is in force, or None, and whether some layers see past it."""
    window, qwen = hf.get("sliding_window"), architecture.startswith("qwen")
    # Llamas have none, whatever the key says.
    if window is None or architecture == "llama":
        return None, False
    if qwen and not _switch(hf, "use_sliding_window"):
        return None, False
    sliding, full = "sliding_attention", "full_attention"
    layers = hf.get("layer_types")
    if not layers:
        # Of Qwen's so many of the first see all keys.
        first = hf["max_window_layers"] if qwen else 0
        if type(first) is not int or first < 0:
            raise ConfigError(
                f"config.json has max_window_layers={first!r}, which must be a number of layers"
            )
        num_layers = _positive(hf, "num_hidden_layers", int)
        layers = [full if i < first else sliding for i in range(num_layers)]
    if not isinstance(layers, list | tuple) or not {sliding, full}.issuperset(map(str, layers)):
        raise ConfigError(
            f"config.json has layer_types={layers!r}: served is a list of {sliding} and {full}"
        )
    if sliding not in layers:
        return None, False
    return _positive(hf, "sliding_window", int), full in layers


def _rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """From ``rope_parameters`` (transformers 5) or the older key, which counts first there, too."""
    key = next((key for key in _ROPE_KEYS if hf.get(key)), None)
    if key is None:
        return {}
    if not isinstance(hf[key], Mapping):
        raise ConfigError(f"config.json has {key}={hf[key]!r}, which must be an object with keys")
    return dict(hf[key])


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling."""
    scaling = _rope_fields(hf)
    base = scaling.pop("rope_theta", None) or hf.get("rope_theta")
    theta = _positive({"rope_theta": base}, "rope_theta", float, 10000.0)
    kind = str(scaling.pop("rope_type", None) or scaling.pop("type", None) or "default")
    scaling.pop("type", None)
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not served")
    if kind == "default":
        if scaling:
            raise ConfigError(f"rope scaling of type 'default' has unexpected keys {scaling!r}")
        return theta, None
    needed = {
        "linear": {"factor"},
        "llama3": {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
        "yarn": {"factor"},
    }
    if kind not in needed:
        raise ConfigError(f"rope scaling {kind!r} is not served; supported: {', '.join(needed)}")
    allowed = needed[kind] | (_YARN_KEYS if kind == "yarn" else set())
    if not needed[kind] <= set(scaling) <= allowed:
        raise ConfigError(
            f"rope scaling {kind!r} needs {sorted(needed[kind])} and may have "
            f"{sorted(allowed - needed[kind])}, got {sorted(scaling)}"
        )
    factor = _positive(scaling, "factor", float)
    if factor < 1:
        raise ConfigError(f"rope scaling factor={factor} must be at least 1")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    if kind == "yarn":
        return theta, _yarn(scaling, factor, _positive(hf, "max_position_embeddings", int))
    low = _positive(scaling, "low_freq_factor", float)
    high = _positive(scaling, "high_freq_factor", float)
    if high <= low:
        raise ConfigError(
            f"rope scaling high_freq_factor={high} must be more than low_freq_factor={low}: Llama "
            "3's are 4 and 1"
        )
    return theta, RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_len=_positive(scaling, "original_max_position_embeddings", int),
    )


def _yarn(scaling: Mapping[str, Any], factor: float, max_positions: int) -> RopeScaling:
    """With what the paper and transformers take where a key is missing, or null."""

    def stretch(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    attention_factor = stretch(1.0)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        attention_factor = stretch(_positive(scaling, "mscale", float)) / stretch(
            _positive(scaling, "mscale_all_dim", float)
        )
    slow = _positive(scaling, "beta_slow", float, 1.0)
    fast = _positive(scaling, "beta_fast", float, 32.0)
    if fast < slow:
        raise ConfigError(f"rope scaling beta_fast={fast} must be no less than beta_slow={slow}")
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_len=_positive(scaling, "original_max_position_embeddings", int, max_positions),
        beta_slow=slow,
        beta_fast=fast,
        truncate=_switch(scaling, "truncate", missing=True),
        attention_factor=_positive(scaling, "attention_factor", float, attention_factor),
    )
