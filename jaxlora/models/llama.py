"""The Llama family: Llama 2/3/3.x, SmolLM, TinyLlama, Mistral, Qwen2/2.5, Qwen3, by configuration.

Pre-norm decoder layers of grouped-query attention and a gated MLP (Llama 2: arXiv:2307.09288; GQA:
arXiv:2305.13245; SwiGLU: arXiv:2002.05202). Every input of a forward pass is an argument; KV pages
go in and come out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxlora.config import ModelConfig
from jaxlora.models.extras import (
    Extras,
    ExtrasBatch,
    embedded_with_lora,
    logits_with_lora,
    own_embeddings,
    own_logits,
)
from jaxlora.models.layers import (
    Linear,
    RMSNorm,
    look_up,
    matmul,
    rope_tables,
    rotate,
)
from jaxlora.models.lora import (
    FusedLinear,
    Group,
    LayerLora,
    groups,
    linear_with_lora,
    norm_before,
)
from jaxlora.parallel import summed
from kernels_pallas.paged_attention.op import Implementation as Attention
from kernels_pallas.paged_attention.op import PagedBatch, token_rows

Pages = Float[Array, "P page_size KV2 D"]
RopeTables = tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]]


class LlamaLayer(nnx.Module):
    """One decoder layer, or what one of several devices computes of it."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        num_devices: int = 1,
        *,
        weight_first: bool = False,
    ) -> None:
        self.config = config
        self.num_devices = num_devices
        linear = functools.partial(Linear, dtype=dtype, weight_first=weight_first)
        hidden, mlp = config.hidden_size, config.intermediate_size
        qkv_size = config.q_size + 2 * config.kv_size
        self.input_norm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.qkv = linear(hidden, qkv_size, bias=config.qkv_bias)
        self.o = linear(config.q_size, hidden, bias=config.o_bias)
        self.post_norm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        self.gate_up = linear(hidden, 2 * mlp, bias=config.mlp_bias)
        self.down = linear(mlp, hidden, bias=config.mlp_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, dtype=dtype)

    def attend(
        self,
        x: Float[Array, "T d"],
        rope: RopeTables,
        pages: Pages,
        batch: PagedBatch,
        attention: Attention,
        lora: LayerLora | None,
        fused: FusedLinear | None,
    ) -> tuple[Float[Array, "T q_size"], Pages]:
        """What attention makes of the layer's input, and its KV pages with the step's tokens
        written."""
        config = self.config
        qkv_group, *_ = groups(config, self.num_devices)
        normed = norm_before(self.input_norm, x, fused)
        qkv = linear_with_lora(self.qkv, qkv_group, normed, lora, fused=fused)
        num_tokens, scale = qkv.shape[0], config.head_dim**-0.5
        if attention.of_qkv is not None and not config.qk_norm:
            heads = qkv.reshape(num_tokens, -1, config.head_dim)
            mixed, pages = attention.of_qkv(heads, rope, pages, batch, scale=scale)
            return mixed.reshape(num_tokens, config.q_size), pages
        q, k, v = jnp.split(qkv, [config.q_size, config.q_size + config.kv_size], axis=1)
        q = q.reshape(num_tokens, config.num_heads, config.head_dim)
        k = k.reshape(num_tokens, config.num_kv_heads, config.head_dim)
        v = v.reshape(num_tokens, config.num_kv_heads, config.head_dim)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        window = config.sliding_window
        mixed, pages = attention.function(q, k, v, pages, batch, scale=scale, sliding_window=window)
        return mixed.reshape(num_tokens, config.q_size), pages

    def finish(
        self,
        x: Float[Array, "T d"],
        mixed: Float[Array, "T q_size"],
        lora: LayerLora | None,
        fused: FusedLinear | None,
    ) -> Float[Array, "T d"]:
        """The layer's output from its input and what attention made of that, token by token."""
        _, o_group, gate_up_group, down_group = groups(self.config, self.num_devices)
        x = self._onto(x, self.o, o_group, mixed, lora, fused)
        normed = norm_before(self.post_norm, x, fused)
        inner = linear_with_lora(self.gate_up, gate_up_group, normed, lora, fused=fused)
        return self._onto(x, self.down, down_group, inner, lora, fused)

    def _onto(
        self,
        x: Float[Array, "T d"],
        linear: Linear,
        group: Group,
        inner: Float[Array, "T d_in"],
        lora: LayerLora | None,
        fused: FusedLinear | None,
    ) -> Float[Array, "T d"]:
        """``x`` plus the linear of ``inner``, of which each device has a part."""
        if self.num_devices == 1:
            return linear_with_lora(linear, group, inner, lora, fused=fused, residual=x)
        return x + summed(
            linear_with_lora(linear, group, inner, lora, fused=fused), self.num_devices
        )


# Each half of a layer is traced and lowered once for all layers of a program; XLA inlines the
# calls. Without this every layer's kernels are built anew, which takes longer than compiling them.


@functools.partial(jax.jit, static_argnames=("graph", "attention"))
def _attend(
    graph: nnx.GraphDef[LlamaLayer],
    state: nnx.State[Any, Any],
    x: Float[Array, "T d"],
    rope: RopeTables,
    pages: Pages,
    batch: PagedBatch,
    attention: Attention,
    lora: LayerLora | None,
    fused: FusedLinear | None,
) -> tuple[Float[Array, "T q_size"], Pages]:
    return nnx.merge(graph, state).attend(x, rope, pages, batch, attention, lora, fused)


@functools.partial(jax.jit, static_argnames="graph")
def _finish(
    graph: nnx.GraphDef[LlamaLayer],
    state: nnx.State[Any, Any],
    x: Float[Array, "T d"],
    mixed: Float[Array, "T q_size"],
    lora: LayerLora | None,
    fused: FusedLinear | None,
) -> Float[Array, "T d"]:
    return nnx.merge(graph, state).finish(x, mixed, lora, fused)


class Kept(NamedTuple):
    """The tokens whose hidden states are wanted, where they are few: what follows the last layer's
    attention is computed for them alone."""

    tokens: Int32[Array, " R"]
    lora: LayerLora | None
    """The last layer's, with a batch of these tokens."""
    fused: FusedLinear | None
    """What runs linears of so many."""


def run_layer(
    graph: nnx.GraphDef[LlamaLayer],
    state: nnx.State[Any, Any],
    x: Float[Array, "T d"],
    rope: RopeTables,
    pages: Pages,
    batch: PagedBatch,
    attention: Attention,
    lora: LayerLora | None,
    fused: FusedLinear | None = None,
    kept: Kept | None = None,
) -> tuple[Float[Array, "N d"], Pages]:
    """A layer's output of every token, or of those that are ``kept``, and its KV pages with all of
    them written."""
    mixed, pages = _attend(graph, state, x, rope, pages, batch, attention, lora, fused)
    if kept is not None:
        x, mixed, lora, fused = x[kept.tokens], mixed[kept.tokens], kept.lora, kept.fused
    return _finish(graph, state, x, mixed, lora, fused), pages


class Llama(nnx.Module):
    """A Llama-family decoder with its output head.

    With ``num_devices`` above 1 it is what each of them computes: ``config`` is then that of
    :func:`jaxlora.parallel.shard`, the vocabulary split too, and calls are within a shard_map.
    ``weight_first`` is :func:`jaxlora.models.layers.matmul`'s, for a CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        num_devices: int = 1,
        *,
        weight_first: bool = False,
    ) -> None:
        self.config = config
        self.num_devices = num_devices
        self.weight_first = weight_first
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embedding = nnx.Param(jnp.zeros((vocab, hidden), dtype))
        self.layers = nnx.List(
            [
                LlamaLayer(config, dtype, num_devices, weight_first=weight_first)
                for _ in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(hidden, vocab, bias=False, dtype=dtype)

    def __call__(
        self,
        token_ids: Int32[Array, " T"],
        cache: list[Pages],
        batch: PagedBatch,
        attention: Attention,
        lora: list[LayerLora] | None,
        extras: tuple[Extras, ExtrasBatch] | None = None,
        fused: FusedLinear | None = None,
        kept: Kept | None = None,
    ) -> tuple[Float[Array, "N d"], list[Pages]]:
        """Normalized hidden states of every token, or of those that are ``kept``, and the cache
        with all of them written."""
        if attention.share is not None:
            shared, token_ids = attention.share(
                batch,
                token_ids,
                num_heads=self.config.num_heads,
                num_kv_heads=self.config.num_kv_heads,
            )
            batch = dataclasses.replace(batch, shared=shared)
        x, rope = self.begin(token_ids, batch, extras)
        new_cache = []
        for i, layer in enumerate(self.layers):
            x, pages = run_layer(
                *nnx.split(layer),
                x,
                rope,
                cache[i],
                batch,
                attention,
                None if lora is None else lora[i],
                fused,
                kept if i == len(self.layers) - 1 else None,
            )
            new_cache.append(pages)
        return self.norm(x), new_cache

    def begin(
        self,
        token_ids: Int32[Array, " T"],
        batch: PagedBatch,
        extras: tuple[Extras, ExtrasBatch] | None = None,
    ) -> tuple[Float[Array, "T d"], RopeTables]:
        """What the first layer reads, and what all of them do."""
        _, positions, _ = token_rows(batch, token_ids.shape[0])
        rope = rope_tables(positions, self.config)
        x = look_up(self.embedding[...], token_ids, self.num_devices)
        if extras is not None and (pair := extras[0].embed) is not None:
            x = embedded_with_lora(x, token_ids, pair, extras[1].tokens, self.num_devices)
        if extras is not None and "embed" in extras[0].matrices:
            x = own_embeddings(x, token_ids, extras[0], extras[1].tokens, self.num_devices)
        return summed(x, self.num_devices), rope

    def logits(
        self, hidden: Float[Array, "R d"], extras: tuple[Extras, ExtrasBatch] | None = None
    ) -> Float[Array, "R V"]:
        """Scores over the vocabulary, float32; of several devices each has its own columns."""
        head = self.embedding if self.config.tie_word_embeddings else self.lm_head.weight
        scores = matmul(
            hidden,
            head[...],
            preferred_element_type=jnp.dtype(jnp.float32),
            weight_first=self.weight_first,
        )
        if extras is not None and (pair := extras[0].lm_head) is not None:
            scores = logits_with_lora(scores, hidden, pair, extras[1].rows)
        if extras is not None and "lm_head" in extras[0].matrices:
            scores = own_logits(scores, hidden, extras[0], extras[1].rows)
        return scores
