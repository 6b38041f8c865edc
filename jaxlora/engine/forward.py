"""The forward program: tokens to logits, and to the most likely token of each row."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxlora.engine.batch import ForwardInputs
from jaxlora.engine.sampling import greedy_of_parts
from jaxlora.models.extras import Extras, ExtrasBatch
from jaxlora.models.llama import Attention, Llama
from jaxlora.models.lora import Bank, FusedLinear, LayerLora, num_layers
from kernels_pallas.lora_linear.op import Implementation as LinearImplementation
from kernels_pallas.lora_matmul.op import Implementation as LoraImplementation
from kernels_pallas.lora_matmul.op import LoraBatch
from kernels_pallas.paged_attention.op import PagedBatch, token_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardSetup:
    """All that a forward program depends on besides its arguments."""

    graph: nnx.GraphDef[Llama]
    structure: Any
    """Of the model's state, whose leaves are an argument."""
    attention: Attention
    lora_matmul: LoraImplementation | None
    """None without adapters."""
    linear: LinearImplementation | None
    """What runs a step's linears in one piece, if anything does."""
    hidden_rows: int
    """Rows that hidden states are padded to, so that one program scores prompts after any step."""

    def fused(
        self, paged: PagedBatch, num_tokens: int, lora: LoraBatch | None
    ) -> FusedLinear | None:
        """What runs those of a step's linears that it serves in one piece, if there is anything."""
        if self.linear is None:
            return None
        decode, shared = paged.max_q_len == 1, None
        if lora is not None and self.linear.serves(
            num_tokens, decode=decode, num_slots=lora.ranks.shape[0]
        ):
            shared = self.linear.share(lora)
        return FusedLinear(self.linear, decode, shared)


def forward(
    setup: ForwardSetup,
    weights: tuple[jax.Array, ...],
    cache: list[jax.Array],
    table: Int32[Array, " rows"],
    inputs: ForwardInputs,
    bank: list[Bank] | None = None,
    batch: LoraBatch | None = None,
    extras: Extras | None = None,
    extras_at: ExtrasBatch | None = None,
) -> tuple[
    Int32[Array, " R"],
    Int32[Array, " rows"],
    list[jax.Array],
    Float[Array, "R V"],
    Float[Array, "most d"] | None,
]:
    """One step: each row's most likely token, the table with it, the cache, logits, and hidden
    states unless every row decodes."""
    model = nnx.merge(setup.graph, jax.tree.unflatten(setup.structure, weights))
    paged = inputs.paged
    row, _, _ = token_rows(paged, inputs.token_ids.shape[0])
    last_sampled = table[inputs.table_rows[row]]
    token_ids = jnp.where(inputs.token_ids < 0, last_sampled, inputs.token_ids)
    lora = None
    if setup.lora_matmul is not None and bank is not None and batch is not None:
        kernel = setup.lora_matmul
        lora = [
            LayerLora(part, batch.of_layer(number, of), kernel.function, kernel.gated)
            for part in bank
            for of in [num_layers(part)]
            for number in range(of)
        ]
    extra = None
    if lora is not None and extras is not None and extras_at is not None:
        extra = (extras, extras_at)
        slots = extras_at.tokens.token_slots
        lora = [
            dataclasses.replace(layer, vectors=vectors, vector_slots=slots)
            for layer, vectors in zip(lora, extras.layers or [{}] * len(lora), strict=True)
        ]
    fused = setup.fused(paged, inputs.token_ids.shape[0], None if lora is None else batch)
    hidden, cache = model(token_ids, cache, paged, setup.attention, lora, extra, fused)
    last = jnp.maximum(paged.cu_q_lens[1:] - 1, 0)
    logits = model.logits(hidden[last], extra)
    tokens = greedy_of_parts(logits)
    # A row whose prompt goes on gets a token too, which its next one overwrites unread.
    table = table.at[inputs.table_rows].set(tokens)
    if paged.max_q_len == 1:
        return tokens, table, cache, logits, None
    missing = setup.hidden_rows - hidden.shape[0]
    return tokens, table, cache, logits, jnp.pad(hidden, ((0, missing), (0, 0)))
