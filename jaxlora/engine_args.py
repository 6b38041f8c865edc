"""What an engine is asked to be: frozen, validated."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import InitVar
from typing import Any, Literal

from jaxlora import checks
from jaxlora.errors import ConfigError

LORA_EXTRAS = (
    "embed_tokens",
    "lm_head",
    "dora",
    "bias",
    "saved_embed_tokens",
    "saved_lm_head",
)
"""What an engine may be started for beyond LoRA on the layers' linears."""


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
    """"auto" is the checkpoint's dtype on an accelerator, bfloat16 where that is wider, float16 on
    a GPU before Ampere, and float32 on a CPU. "half" and "float" are float16 and float32."""
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    """Most sequences in one step: 256 on an accelerator, 16 on a CPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step, prompts included: 2048 on an accelerator, 256 on a CPU."""
    gpu_memory_utilization: float = None  # type: ignore[assignment]  # 0.9 is told from no value
    """Share of an accelerator's memory to use; 0.9 unless it is given."""
    tensor_parallel_size: int = 1
    seed: int = 0
    hf_overrides: Mapping[str, Any] | None = None
    """Keys of config.json and what to put in their place, such as ``rope_scaling``."""
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
    of several devices a share on each, and steps that need it have programs of their own; adapters
    without extras pay nothing."""
    max_logprobs: int = 20
    """Most alternatives to a token whose log-probabilities a request may ask for; -1 is the whole
    vocabulary, for ``logprobs=-1``: every step that tells any then sorts and sends all of it."""
    stream_interval: int = 1
    """Tokens in each output of a stream but the first and the last: more of them cost a server less
    for a token, which then comes later."""
    skip_tokenizer_init: bool = False
    generation_config: str = "auto"
    """Where default sampling parameters come from: "auto" is the checkpoint, "vllm" nowhere, else a
    folder with a generation_config.json."""
    compilation_cache_dir: str | None = "auto"
    """Where compiled programs are kept for the next start; "auto" is a folder in the user's cache
    directory, None turns this off. They are code: nobody else may be able to write there."""
    hbm_utilization: InitVar[float | None] = None
    quantization: InitVar[Any] = None
    pipeline_parallel_size: InitVar[int] = 1
    data_parallel_size: InitVar[int] = 1
    kv_cache_dtype: InitVar[str] = "auto"
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
    disable_log_requests: InitVar[Any] = None
    enable_log_requests: InitVar[Any] = None
    compilation_config: InitVar[Any] = None
    scheduling_policy: InitVar[Any] = None
    async_scheduling: InitVar[Any] = None
    max_parallel_loading_workers: InitVar[Any] = None

    def __post_init__(
        self,
        hbm_utilization: float | None,
        quantization: Any,
        pipeline_parallel_size: int,
        data_parallel_size: int,
        kv_cache_dtype: str,
        *without_meaning: Any,
    ) -> None:
        for name, value in zip(_WITHOUT_MEANING, without_meaning, strict=True):
            if value is not None:
                warnings.warn(
                    f"option {name}={value!r} has no effect here", stacklevel=_level_of_caller()
                )
        for name, value, served in (
            ("pipeline_parallel_size", pipeline_parallel_size, 1),
            ("data_parallel_size", data_parallel_size, 1),
            ("kv_cache_dtype", kv_cache_dtype, "auto"),
        ):
            if value != served:
                raise ConfigError(f"{name}={value!r} is not served, only {served!r}")
        if quantization is not None:
            raise ConfigError(
                f"quantization={quantization!r} is not served: use the unquantized checkpoint, or "
                "a GGUF file, which is dequantized while it loads"
            )
        given = [v for v in (self.gpu_memory_utilization, hbm_utilization) if v is not None]
        if len(given) > 1:
            raise TypeError("hbm_utilization and gpu_memory_utilization are one option; give one")
        object.__setattr__(self, "gpu_memory_utilization", given[0] if given else 0.9)
        for name in ("dtype", "lora_dtype"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, _DTYPE_ALIASES.get(value, value))
        self._check_types()
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in (*_COUNTS, *_OPTIONAL_COUNTS):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be at least 0")
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
            keys = self.hf_overrides
            checks.require("hf_overrides", keys, isinstance(keys, Mapping | None), "a dict")
            checks.strings("hf_overrides", keys or ())
            checks.convert(self, checks.boolean, *_SWITCHES)
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


_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
_PATHS = "tokenizer revision download_dir compilation_cache_dir".split()
_COUNTS = "max_loras max_lora_rank tensor_parallel_size stream_interval".split()
_OPTIONAL_COUNTS = """max_model_len max_num_seqs max_num_batched_tokens block_size max_cpu_loras
    num_gpu_blocks_override""".split()
_SIZES = "max_cpu_lora_gb lora_slot_timeout".split()
_SWITCHES = "enable_prefix_caching enable_lora skip_tokenizer_init".split()
_WITHOUT_MEANING = """enforce_eager trust_remote_code disable_log_stats swap_space cpu_offload_gb
    enable_chunked_prefill fully_sharded_loras disable_custom_all_reduce max_seq_len_to_capture
    use_v2_block_manager worker_use_ray distributed_executor_backend tokenizer_mode
    disable_log_requests enable_log_requests compilation_config scheduling_policy async_scheduling
    max_parallel_loading_workers""".split()
"""The last fields of EngineArgs, in their order: vLLM's scripts give them, and they do nothing."""

AsyncEngineArgs = EngineArgs
"""vLLM's name for what :class:`~jaxlora.async_llm.AsyncLLM` is started with."""
