"""What the engine is asked to do, and what the model is: frozen, validated, no foreign names.

``ModelConfig.from_hf`` is the one place that knows Hugging Face's spelling of a Llama-family
config.json. A key it does not know is refused when it could change the mathematics.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import InitVar
from typing import Any, Literal

from jaxlora import checks
from jaxlora.errors import ConfigError

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]

LORA_EXTRAS = (
    "embed_tokens",
    "lm_head",
    "dora",
    "bias",
    "saved_embed_tokens",
    "saved_lm_head",
)
"""What an engine may be started for beyond LoRA on the layers' linears."""

# Keys of config.json that say nothing about the forward pass, by family of reasons: bookkeeping,
# training only, generation defaults (read elsewhere), and facts implied by the tensors.
_HARMLESS_KEYS = frozenset(
    """architectures model_type torch_dtype dtype transformers_version _name_or_path
    use_cache return_dict output_attentions output_hidden_states is_encoder_decoder is_decoder
    attention_dropout initializer_range pretraining_tp gradient_checkpointing
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id max_window_layers
    chunk_size_feed_forward id2label label2id problem_type torchscript is_llama_config
    rope_interleaved transformers.js_config auto_map use_bfloat16 hidden_dropout attn_dropout
    max_length min_length do_sample temperature top_k top_p num_beams repetition_penalty
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters
    max_position_embeddings tie_word_embeddings attention_bias mlp_bias sliding_window
    use_sliding_window layer_types tokenizer_class _commit_hash attn_implementation
    _attn_implementation _attn_implementation_autoset unsloth_fixed unsloth_version""".split()
)
# Values under which an unknown key cannot have an effect.
_INERT_VALUES: tuple[Any, ...] = (None, False, {}, [], "")

_ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of rotary embeddings: ``linear``, or ``llama3`` (Llama 3.1's recipe)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192


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
        if hf.get("quantization_config"):
            method = hf["quantization_config"].get("quant_method", "unknown")
            raise ConfigError(
                f"quantization_config (quant_method={method!r}) is not served: use the unquantized "
                "checkpoint, or a GGUF file, which is dequantized while it loads"
            )
        names = hf.get("architectures") or []
        name = next((n for n in names if n in _ARCHITECTURES), None)
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
        if hf.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ConfigError(f"hidden_act={hf['hidden_act']!r} is not served (only silu)")
        num_heads = int(hf["num_attention_heads"])
        num_kv_heads = int(hf.get("num_key_value_heads") or num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_kv_heads}"
            )
        theta, scaling = _rope(hf)
        # Qwen2 has q/k/v biases and no switch for them; the others have one switch for q/k/v/o.
        attention_bias = bool(hf.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=int(hf["vocab_size"]),
            hidden_size=int(hf["hidden_size"]),
            intermediate_size=int(hf["intermediate_size"]),
            num_layers=int(hf["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=int(hf.get("head_dim") or int(hf["hidden_size"]) // num_heads),
            rms_norm_eps=float(hf["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=int(hf["max_position_embeddings"]),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "qwen2" or attention_bias,
            o_bias=architecture != "qwen2" and attention_bias,
            mlp_bias=bool(hf.get("mlp_bias", False)),
            qk_norm=architecture == "qwen3",
            sliding_window=_sliding_window(hf, architecture),
            dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "float32"),
            eos_token_ids=_ids(hf.get("eos_token_id")),
            bos_token_id=next(iter(_ids(hf.get("bos_token_id"))), None),
        )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)


def _sliding_window(hf: Mapping[str, Any], architecture: Architecture) -> int | None:
    """The window that is in force, or None; one that only some layers use is refused."""
    window = hf.get("sliding_window")
    if window is None or (architecture.startswith("qwen") and not hf.get("use_sliding_window")):
        return None
    layers = set(hf.get("layer_types") or ["sliding_attention"])
    if layers == {"full_attention"}:
        return None
    if layers != {"sliding_attention"} or architecture.startswith("qwen"):
        raise ConfigError(
            f"sliding_window={window} on some layers only (layer_types, max_window_layers) is not "
            "served"
        )
    return int(window)


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from ``rope_parameters`` (transformers 5) or the older keys, which
    count first there, too."""
    scaling = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    theta = float(scaling.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0)
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not served")
    if kind == "default":
        if scaling:
            raise ConfigError(f"rope scaling of type 'default' has unexpected keys {scaling!r}")
        return theta, None
    known = {
        "linear": {"factor"},
        "llama3": {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
    }
    if kind not in known:
        raise ConfigError(f"rope scaling {kind!r} is not served; supported: {', '.join(known)}")
    if set(scaling) != known[kind]:
        raise ConfigError(
            f"rope scaling {kind!r} needs exactly {sorted(known[kind])}, got {sorted(scaling)}"
        )
    factor = float(scaling["factor"])
    if not (math.isfinite(factor) and factor >= 1):
        raise ConfigError(f"rope scaling factor={factor} must be at least 1")
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    return theta, RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=float(scaling["low_freq_factor"]),
        high_freq_factor=float(scaling["high_freq_factor"]),
        original_max_len=int(scaling["original_max_position_embeddings"]),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """What the engine is asked to do; vLLM's names and defaults where the meaning is the same.

    ``None`` means "chosen at start, and logged". Options of vLLM's without a meaning here warn.
    ``hbm_utilization`` is another name of ``gpu_memory_utilization``. Raises ConfigError naming
    option and value.
    """

    model: str = dataclasses.field(kw_only=False)
    """A directory, a .gguf file, or a hub id."""
    tokenizer: str | None = None
    """A directory or hub id to take the tokenizer from instead of the model's own."""
    dtype: str = "auto"
    """"auto" is the checkpoint's dtype on an accelerator, bfloat16 where that is wider, and
    float32 on a CPU."""
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    """Most sequences in one step: 256 on an accelerator, 16 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step, prompts included: 2048 on an accelerator, 256 on a CPU."""
    gpu_memory_utilization: float = None  # type: ignore[assignment]  # 0.9 is told from no value
    """Share of an accelerator's memory to use; 0.9 unless it is given."""
    tensor_parallel_size: int = 1
    seed: int = 0
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = "auto"
    revision: str | None = None
    download_dir: str | None = None
    block_size: int | None = None
    """Tokens in a KV page: 16, and on a TPU a sixteenth of max_model_len, 16 to 256."""
    num_gpu_blocks_override: int | None = None
    """Number of KV pages, instead of what memory allows."""
    enable_prefix_caching: bool = True
    """Prompts that begin alike share what was computed of their beginning."""
    enable_lora: bool = False
    max_loras: int = 8
    max_lora_rank: int = 16
    max_cpu_loras: int | None = None
    """Most adapters whose weights are kept in host memory; None is as many as fit. Others are
    registered all the same, and read again when they are needed."""
    max_cpu_lora_gb: float | None = None
    """GiB of host memory for the weights of adapters; None is a quarter of the machine's."""
    lora_slot_timeout: float | None = 600.0
    """Seconds after which a request ends with an error if its adapter waits for a slot and no slot
    changes hands in all that time; None waits for ever."""
    lora_dtype: str = "auto"
    """"auto" is the model's dtype."""
    lora_target_modules: Sequence[str] | None = None
    """Linears adapters may target (q_proj ... down_proj); the others take no bank memory."""
    lora_extras: Sequence[str] = ()
    """What adapters may have beyond LoRA on those linears: "embed_tokens", "lm_head" (LoRA on
    them), "dora", "bias" (lora_bias), "saved_embed_tokens", "saved_lm_head" (modules_to_save
    and trainable_token_indices: a whole matrix for each of max_loras). Each takes bank memory,
    and steps that need it have programs of their own; adapters without extras pay nothing."""
    max_logprobs: int = 20
    """Most alternatives to a token whose log-probabilities a request may ask for; -1 is the whole
    vocabulary, for ``logprobs=-1``: every step that tells any then sorts and sends all of it."""
    skip_tokenizer_init: bool = False
    generation_config: str = "auto"
    """Where default sampling parameters come from: "auto" is the checkpoint, "vllm" nowhere, else a
    folder with a generation_config.json."""
    compilation_cache_dir: str | None = "auto"
    """Where compiled programs are kept for the next start; "auto" is a folder in the user's cache
    directory, None turns this off. They are code: nobody else may be able to write there."""
    hbm_utilization: InitVar[float | None] = None
    quantization: InitVar[Any] = None
    enforce_eager: InitVar[Any] = None
    trust_remote_code: InitVar[Any] = None
    disable_log_stats: InitVar[Any] = None
    swap_space: InitVar[Any] = None
    cpu_offload_gb: InitVar[Any] = None
    enable_chunked_prefill: InitVar[Any] = None
    fully_sharded_loras: InitVar[Any] = None
    disable_custom_all_reduce: InitVar[Any] = None
    max_seq_len_to_capture: InitVar[Any] = None
    use_v2_block_manager: InitVar[Any] = None
    worker_use_ray: InitVar[Any] = None
    distributed_executor_backend: InitVar[Any] = None
    tokenizer_mode: InitVar[Any] = None

    def __post_init__(
        self, hbm_utilization: float | None, quantization: Any, *without_meaning: Any
    ) -> None:
        for name, value in zip(_WITHOUT_MEANING, without_meaning, strict=True):
            if value is not None:
                warnings.warn(
                    f"option {name}={value!r} has no effect here", stacklevel=_level_of_caller()
                )
        if quantization is not None:
            raise ConfigError(
                f"quantization={quantization!r} is not served: use the unquantized checkpoint, or "
                "a GGUF file, which is dequantized while it loads"
            )
        given = [v for v in (self.gpu_memory_utilization, hbm_utilization) if v is not None]
        if len(given) > 1:
            raise TypeError("hbm_utilization and gpu_memory_utilization are one option; give one")
        object.__setattr__(self, "gpu_memory_utilization", given[0] if given else 0.9)
        self._check_types()
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in (*_COUNTS, *_OPTIONAL_COUNTS):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.max_logprobs < -1:
            raise ConfigError(f"max_logprobs={self.max_logprobs} must be -1 or at least 0")
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be more than 0")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1]"
            )
        for name in ("dtype", "lora_dtype"):
            if getattr(self, name) not in ("auto", "float32", "float16", "bfloat16"):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} must be auto, float32, float16 or bfloat16"
                )
        unknown = sorted(set(self.lora_extras) - set(LORA_EXTRAS))
        if unknown:
            raise ConfigError(
                f"lora_extras={self.lora_extras!r} must be a list of {', '.join(LORA_EXTRAS)}"
            )
        if self.load_format not in ("auto", "safetensors", "gguf", "dummy"):
            raise ConfigError(
                f"load_format={self.load_format!r} must be auto, safetensors, gguf or dummy"
            )

    def _check_types(self) -> None:
        try:
            checks.convert(self, checks.path, "model", "generation_config")
            checks.convert(self, checks.path, *_PATHS, optional=True)
            checks.convert(self, checks.integer, *_COUNTS, "seed", "max_logprobs")
            checks.convert(self, checks.integer, *_OPTIONAL_COUNTS, optional=True)
            checks.convert(self, checks.number, "gpu_memory_utilization")
            checks.convert(self, checks.number, *_SIZES, optional=True)
            for name in _SWITCHES:
                value = getattr(self, name)
                checks.require(name, value, isinstance(value, bool), "True or False")
            for name, what in (("lora_extras", LORA_EXTRAS), ("lora_target_modules", ["names"])):
                value = getattr(self, name)
                is_list = value is None or not isinstance(value, str | bytes)
                checks.require(name, value, is_list, f"a list of {', '.join(what)}")
                checks.strings(name, value or ())
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _level_of_caller() -> int:
    """The stacklevel, for who asks, of what called this package first."""
    outermost, level, frame = 0, 1, sys._getframe(1)
    while frame.f_back:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "jaxlora":
            outermost = level
        level, frame = level + 1, frame.f_back
    return outermost + 1


_PATHS = "tokenizer revision download_dir compilation_cache_dir".split()
_COUNTS = "max_loras max_lora_rank tensor_parallel_size".split()
_OPTIONAL_COUNTS = """max_model_len max_num_seqs max_num_batched_tokens block_size max_cpu_loras
    num_gpu_blocks_override""".split()
_SIZES = "max_cpu_lora_gb lora_slot_timeout".split()
_SWITCHES = "enable_prefix_caching enable_lora skip_tokenizer_init".split()
_WITHOUT_MEANING = """enforce_eager trust_remote_code disable_log_stats swap_space cpu_offload_gb
    enable_chunked_prefill fully_sharded_loras disable_custom_all_reduce max_seq_len_to_capture
    use_v2_block_manager worker_use_ray distributed_executor_backend tokenizer_mode""".split()
"""The last fields of EngineArgs, in their order: vLLM's scripts give them, and they do nothing."""

AsyncEngineArgs = EngineArgs
"""vLLM's name for what :class:`~jaxlora.async_llm.AsyncLLM` is started with."""
