"""Log-probabilities of prompt tokens, from the hidden states a step leaves behind."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxlora.adapters.bank import AdapterBank
from jaxlora.engine.batch import ScoredChunk
from jaxlora.engine.logprobs import LogprobArrays, logprobs_of
from jaxlora.engine.lowering import Program
from jaxlora.models.extras import Extras, ExtrasBatch
from jaxlora.models.llama import Llama
from jaxlora.parallel import joined
from kernels_pallas.lora_matmul.reference import IMPLEMENTATION as REFERENCE

MAX_SCORED_TOKENS = 64
"""Tokens scored at once: each takes a row of logits."""


class PromptScorer:
    """One program, run as often as a step's prompts need it.

    ``hidden`` is what each step leaves that may score prompts: a row for each token of the largest
    of them.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[Llama],
        structure: Any,
        weights: tuple[Any, ...],
        hidden: jax.ShapeDtypeStruct,
        bank: AdapterBank | None,
        *,
        num_top: int,
    ) -> None:
        self._function = partial(_score, graph, structure, num_top=num_top)
        self._weights = weights
        self._hidden = hidden
        self._bank = bank
        # Adapters of the layers are in the hidden states already; those of the head are not.
        extras = None if bank is None else bank.extras
        changes_head = extras is not None and (
            extras.arrays.lm_head is not None or "lm_head" in extras.arrays.matrices
        )
        self._extras = extras if changes_head else None
        self._size = min(MAX_SCORED_TOKENS, hidden.shape[0])
        self._executable: Any = None

    def program(self) -> Program:
        """What is to be compiled."""
        return Program(self._function, (self._weights, self._hidden, *self._inputs([], [], [])))

    def use_weights(self, weights: tuple[jax.Array, ...]) -> None:
        """Takes the arrays in the place of shapes."""
        self._weights = weights

    def use_program(self, executable: Any) -> None:
        """Takes it, compiled."""
        self._executable = executable

    def __call__(self, chunks: list[ScoredChunk], hidden: jax.Array | None) -> list[LogprobArrays]:
        """The chunks' tokens, one chunk after another, in slices of which the last is padded."""
        places = [chunk.first_token + i for chunk in chunks for i in range(len(chunk.positions))]
        targets = [chunk.sequence.token_ids[at] for chunk in chunks for at in chunk.positions]
        slots = [chunk.sequence.slot for chunk in chunks for _ in chunk.positions]
        slices = (slice(at, at + self._size) for at in range(0, len(places), self._size))
        return [
            self._executable(
                self._weights, hidden, *self._inputs(places[some], targets[some], slots[some])
            )
            for some in slices
        ]

    def _inputs(self, places: list[int], targets: list[int], slots: list[int]) -> tuple[Any, ...]:
        padded = np.zeros((2, self._size), np.int32)
        padded[:, : len(places)] = places, targets
        if self._bank is None or self._extras is None:
            return (*padded,)
        with_extras = np.full(self._size, -1, np.int32)
        used = [slot if slot >= 0 and self._extras.used[slot] else -1 for slot in slots]
        with_extras[: len(slots)] = used
        batch = REFERENCE.plan(with_extras, self._bank.ranks)
        return *padded, self._extras.arrays, batch


def _score(
    graph: nnx.GraphDef[Llama],
    structure: Any,
    weights: tuple[jax.Array, ...],
    hidden: Float[Array, "T d"],
    places: Int32[Array, " N"],
    targets: Int32[Array, " N"],
    extras: Extras | None = None,
    batch: Any = None,
    *,
    num_top: int,
) -> LogprobArrays:
    model = nnx.merge(graph, jax.tree.unflatten(structure, weights))
    extra = None if extras is None else (extras, ExtrasBatch(tokens=batch, rows=batch))
    logits = joined(model.logits(hidden[places], extra), axis=1)
    return logprobs_of(logits, targets, num_top=num_top)
