"""Workloads as data: model shapes, adapter mixes, and the grid of decode measurements."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "bos_token_id": 1}

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    },
    "smollm2-135m": {
        **LLAMA,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "tiny": {
        **LLAMA,
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    },
}
"""config.json of each shape; weights are random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Time per output token: ``batch`` prompts of ``prompt_len`` tokens, adapters round-robin."""

    slots: int
    adapters: int
    batch: int
    rank: int = 16
    prompt_len: int = 512
    short: int = 33
    long: int = 161

    @property
    def name(self) -> str:
        """As the tables name it."""
        if self.adapters == 0:
            return f"base, B={self.batch}"
        return f"S={self.slots} A={self.adapters}, B={self.batch}"


DECODE_GRID = (
    Decode(slots=8, adapters=0, batch=1),
    Decode(slots=8, adapters=0, batch=64),
    Decode(slots=8, adapters=0, batch=128),
    Decode(slots=8, adapters=1, batch=1),
    Decode(slots=8, adapters=8, batch=16),
    Decode(slots=8, adapters=8, batch=64),
    Decode(slots=8, adapters=8, batch=128),
    Decode(slots=64, adapters=8, batch=64),
    Decode(slots=64, adapters=64, batch=64),
    Decode(slots=64, adapters=64, batch=128),
)


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs=0": {"logprobs": 0},
    "logprobs=20": {"logprobs": 20},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": {7: 2.0}},
    "temperature=1": {"temperature": 1.0},
    "temperature=1, top_k=50, top_p=0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "temperature=1, penalties, logprobs=20": {
        "temperature": 1.0,
        "repetition_penalty": 1.1,
        "logprobs": 20,
    },
}
"""Sampling parameters whose cost is measured against greedy decoding."""


def mix(name: str, count: int, adapters: int, seed: int = 0) -> list[int | None]:
    """Adapter of each of ``count`` requests, by the mixes of Punica (arXiv:2310.18547); None, for
    the base, where there are none."""
    if not adapters:
        return [None] * count
    random = np.random.default_rng(seed)
    if name == "identical":
        return [0] * count
    if name == "distinct":
        return [i % adapters for i in range(count)]
    if name == "uniform":
        return random.integers(0, adapters, count).tolist()
    if name == "zipf":
        return (random.zipf(1.5, count) % adapters).tolist()
    raise ValueError(f"mix {name!r} must be identical, distinct, uniform or zipf")
