"""A plan as arrays: numpy in the shapes of a compiled program, padded to its bucket."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxlora.engine.constraint import TokenMask, num_mask_words
from jaxlora.engine.scheduler import PlannedRow
from jaxlora.engine.sequence import Sequence
from jaxlora.models.extras import ExtrasBatch
from jaxlora.types import MAX_STOP_IDS
from kernels_pallas.leaf import leaf
from kernels_pallas.lora_matmul.op import LoraBatch
from kernels_pallas.lora_matmul.reference import IMPLEMENTATION as REFERENCE
from kernels_pallas.paged_attention.op import PagedBatch

FROM_TABLE = -1
"""Token id that means: the last token sampled in this row, which the host does not know yet."""


@typing.no_type_check  # leaves are numpy on the host, tracers in a program, shapes in between
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardInputs:
    """What a forward pass reads, beside weights, cache and bank."""

    token_ids: Int32[Array, " T"]
    table_rows: Int32[Array, " R"]
    """Each row's place in the device's table of last tokens."""
    paged: PagedBatch


@typing.no_type_check  # leaves are numpy on the host, tracers in a program, shapes in between
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleInputs:
    """What choosing the next tokens reads, beside logits and the table."""

    table_rows: Int32[Array, " R"]
    """Where each row's token is kept; the spare last row for rows that sample nothing."""
    state_rows: Int32[Array, " R"]
    """Where the state is that shapes each row's scores; the spare row if nothing does."""
    is_masked: Bool[Array, " R"]
    tells_logprobs: Bool[Array, " R"]
    temperature: Float32[Array, " R"]
    top_k: Int32[Array, " R"]
    top_p: Float32[Array, " R"]
    min_p: Float32[Array, " R"]
    seeds: UInt32[Array, "R 2"]
    num_generated: Int32[Array, " R"]
    held_back_ids: Int32[Array, "R stop_ids"]
    """Ids that must not be chosen yet; padded with the vocabulary's size."""


def forward_inputs(
    rows: list[PlannedRow],
    *,
    num_tokens: int,
    num_rows: int,
    pages_per_row: int,
    spare_row: int,
    decode: bool,
) -> ForwardInputs:
    """The step's tokens in a bucket of ``num_tokens`` tokens and ``num_rows`` rows.

    ``decode`` promises one token a row.
    """
    token_ids = np.zeros(num_tokens, np.int32)
    table_rows = np.full(num_rows, spare_row, np.int32)
    cu_q_lens = np.zeros(num_rows + 1, np.int32)
    kv_lens = np.zeros(num_rows, np.int32)
    page_table = np.zeros((num_rows, pages_per_row), np.int32)
    at = 0
    for i, row in enumerate(rows):
        sequence, start, count, _ = row
        known = sequence.token_ids
        if count == 1:
            # From the table only what the host does not know yet: each forward pass puts a token of
            # its own into it, and that of a row that then sampled nothing is no one's.
            token_ids[at] = known[start] if start < len(known) else FROM_TABLE
        else:
            assert start + count <= len(known), "more than one token the host does not know"
            token_ids[at : at + count] = np.asarray(known[start : start + count], np.int32)
        at += count
        table_rows[i] = sequence.row
        cu_q_lens[i + 1] = at
        kv_lens[i] = start + count
        page_table[i, : len(sequence.pages)] = sequence.pages
    cu_q_lens[len(rows) + 1 :] = at
    paged = PagedBatch(
        cu_q_lens=leaf(cu_q_lens),
        kv_lens=leaf(kv_lens),
        page_table=leaf(page_table),
        num_rows=leaf([len(rows)], np.int32),
        # 1 is a promise, which a part of a prompt does not make even if it is one token.
        max_q_len=1 if decode else max(2, num_tokens),
    )
    return ForwardInputs(token_ids=leaf(token_ids), table_rows=leaf(table_rows), paged=paged)


def slots_of_tokens(rows: list[PlannedRow], num_tokens: int) -> np.ndarray:
    """Slot of each token, -1 without an adapter and for padding; rows are ordered by slot."""
    token_slots = np.full(num_tokens, -1, np.int32)
    slots = np.repeat([row.sequence.slot for row in rows], [row.num_tokens for row in rows])
    token_slots[: len(slots)] = slots
    return token_slots


def slots_of_rows(paged: PagedBatch, token_slots: np.ndarray) -> np.ndarray:
    """Slot of each row's last token, -1 for padding."""
    row_slots = token_slots[np.asarray(paged.cu_q_lens[1:]) - 1]
    row_slots[int(paged.num_rows[0]) :] = -1
    return row_slots


class LoraBatches(NamedTuple):
    """Which slot serves which token of a step."""

    tokens: LoraBatch
    rows: LoraBatch | None
    """Of each row's last token, where the last layer goes on with those alone."""


_LEAST_TOP_P = 1e-30


def extras_batch(
    paged: PagedBatch,
    token_slots: np.ndarray,
    used: np.ndarray,
    ranks: np.ndarray,
) -> ExtrasBatch:
    """Which slot with extras serves which token and which row; ``used`` is bool ``[S]``."""
    token_slots = np.where((token_slots >= 0) & used[token_slots], token_slots, -1)
    tokens, by_row = (
        REFERENCE.plan(slots, ranks) for slots in (token_slots, slots_of_rows(paged, token_slots))
    )
    return ExtrasBatch(tokens=tokens, rows=by_row)


def sample_inputs(
    rows: list[PlannedRow],
    *,
    num_rows: int,
    spare_row: int,
    vocab_size: int,
    masks: Mapping[int, TokenMask] = {},
) -> SampleInputs:
    """Each row's sampling parameters, in a bucket of ``num_rows`` rows."""
    table_rows = np.full(num_rows, spare_row, np.int32)
    state_rows = np.full(num_rows, spare_row, np.int32)
    is_masked = np.zeros(num_rows, np.bool_)
    tells_logprobs = np.zeros(num_rows, np.bool_)
    temperature = np.zeros(num_rows, np.float32)
    top_k = np.zeros(num_rows, np.int32)
    top_p = np.ones(num_rows, np.float32)
    min_p = np.zeros(num_rows, np.float32)
    seeds = np.zeros((num_rows, 2), np.uint32)
    num_generated = np.zeros(num_rows, np.int32)
    held_back = np.full((num_rows, MAX_STOP_IDS), vocab_size, np.int32)
    for i, row in enumerate(rows):
        sequence, params = row.sequence, row.sequence.params
        if not row.samples:
            continue
        table_rows[i] = sequence.row
        if _needs_only_greedy(row):
            continue
        if params.shapes_logits:
            state_rows[i] = sequence.row
        tells_logprobs[i] = params.logprobs is not None
        temperature[i] = params.temperature
        top_k[i] = min(max(params.top_k, 0), vocab_size)
        # Not 0 as a 32-bit float, which the most likely token would not be needed for.
        top_p[i], min_p[i] = max(params.top_p, _LEAST_TOP_P), params.min_p
        seeds[i] = (sequence.seed >> 32) & 0xFFFFFFFF, sequence.seed & 0xFFFFFFFF
        num_generated[i] = _already_generated(row)
        is_masked[i] = i in masks
        if _holds_back(row) and not (i in masks and masks[i].ends):
            ids = sequence.held_back_ids
            held_back[i, : len(ids)] = ids
    return SampleInputs(
        table_rows=leaf(table_rows),
        state_rows=leaf(state_rows),
        is_masked=leaf(is_masked),
        tells_logprobs=leaf(tells_logprobs),
        temperature=leaf(temperature),
        top_k=leaf(top_k),
        top_p=leaf(top_p),
        min_p=leaf(min_p),
        seeds=leaf(seeds),
        num_generated=leaf(num_generated),
        held_back_ids=leaf(held_back),
    )


def mask_array(masks: Mapping[int, TokenMask], *, num_rows: int, vocab_size: int) -> np.ndarray:
    """The masks of a step's rows, in a bucket of ``num_rows`` rows: uint32 ``[R, ceil(V / 32)]``.
    A row without one may choose any token."""
    array = np.full((num_rows, num_mask_words(vocab_size)), 0xFFFFFFFF, np.uint32)
    for i, mask in masks.items():
        array[i] = mask.bits
    return array


def all_greedy(rows: list[PlannedRow]) -> bool:
    """Whether the step needs nothing but the most likely tokens."""
    return all(_needs_only_greedy(row) for row in rows if row.samples)


def new_state_rows(rows: list[PlannedRow]) -> list[PlannedRow]:
    """Rows that sample for the first time since their sequence got its row, and need state."""
    return [
        row
        for row in rows
        if row.samples
        and row.kv_len == row.sequence.num_at_admission
        and row.sequence.params.shapes_logits
    ]


class ScoredChunk(NamedTuple):
    """A part of a prompt whose tokens' log-probabilities a step computes."""

    sequence: Sequence
    first_token: int
    """Its first token's index in the step."""
    positions: range
    """Of the prompt's tokens that are scored, by the hidden states of those before them."""


def scored_chunks(rows: list[PlannedRow]) -> list[ScoredChunk]:
    """What the step must tell of its prompts, in the order of its tokens."""
    chunks = []
    at = 0
    for row in rows:
        sequence = row.sequence
        if sequence.scores_prompt(row.start):
            end = min(row.kv_len + 1, len(sequence.prompt_token_ids))
            chunks.append(ScoredChunk(sequence, at, range(row.start + 1, end)))
        at += row.num_tokens
    return chunks


def _needs_only_greedy(row: PlannedRow) -> bool:
    sequence = row.sequence
    return sequence.wants_only_greedy and sequence.constraint is None and not _holds_back(row)


def _already_generated(row: PlannedRow) -> int:
    """Tokens sampled before the one this step samples."""
    return row.kv_len - len(row.sequence.prompt_token_ids)


def _holds_back(row: PlannedRow) -> bool:
    least = row.sequence.params.min_tokens
    return least > 0 and _already_generated(row) < least
