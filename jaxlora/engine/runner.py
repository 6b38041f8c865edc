"""The device's side of a step: weights, cache, bank and table, and the programs that use them.

*Forward* programs turn tokens into logits of each row's last token and choose the most likely
token; *sample* programs choose anew where a row wants anything else. The choice is kept in a table
on the device, where the next forward pass finds it: the host need not have read it. Both come in
few static sizes ("buckets").
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, UInt32

from jaxlora.adapters.bank import AdapterBank, StagedAdapter
from jaxlora.adapters.base_weights import BaseWeights
from jaxlora.config import ModelConfig
from jaxlora.engine.batch import (
    ForwardInputs,
    LoraBatches,
    SampleInputs,
    ScoredChunk,
    all_greedy,
    extras_batch,
    forward_inputs,
    mask_array,
    new_state_rows,
    sample_inputs,
    scored_chunks,
    slots_of_rows,
    slots_of_tokens,
)
from jaxlora.engine.buckets import bucket, row_buckets, scored_step, token_buckets
from jaxlora.engine.constraint import TokenMask
from jaxlora.engine.forward import ForwardSetup, forward
from jaxlora.engine.layered import LEAST_LAYERS, LayeredForward
from jaxlora.engine.logprobs import LogprobArrays
from jaxlora.engine.lowering import Program
from jaxlora.engine.mirror import Mirror
from jaxlora.engine.pending import PendingTokens
from jaxlora.engine.program_report import ProgramReport
from jaxlora.engine.programs import compile_all
from jaxlora.engine.prompt_scores import PromptScorer
from jaxlora.engine.row_state import RowState, empty_state, row_state, write_row
from jaxlora.engine.sampling import OVERFLOWED, sample
from jaxlora.engine.scheduler import Plan
from jaxlora.models.llama import Llama
from jaxlora.models.lora import groups
from jaxlora.parallel import Axes, Devices, joined, spec, specs_of
from jaxlora.types import MAX_LOGPROBS
from kernels_pallas.lora_linear.op import Implementation as LinearImplementation
from kernels_pallas.paged_attention.op import Implementation as Attention

logger = logging.getLogger(__name__)


_WRITE_STATE = "row state"
_SCORE_PROMPT = "prompt logprobs"
_LOGITS: Axes = (None, "vocab")


class Forwarded(NamedTuple):
    """The first half of a step, dispatched."""

    num_rows: int
    most_likely: jax.Array
    """A token for each row, in the table already."""
    logits: jax.Array
    hidden: jax.Array | None
    scored: list[ScoredChunk]

    def is_done(self) -> bool:
        """Whether the device has run it."""
        return self.logits.is_ready()  # type: ignore[attr-defined]


class Runner:
    """Runs plans. Only this class holds device arrays between steps.

    Weights and cache may be shapes at first, which is enough to compile: then :meth:`use_arrays`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: tuple[nnx.GraphDef[Llama], nnx.State[Any, Any]],
        cache: list[Any],
        *,
        devices: Devices,
        bank: AdapterBank | None,
        attention: Attention,
        linear: LinearImplementation | None = None,
        base: BaseWeights | None = None,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        pages_per_row: int,
        max_logprobs: int = MAX_LOGPROBS,
    ) -> None:
        self.config = config
        self.devices = devices
        self.bank = bank
        self._extras = None if bank is None else bank.extras
        self._base = base
        self.max_num_seqs = max_num_seqs
        self.row_buckets = row_buckets(max_num_seqs, () if linear is None else linear.sizes)
        self.token_buckets = token_buckets(max_num_batched_tokens)
        self.max_scored_step = scored_step(self.token_buckets, max_num_seqs)
        """Most tokens of a step that scores prompts."""
        graph, state = weights
        # A tuple of leaves is dispatched several times faster than a nested state.
        leaves, structure = jax.tree.flatten(state)
        self._setup = ForwardSetup(
            graph=graph,
            structure=structure,
            attention=attention,
            lora_matmul=None if bank is None else bank.kernel,
            linear=linear,
            groups=groups(config, devices.count),
            hidden_rows=self.max_scored_step,
        )
        self._layered: LayeredForward | None = None
        if devices.platform == "cpu" and devices.count == 1 and len(cache) >= LEAST_LAYERS:
            self._layered = LayeredForward(self._setup, devices, bank)
        self._weights = tuple(leaves)
        self._cache = cache
        self._table = devices.zeros((max_num_seqs + 1,), jnp.int32, (None,))
        self._state = devices.put(empty_state(max_num_seqs, config.vocab_size))
        self._no_masks = {
            size: devices.put(mask_array({}, num_rows=size, vocab_size=config.vocab_size))
            for size in self.row_buckets
        }
        self._pages_per_row = pages_per_row
        vocab = config.vocab_size
        self._num_top = vocab if max_logprobs == -1 else min(max_logprobs, vocab)
        hidden = (self.max_scored_step, config.hidden_size)
        self._score_prompts = PromptScorer(
            graph,
            structure,
            self._weights,
            jax.ShapeDtypeStruct(hidden, cache[0].dtype),
            bank,
            num_top=self._num_top,
        )
        self._mirror = Mirror(devices)
        self._programs: dict[str, Any] = {}

    def programs(self) -> dict[str, Program]:
        """Every program a step can need, and the adapter writes; of shapes alone if the runner was
        made of those."""
        programs = self._forward_programs() | self._sample_programs()
        programs[_WRITE_STATE] = Program(write_row, self._write_arguments(), donated=(0,))
        programs[_SCORE_PROMPT] = self._score_prompts.program()
        for owner, name, donated in self._owners():
            for key, (function, arguments) in owner.programs().items():
                results = specs_of(arguments[0]) if donated else spec(("device",))
                programs[name.format(key)] = Program(function, arguments, donated, results)
        return programs

    def use_arrays(self, state: nnx.State[Any, Any], cache: list[Any]) -> None:
        """Takes weights and cache in the place of the shapes it was made of."""
        self._weights = tuple(jax.tree.leaves(state))
        self._cache = cache
        self._score_prompts.use_weights(self._weights)

    def compile(self, *, use_tqdm: bool = True, after: Future[Any] | None = None) -> ProgramReport:
        """Compiles or loads all programs and hands them to those who run them; ``after`` is as for
        :func:`jaxlora.engine.programs.compile_all`."""
        programs = self.programs()
        logger.info("%d programs: %s", len(programs), "; ".join(programs))
        compiled, report = compile_all(programs, self.devices, use_tqdm=use_tqdm, after=after)
        self._programs = compiled
        if self._layered is not None:
            self._programs |= self._layered.executables(compiled)
        self._score_prompts.use_program(compiled[_SCORE_PROMPT])
        for owner, name, _ in self._owners():
            owner.use_programs({key: compiled[name.format(key)] for key in owner.programs()})
        return report

    def _owners(self) -> list[tuple[Any, str, tuple[int, ...]]]:
        """Who else has programs, what these are called, and which arguments they may overwrite and
        return the like of; without any they return what each device has found."""
        owners = (
            (self.bank, "adapter write, {}", (0,)),
            (self._extras, "adapter {} write", (0,)),
            (self._base, "base {}", ()),
        )
        return [each for each in owners if each[0] is not None]

    def load(self, loads: list[tuple[int, StagedAdapter]]) -> None:
        """Dispatches the writing of adapters to slots and returns at once; steps that are
        dispatched later find them there."""
        assert self.bank is not None
        for slot, staged in loads:
            self.bank.load(slot, staged)

    def run(self, plan: Plan) -> PendingTokens:
        """Dispatches a step and returns at once."""
        return self.sample(self.forward(plan), plan, {})

    def forward(self, plan: Plan) -> Forwarded:
        """Dispatches a step's forward pass and returns at once; :meth:`sample` must follow."""
        rows = plan.rows
        scored = scored_chunks(rows)
        decode = not scored and all(row.num_tokens == 1 for row in rows)
        num_rows = bucket(self.row_buckets, len(rows)) if decode else self.row_buckets[-1]
        num_tokens = num_rows if decode else bucket(self.token_buckets, plan.num_tokens)

        inputs = forward_inputs(
            rows,
            num_tokens=num_tokens,
            num_rows=num_rows,
            pages_per_row=self._pages_per_row,
            spare_row=self.max_num_seqs,
            decode=decode,
        )
        arguments: list[Any] = [
            self._weights,
            self._cache,
            self._table,
            self._mirror.put("forward", inputs),
        ]
        slots = {row.sequence.slot for row in rows if row.sequence.slot >= 0}
        with_lora = bool(slots)
        used = None if self._extras is None else self._extras.used
        with_extras = used is not None and any(used[slot] for slot in slots)
        if with_lora:
            token_slots = slots_of_tokens(rows, num_tokens)
            arguments += self.lora_arguments(inputs, token_slots)
            if with_extras:
                arguments += self._extras_arguments(inputs, token_slots)
        program = self._programs[_forward_name(decode, with_lora, num_tokens, with_extras)]
        tokens, self._table, self._cache, logits, hidden = program(*arguments)
        return Forwarded(num_rows, tokens, logits, hidden, scored)

    def sample(
        self, forward: Forwarded, plan: Plan, masks: Mapping[int, TokenMask]
    ) -> PendingTokens:
        """Dispatches the choice of a step's tokens and returns at once."""
        rows, num_rows = plan.rows, forward.num_rows
        tokens, logprobs = forward.most_likely, None
        if not all_greedy(rows):
            chosen = sample_inputs(
                rows,
                num_rows=num_rows,
                spare_row=self.max_num_seqs,
                vocab_size=self.config.vocab_size,
                masks=masks,
            )
            sampler = self._programs[_sample_name(num_rows)]
            sent = self._mirror.put("sample", chosen)
            for row in new_state_rows(rows):
                values = row_state(row.sequence, row.kv_len, self.config.vocab_size)
                at = np.asarray(row.sequence.row, np.int32)
                self._state = self._programs[_WRITE_STATE](self._state, at, values)
            tokens, told, self._table, self._state = sampler(
                forward.logits, self._table, sent, self._state, self._masks(masks, num_rows)
            )
            logprobs = told if chosen.tells_logprobs.any() else None
        scores = self._score_prompts(forward.scored, forward.hidden)
        return PendingTokens(tokens, logprobs, forward.scored, scores).start_copying()

    def _masks(self, masks: Mapping[int, TokenMask], num_rows: int) -> Any:
        """On the device; those that rule nothing out are there already."""
        if not masks:
            return self._no_masks[num_rows]
        array = mask_array(masks, num_rows=num_rows, vocab_size=self.config.vocab_size)
        return self.devices.put(array)

    def lora_arguments(self, inputs: ForwardInputs, token_slots: np.ndarray) -> list[Any]:
        """The bank, and which of its slots serves which token of a step (int32 ``[T]``, -1 for no
        adapter), as forward programs with adapters take them."""
        assert self.bank is not None
        kernel, ranks, rows = self.bank.kernel, self.bank.ranks, None
        if self._setup.keeps_rows_only(inputs):
            rows = kernel.plan(slots_of_rows(inputs.paged, token_slots), ranks)
        batches = LoraBatches(kernel.plan(token_slots, ranks), rows)
        return [self.bank.arrays, self._mirror.put("lora", batches)]

    def _extras_arguments(self, inputs: ForwardInputs, token_slots: np.ndarray) -> list[Any]:
        assert self.bank is not None
        assert self._extras is not None
        batch = extras_batch(inputs.paged, token_slots, self._extras.used, self.bank.ranks)
        return [self._extras.arrays, self._mirror.put("extras", batch)]

    def _forward_programs(self) -> dict[str, Program]:
        programs: dict[str, Program] = {}
        sizes = [(True, rows) for rows in self.row_buckets]
        sizes += [(False, tokens) for tokens in self.token_buckets]
        for decode, num_tokens in sizes:
            inputs = forward_inputs(
                [],
                num_tokens=num_tokens,
                num_rows=num_tokens if decode else self.row_buckets[-1],
                pages_per_row=self._pages_per_row,
                spare_row=self.max_num_seqs,
                decode=decode,
            )
            name = partial(_forward_name, decode, num_tokens=num_tokens)
            arguments: tuple[Any, ...] = (self._weights, self._cache, self._table, inputs)
            programs |= self._forward_program(name(False), *arguments)
            if self.bank is None:
                continue
            token_slots = slots_of_tokens([], num_tokens)
            arguments += tuple(self.lora_arguments(inputs, token_slots))
            programs |= self._forward_program(name(True), *arguments)
            if self._extras is not None:
                arguments += tuple(self._extras_arguments(inputs, token_slots))
                programs |= self._forward_program(name(True, with_extras=True), *arguments)
        return programs

    def _forward_program(self, name: str, *arguments: Any) -> dict[str, Program]:
        """One, or several that run it together."""
        if self._layered is not None:
            return self._layered.programs(name, arguments, spec(_LOGITS))
        results = (spec(()), spec(()), specs_of(self._cache), spec(_LOGITS), spec(()))
        function = partial(forward, self._setup)
        early = self._setup.early(*arguments[3:7])
        options = {} if early is None else early.options
        return {name: Program(function, arguments, (1, 2), results, options)}

    def _write_arguments(self) -> tuple[Any, ...]:
        one_row = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self._state
        )
        return self._state, np.asarray(0, np.int32), one_row

    def _sample_programs(self) -> dict[str, Program]:
        programs = {}
        for num_rows in self.row_buckets:
            logits = jax.ShapeDtypeStruct(
                (num_rows, self.config.vocab_size),
                jnp.float32,
                sharding=self.devices.sharding(_LOGITS),
            )
            inputs = sample_inputs(
                [],
                num_rows=num_rows,
                spare_row=self.max_num_seqs,
                vocab_size=self.config.vocab_size,
            )
            programs[_sample_name(num_rows)] = Program(
                partial(_sample_step, num_top=self._num_top),
                (logits, self._table, inputs, self._state, self._no_masks[num_rows]),
                donated=(1, 3),
            )
        return programs


def _sample_step(
    logits: Float[Array, "R V"],
    table: Int32[Array, " rows"],
    inputs: SampleInputs,
    state: RowState,
    masks: UInt32[Array, "R words"],
    *,
    num_top: int,
) -> tuple[Int32[Array, " R"], LogprobArrays, Int32[Array, " rows"], RowState]:
    logits = joined(logits, axis=1)
    tokens, logprobs, state = sample(logits, inputs, state, masks, num_top=num_top)
    # What the forward pass found: no scores, no choice.
    tokens = jnp.where(table[inputs.table_rows] == OVERFLOWED, OVERFLOWED, tokens)
    return tokens, logprobs, table.at[inputs.table_rows].set(tokens), state


def _forward_name(decode: bool, with_lora: bool, num_tokens: int, with_extras: bool = False) -> str:
    lora = " lora" * with_lora + " extras" * with_extras
    return f"{'decode' if decode else 'mixed'}{lora} {num_tokens}"


def _sample_name(num_rows: int) -> str:
    return f"sample {num_rows}"
