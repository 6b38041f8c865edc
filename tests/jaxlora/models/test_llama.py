"""Logits against transformers' own models, random and tiny, one of each kind the family has."""

from __future__ import annotations

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jaxlora.config import ModelConfig
from jaxlora.models.cache import make_cache
from jaxlora.models.weights import load_weights
from jaxlora.parallel import Devices
from kernels_pallas.paged_attention.op import PagedBatch
from kernels_pallas.paged_attention.reference import WIDE_IMPLEMENTATION

DEVICES = Devices.first(1)
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    # Large enough that logits differ by more than their rounding.
    "initializer_range": 0.08,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "multi-head": ("Llama", {"num_key_value_heads": 4}),
    "multi-query": ("Llama", {"num_key_value_heads": 1}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "wide head": ("Llama", {"head_dim": 32}),
    "theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama3 rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "yarn, all said": (
        "Llama",
        {
            "rope_parameters": YARN
            | {"beta_fast": 8, "beta_slow": 2, "attention_factor": 1.2, "truncate": False}
        },
    ),
    "yarn, two factors": (
        "Llama",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "yarn, no ramp": ("Llama", {"rope_parameters": YARN | {"beta_fast": 1.0, "truncate": False}}),
    "attention bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
}


def tiny_model(kind: str) -> transformers.PreTrainedModel:
    """A random float32 model whose biases and norms are not the trivial ones."""
    family, changes = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**(TINY | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def hf_config(model: transformers.PreTrainedModel) -> dict[str, Any]:
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind: str) -> None:
    reference = tiny_model(kind)
    config = ModelConfig.from_hf(hf_config(reference))
    tensors = {name: value.numpy() for name, value in reference.state_dict().items()}
    model = nnx.merge(*load_weights(config, iter(tensors.items()), jnp.dtype("float32"), DEVICES))
    prompts = np.random.default_rng(1).integers(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        expected = reference(torch.tensor(prompts)).logits.numpy()

    # What is never read holds NaN: free pages, and the tail of the last page.
    cache = make_cache(
        config, WIDE_IMPLEMENTATION, DEVICES, num_pages=12, page_size=16, dtype=jnp.dtype("float32")
    )
    cache = [jnp.full_like(pages, jnp.nan) for pages in cache]
    table = np.array([[3, 1, 7, 0], [2, 9, 4, 0], [0, 0, 0, 0]], np.int32)

    def forward(spans: list[tuple[int, int]], decode: bool = False) -> list[np.ndarray]:
        """Runs tokens [start, stop) of each prompt; returns their logits, prompt by prompt."""
        nonlocal cache
        size = 3 if decode else 64
        token_ids = np.zeros(size, np.int32)
        cu_q_lens, kv_lens, at = [0], [], 0
        for prompt, (start, stop) in zip(prompts, spans, strict=True):
            token_ids[at : at + stop - start] = prompt[start:stop]
            at += stop - start
            cu_q_lens.append(at)
            kv_lens.append(stop)
        batch = PagedBatch(
            cu_q_lens=jnp.array([*cu_q_lens, at], jnp.int32),
            kv_lens=jnp.array([*kv_lens, 0], jnp.int32),
            page_table=jnp.array(table),
            num_rows=jnp.array([2], jnp.int32),
            max_q_len=1 if decode else size,
        )
        hidden, cache = model(jnp.array(token_ids), cache, batch, WIDE_IMPLEMENTATION, None)
        logits = np.asarray(model.logits(hidden))
        return [logits[a:b] for a, b in itertools.pairwise(cu_q_lens)]

    # A chunk each, a second chunk of other lengths, then a decode step.
    for spans in ([(0, 25), (0, 10)], [(25, 39), (10, 39)]):
        for row, (start, stop), got in zip((0, 1), spans, forward(spans), strict=True):
            np.testing.assert_allclose(got, expected[row, start:stop], rtol=0, atol=1e-5)
    for row, got in enumerate(forward([(39, 40), (39, 40)], decode=True)):
        np.testing.assert_allclose(got[0], expected[row, 39], rtol=0, atol=1e-5)
