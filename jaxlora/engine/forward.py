"""The forward program: tokens to logits, and to the most likely token of each row."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxlora.engine.batch import ForwardInputs, LoraBatches
from jaxlora.engine.sampling import greedy_of_parts
from jaxlora.models.extras import Extras, ExtrasBatch, GroupVectors
from jaxlora.models.llama import Kept, Llama
from jaxlora.models.lora import Bank, FusedLinear, Group, LayerLora, num_layers
from kernels_pallas.lora_linear.op import EarlyKernels
from kernels_pallas.lora_linear.op import Implementation as LinearImplementation
from kernels_pallas.lora_matmul.op import Implementation as LoraImplementation
from kernels_pallas.lora_matmul.op import LoraBatch
from kernels_pallas.paged_attention.op import Implementation as Attention
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
    groups: tuple[Group, ...]
    """Of each layer."""
    hidden_rows: int
    """Most tokens of a step that scores prompts, and rows that hidden states are padded to, so that
    one program does it after any of them."""

    def model(self, weights: tuple[Any, ...]) -> Llama:
        """The model with these weights."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, weights))

    def keeps_rows_only(self, inputs: ForwardInputs) -> bool:
        """Whether a step's last layer goes on with the last token of each row alone."""
        return inputs.paged.max_q_len > 1 and inputs.token_ids.shape[0] > self.hidden_rows

    def early(
        self,
        inputs: ForwardInputs,
        bank: list[Bank] | None = None,
        batches: LoraBatches | None = None,
        extras: Extras | None = None,
    ) -> EarlyKernels | None:
        """What the program of these arguments (:func:`forward`'s) needs for its kernels to begin
        early; None where they do not: in steps with prompts, in large ones, and where any linear is
        XLA's."""
        num_tokens = inputs.token_ids.shape[0]
        if self.linear is None or inputs.paged.max_q_len > 1:
            return None
        # Large steps have kernels that wait for the end of the one in front.
        if num_tokens not in self.linear.sizes:
            return None
        lora = None
        if self.lora_matmul is not None and bank is not None and batches is not None:
            # Layers are alike.
            vectors = extras.layers[0] if extras is not None and extras.layers else {}
            kernel = self.lora_matmul.function
            lora = LayerLora(bank[0], batches.tokens, kernel, vectors=vectors)
        fused = FusedLinear(self.linear, shared=None)
        all_served = all(fused.serves(group, num_tokens, lora) for group in self.groups)
        return self.linear.early if all_served else None

    def fused(
        self,
        num_tokens: int,
        lora: LoraBatch | None,
        early: EarlyKernels | None = None,
    ) -> FusedLinear | None:
        """What runs those of so many tokens' linears that it serves in one piece, if there is
        anything."""
        if self.linear is None:
            return None
        shared = None
        if lora is not None and self.linear.serves(num_tokens, num_slots=lora.ranks.shape[0]):
            shared = self.linear.share(lora)
        return FusedLinear(self.linear, shared, early)


def forward(
    setup: ForwardSetup,
    weights: tuple[jax.Array, ...],
    cache: list[jax.Array],
    table: Int32[Array, " rows"],
    inputs: ForwardInputs,
    bank: list[Bank] | None = None,
    batches: LoraBatches | None = None,
    extras: Extras | None = None,
    extras_at: ExtrasBatch | None = None,
) -> tuple[
    Int32[Array, " R"],
    Int32[Array, " rows"],
    list[jax.Array],
    Float[Array, "R V"],
    Float[Array, "most d"] | None,
]:
    """One step: each row's most likely token (or OVERFLOWED), the table with it, the cache, logits,
    and hidden states of all tokens unless every row decodes or the step is too large to score
    prompts."""
    model, token_ids = setup.model(weights), step_tokens(table, inputs)
    lora = None
    if setup.lora_matmul is not None and bank is not None and batches is not None:
        of_layers = [
            (part, batches.tokens.of_layer(number, of))
            for part in bank
            for of in [num_layers(part)]
            for number in range(of)
        ]
        vectors = [] if extras is None else extras.layers
        lora = [
            layer_lora(setup.lora_matmul, part, batch, own, extras_at)
            for (part, batch), own in zip(of_layers, vectors or [{}] * len(of_layers), strict=True)
        ]
    extra = None if extras is None or extras_at is None else (extras, extras_at)
    batch = None if batches is None else batches.tokens
    early = setup.early(inputs, bank, batches, extras)
    fused = setup.fused(token_ids.shape[0], batch, early)
    kept = None
    if setup.keeps_rows_only(inputs):
        last_layer = None if lora is None else lora[-1]
        kept = kept_rows(setup, inputs.paged, last_layer, batches, extras_at)
    paged, attention = inputs.paged, setup.attention
    hidden, cache = model(token_ids, cache, paged, attention, lora, extra, fused, kept)
    tokens, table, logits, left = end_step(setup, model, hidden, table, inputs, extra)
    return tokens, table, cache, logits, left


def layer_lora(
    kernel: LoraImplementation,
    bank: Bank,
    batch: LoraBatch,
    vectors: GroupVectors,
    extras_at: ExtrasBatch | None,
) -> LayerLora:
    """What a layer adds of its adapters, whose place among the bank's slots is in ``batch``."""
    slots = None if extras_at is None else extras_at.tokens.token_slots
    return LayerLora(bank, batch, kernel.function, kernel.gated, vectors, slots)


def step_tokens(table: Int32[Array, " rows"], inputs: ForwardInputs) -> Int32[Array, " T"]:
    """A step's tokens, those of the last step among them."""
    row, _, _ = token_rows(inputs.paged, inputs.token_ids.shape[0])
    # What follows a token that overflowed is dropped.
    last_sampled = jnp.maximum(table[inputs.table_rows[row]], 0)
    return jnp.where(inputs.token_ids < 0, last_sampled, inputs.token_ids)


def end_step(
    setup: ForwardSetup,
    model: Llama,
    hidden: Float[Array, "N d"],
    table: Int32[Array, " rows"],
    inputs: ForwardInputs,
    extra: tuple[Extras, ExtrasBatch] | None,
) -> tuple[
    Int32[Array, " R"],
    Int32[Array, " rows"],
    Float[Array, "R V"],
    Float[Array, "most d"] | None,
]:
    """What :func:`forward` returns but for the cache, of a step's normalized hidden states."""
    rows_only = setup.keeps_rows_only(inputs)
    logits = model.logits(hidden if rows_only else hidden[_last_tokens(inputs.paged)], extra)
    tokens = greedy_of_parts(logits)
    # A row whose prompt goes on gets a token too, which its next one overwrites unread.
    table = table.at[inputs.table_rows].set(tokens)
    if rows_only or inputs.paged.max_q_len == 1:
        return tokens, table, logits, None
    missing = setup.hidden_rows - hidden.shape[0]
    return tokens, table, logits, jnp.pad(hidden, ((0, missing), (0, 0)))


def kept_rows(
    setup: ForwardSetup,
    paged: PagedBatch,
    lora: LayerLora | None,
    batches: LoraBatches | None,
    extras_at: ExtrasBatch | None,
) -> Kept:
    """The last token of each row, which the last layer, whose ``lora`` it is, goes on with like a
    decode step."""
    tokens = _last_tokens(paged)
    batch = None if batches is None else batches.rows
    fused = setup.fused(tokens.shape[0], batch)
    if lora is None or batch is None:
        return Kept(tokens, None, fused)
    last_layer = dataclasses.replace(
        lora,
        batch=dataclasses.replace(batch, first_slot=lora.batch.first_slot),
        vector_slots=None if extras_at is None else extras_at.rows.token_slots,
    )
    return Kept(tokens, last_layer, fused)


def _last_tokens(paged: PagedBatch) -> Int32[Array, " R"]:
    return jnp.maximum(paged.cu_q_lens[1:] - 1, 0)
