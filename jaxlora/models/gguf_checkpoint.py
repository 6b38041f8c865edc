"""A model in one GGUF file: metadata, tokenizer and (quantized) weights.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Three architectures are
read, ``llama`` (also Mistral, TinyLlama, SmolLM), ``qwen2`` and ``qwen3``; everything leaves
here in Hugging Face's names and layout. Weights are dequantized to float32.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, dequantize

from jaxlora.errors import ModelLoadError

_HF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_DEQUANTIZABLE = frozenset(
    """F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS""".split()
)
_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# YaRN's keys of config.json, and how they are called here. Not rope.scaling.yarn_attn_factor:
# llama.cpp's converter puts there either attention_factor, which is meant whole, or attn_factor, by
# which some multiply the usual one and transformers does not.
_YARN_KEYS = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# Keys under "<architecture>." that hf_config reads or that say nothing about the forward pass.
_KNOWN_KEYS = frozenset(
    """vocab_size context_length embedding_length block_count feed_forward_length
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon attention.sliding_window
    rope.dimension_count rope.freq_base rope.scaling.type rope.scaling.factor rope.scale_linear
    rope.scaling.finetuned rope.scaling.yarn_ext_factor tensor_data_layout""".split()
) | set(_YARN_KEYS.values())
_ROPE_FREQS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor's place in the file: ``nbytes`` bytes of ``kind`` at ``offset``."""

    gguf_name: str
    hf_name: str
    kind: GGMLQuantizationType
    stored_shape: tuple[int, ...]
    """As dequantize expects it: rows, then the bytes or numbers of a row."""
    offset: int
    nbytes: int


class GGUFCheckpoint:
    """The Checkpoint of a .gguf file.

    ``tensors`` reads and dequantizes one tensor at a time: host memory holds its stored bytes
    and its float32 form, never the file.

    Raises ModelLoadError naming the file, key or tensor: not a GGUF file, truncated, one part of
    a split file, another architecture, metadata or tensors that would change the mathematics
    and are not known here, a quantization without a dequantizer.
    """

    path: Path
    metadata: Mapping[str, Any]
    """Every key of the file, arrays as lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = GGUFReader(path)
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise ModelLoadError(
                f"{path} is truncated or not a GGUF file ({error}): download it again"
            ) from error
        if reader.endianess is not GGUFEndian.LITTLE:
            raise ModelLoadError(
                f"{path} is a big-endian file, which is not served: convert it with gguf's "
                "`gguf-convert-endian`, or take the little-endian one"
            )
        num_parts = self._number("split.count", self.metadata.get("split.count", 1))
        if num_parts > 1:
            raise ModelLoadError(
                f"{path} is one of {num_parts} parts: join them with llama.cpp's "
                "`llama-gguf-split --merge`"
            )
        self._arch = str(self.metadata.get("general.architecture"))
        if self._arch not in _HF_ARCHITECTURES:
            raise ModelLoadError(
                f"{path} has architecture {self._arch!r}; served are {', '.join(_HF_ARCHITECTURES)}"
            )
        self._entries: list[_Entry] = []
        self._rope_freqs: np.ndarray | None = None
        self._vocab_size: int | None = None
        for tensor in reader.tensors:
            if tensor.name == _ROPE_FREQS:
                # A float32 table of the rotary embedding, not a weight: it becomes rope_scaling.
                self._rope_freqs = np.array(tensor.data, dtype=np.float32)
                continue
            if tensor.tensor_type.name not in _DEQUANTIZABLE:
                raise ModelLoadError(
                    f"{path} stores {tensor.name} as {tensor.tensor_type.name}; served are "
                    f"{', '.join(sorted(_DEQUANTIZABLE))}"
                )
            if tensor.name == "token_embd.weight":
                self._vocab_size = int(tensor.shape[1])
            self._entries.append(
                _Entry(
                    gguf_name=tensor.name,
                    hf_name=self._hf_name(tensor.name),
                    kind=tensor.tensor_type,
                    stored_shape=tensor.data.shape,
                    offset=tensor.data_offset,
                    nbytes=tensor.n_bytes,
                )
            )
        self._config = self._build_config()

    def hf_config(self) -> dict[str, Any]:
        """The config.json that the metadata amounts to.

        ``dtype`` is the one of the matrices, bfloat16 if they are quantized (of what was
        quantized nothing is known; bfloat16 rounds by less than 4- to 8-bit quantization does).
        """
        return dict(self._config)

    def generation_config(self) -> dict[str, Any]:
        """Special ids; ``eos_token_id`` lists every token that the file says ends a turn."""
        ids = (self._token_id(key) for key in ("eos", "eot", "eom"))
        config = {
            "eos_token_id": list(dict.fromkeys(i for i in ids if i is not None)),
            "bos_token_id": self._token_id("bos"),
            "pad_token_id": self._token_id("padding"),
        }
        return {key: value for key, value in config.items() if value not in (None, [])}

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (Hugging Face name, float32 array [out, in] or [d]) in the order of the file."""
        with self.path.open("rb") as file:
            for entry in self._entries:
                # Not by way of a variable, which would keep the array until the next is read.
                yield entry.hf_name, self._read(file, entry)

    def _read(self, file: BinaryIO, entry: _Entry) -> np.ndarray:
        file.seek(entry.offset)
        stored = np.fromfile(file, dtype=np.uint8, count=entry.nbytes)
        if entry.kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            stored = stored.view("<f4" if entry.kind.name == "F32" else "<f2")
        array = dequantize(stored.reshape(entry.stored_shape), entry.kind)
        return self._to_hf_layout(entry.gguf_name, array)

    def _to_hf_layout(self, gguf_name: str, array: np.ndarray) -> np.ndarray:
        """Undoes the row order of llama's q and k.

        llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, Hugging Face rows (i, i + d/2).
        """
        if self._arch != "llama" or not (match := re.search(r"\.attn_([qk])\.", gguf_name)):
            return array
        config = self._config
        heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        if array.shape[0] % (2 * heads):
            raise ModelLoadError(
                f"{self.path}: {gguf_name} has {array.shape[0]} rows, which {heads} heads of an "
                "even width do not make"
            )
        pairs = array.reshape(heads, -1, 2, *array.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)

    def _hf_name(self, gguf_name: str) -> str:
        stem, _, kind = gguf_name.rpartition(".")
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
            module = _PER_LAYER.get(match[2])
            prefix = f"model.layers.{match[1]}."
        else:
            module, prefix = _TOP_LEVEL.get(stem), ""
        if module is None or kind not in ("weight", "bias"):
            raise ModelLoadError(
                f"{self.path} has the tensor {gguf_name}, which a plain {self._arch} model does "
                "not have: it may change the mathematics, so the file is refused"
            )
        return f"{prefix}{module}.{kind}"

    def _token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.metadata.get(key)
        return None if value is None else int(self._number(key, value))

    def _number(self, key: str, value: Any) -> Any:
        """The value, if it is no text or list."""
        if not isinstance(value, int | float):
            raise ModelLoadError(
                f"{self.path} has {key}={value!r}, which must be a number: download it again, or "
                "convert it anew"
            )
        return value

    def _get(self, key: str, default: Any = None) -> Any:
        """The metadata ``<architecture>.<key>``, one number for all layers."""
        value = self.metadata.get(f"{self._arch}.{key}", default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelLoadError(
                    f"{self.path}: {self._arch}.{key} differs between layers ({value}), which is "
                    "not served"
                )
            value = value[0]
        if value is None or key == "rope.scaling.type":
            return value
        return self._number(f"{self._arch}.{key}", value)

    def _need(self, key: str) -> Any:
        value = self._get(key)
        if value is None:
            raise ModelLoadError(f"{self.path} lacks the metadata {self._arch}.{key}")
        if not isinstance(value, int | float) or not value > 0:
            raise ModelLoadError(
                f"{self.path} has {self._arch}.{key}={value!r}, which must be a positive number"
            )
        return value

    def _build_config(self) -> dict[str, Any]:
        for key, value in self.metadata.items():
            prefix, _, name = key.partition(".")
            if prefix == self._arch and name not in _KNOWN_KEYS and value not in (None, 0, False):
                raise ModelLoadError(
                    f"{self.path} has {key}={value!r}, which jaxlora does not know: it may change "
                    "the model's mathematics, so the file is refused"
                )
        if self._vocab_size is None:
            raise ModelLoadError(f"{self.path} lacks the tensor token_embd.weight")
        num_tokens = len(self.metadata.get("tokenizer.ggml.tokens", []))
        if num_tokens not in (0, self._vocab_size):
            raise ModelLoadError(
                f"{self.path} has {num_tokens} tokens, but token_embd.weight has "
                f"{self._vocab_size} rows"
            )
        num_heads, hidden_size = self._need("attention.head_count"), self._need("embedding_length")
        head_dim = self._get("attention.key_length", hidden_size // num_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._get(key, head_dim) != head_dim:
                raise ModelLoadError(
                    f"{self.path} has {self._arch}.{key}={self._get(key)}, but heads of "
                    f"{head_dim}: different widths are not served"
                )
        names = {entry.gguf_name for entry in self._entries}
        config: dict[str, Any] = {
            "architectures": [_HF_ARCHITECTURES[self._arch]],
            "model_type": self._arch,
            "vocab_size": self._vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": self._need("feed_forward_length"),
            "num_hidden_layers": self._need("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._get("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": _shortest(self._need("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(self._get("rope.freq_base", 10000.0)),
            "max_position_embeddings": self._need("context_length"),
            "tie_word_embeddings": "output.weight" not in names,
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": self.generation_config().get("eos_token_id"),
            "dtype": self._dtype(),
        }
        if self._arch != "qwen2":
            config["attention_bias"] = "blk.0.attn_q.bias" in names
        if self._arch == "llama":
            config["mlp_bias"] = "blk.0.ffn_up.bias" in names
        if window := self._get("attention.sliding_window"):
            config |= {"sliding_window": window, "use_sliding_window": True}
            if self._arch == "llama":
                # A llama with a window is what Hugging Face calls Mistral.
                config["architectures"] = ["MistralForCausalLM"]
            else:
                # Which layers have it the file does not say.
                config["layer_types"] = ["full_attention", "sliding_attention"]
        if scaling := self._rope_scaling(config):
            config["rope_scaling"] = scaling
        return config

    def _dtype(self) -> str:
        kinds = {entry.kind.name for entry in self._entries if len(entry.stored_shape) == 2}
        if kinds == {"F16"}:
            return "float16"
        return "float32" if kinds == {"F32"} else "bfloat16"

    def _rope_scaling(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        """rope_scaling as config.json has it; what cannot be expressed there is refused."""
        kind = self._get("rope.scaling.type", "linear")
        factor = self._get("rope.scaling.factor", self._get("rope.scale_linear")) or 1.0
        if kind not in ("none", "linear", "yarn"):
            raise ModelLoadError(
                f"{self.path} has {self._arch}.rope.scaling.type={kind!r}, which is not served"
            )
        # How much of what turns fast YaRN keeps; other scalings know nothing of it.
        kept = self._get("rope.scaling.yarn_ext_factor", kind == "yarn")
        if kept != (kind == "yarn"):
            raise ModelLoadError(
                f"{self.path} has {self._arch}.rope.scaling.yarn_ext_factor={kept} with "
                f"rope.scaling.type={kind!r}: served are 1 with 'yarn' and 0 with others"
            )
        scaling = None
        if kind != "none" and factor != 1.0:
            scaling = {"rope_type": kind, "factor": _shortest(factor)}
        if scaling and kind == "yarn":
            given = {key: self._get(name) for key, name in _YARN_KEYS.items()}
            scaling |= {key: _shortest(value) for key, value in given.items() if value}
        table = self._rope_freqs
        if table is None or np.all(table == 1.0):
            return scaling
        llama3 = llama3_scaling(table, config["head_dim"], config["rope_theta"])
        if llama3 is None or scaling:
            raise ModelLoadError(
                f"{self.path} has {_ROPE_FREQS} that "
                f"{f'come with {kind} scaling' if scaling else 'Llama 3 scaling cannot express'}: "
                "such rotary frequencies are not served"
            )
        return llama3


def llama3_scaling(table: np.ndarray, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The ``llama3`` rope_scaling whose frequency divisors are ``table`` [head_dim / 2], or None.

    GGUF keeps the divisors, not the four parameters. With a rotary pair of wavelength w, Llama
    3.1 divides its frequency by 1 below ``original / high``, by ``factor`` above ``original /
    low``, and between them by 1 / ((1 - s) / factor + s), s = (original / w - low) / (high - low).
    Only the ratios of original, low and high matter, so low = 1; released models have high = 4,
    original = 8192, and others follow from the straight line that s is in 1 / w. Parameters are
    returned only if they give the table back to float32 precision.
    """
    if table.shape != (head_dim // 2,) or not np.all(np.isfinite(table)) or np.any(table < 1.0):
        return None
    factor = _shortest(float(table.max()))
    inverse_wavelength = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    candidates = [(4.0, 8192.0)]
    between = (table > 1.0) & (table < table.max())
    if between.sum() >= 2:
        s = (1.0 / table[between].astype(np.float64) - 1.0 / factor) / (1.0 - 1.0 / factor)
        slope, intercept = np.polyfit(inverse_wavelength[between], s, 1)
        # slope = original / (high - 1) and intercept = -1 / (high - 1).
        candidates.append((round(1.0 - 1.0 / intercept, 3), float(round(-slope / intercept))))
    for high, original in candidates:
        if high <= 1.0 or original <= 0.0:
            continue
        s = np.clip((original * inverse_wavelength - 1.0) / (high - 1.0), 0.0, 1.0)
        if np.allclose(1.0 / ((1.0 - s) / factor + s), table, rtol=1e-5, atol=0.0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(original),
            }
    return None


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32, so 1e-05 as it was written, not 9.99..e-06."""
    return float(str(np.float32(value)))
