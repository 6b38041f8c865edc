"""Forward passes whose layers share what is compiled, for a CPU.

XLA compiles every layer of a program anew, and on a CPU that is nearly all of a start. So three
programs take the place of one there: the begin of a step, a few layers, run until there was each,
and the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxlora.adapters.bank import AdapterBank
from jaxlora.engine.batch import ForwardInputs, LoraBatches
from jaxlora.engine.forward import ForwardSetup, end_step, kept_rows, layer_lora, step_tokens
from jaxlora.engine.lowering import Program
from jaxlora.models.extras import Extras, ExtrasBatch, GroupVectors
from jaxlora.models.llama import LlamaLayer, Pages, RopeTables, run_layer
from jaxlora.models.lora import Bank
from jaxlora.parallel import Devices, spec, specs_of
from kernels_pallas.paged_attention.op import PagedBatch

LEAST_LAYERS = 8
"""Fewer are compiled about as fast in one program."""
_MOST_AT_ONCE = 5
"""Layers of a program: each call of one takes some time, and each layer some more to compile."""


class _Parts(NamedTuple):
    """Of a forward pass: the names of programs, or their executables."""

    begin: Any
    layers: Any
    last: Any
    """The last layers'; another one where the very last goes on with fewer tokens."""
    end: Any


class LayeredForward:
    """Makes the programs of forward passes, and of their executables what is called as
    :func:`jaxlora.engine.forward.forward` is. For one device."""

    def __init__(self, setup: ForwardSetup, devices: Devices, bank: AdapterBank | None) -> None:
        self._setup = setup
        model = setup.model(tuple(range(setup.structure.num_leaves)))
        layers = [nnx.split(layer) for layer in model.layers]
        graph, state = layers[0]
        self._layers = partial(_layers, setup, graph, jax.tree.structure(state))
        at_once = max(n for n in range(1, _MOST_AT_ONCE + 1) if len(layers) % n == 0)
        self._groups = [slice(at, at + at_once) for at in range(0, len(layers), at_once)]
        """Layers that are run at once."""
        self._weights_at = [tuple(jax.tree.leaves(state)) for _, state in layers]
        """Where those of each layer are among all weights."""
        self._first_slots: list[Any] = []
        """Of each layer in the bank, on the device: a step sends nothing."""
        if bank is not None:
            assert bank.kernel.stacked
            firsts = (np.full(1, n * bank.num_slots, np.int32) for n in range(len(layers)))
            self._first_slots = [devices.put(first) for first in firsts]
        self._names: dict[str, _Parts] = {}

    def programs(
        self, name: str, arguments: tuple[Any, ...], logits_spec: Any
    ) -> dict[str, Program]:
        """Those of a pass with these arguments. ``logits_spec`` is where logits are split."""
        weights, cache, table, inputs, *lora = arguments
        extras = tuple(lora[2:])
        # Without extras adapters concern the layers alone.
        outer = name if extras else name.replace(" lora", "")
        layers, rows_only = f"{name}, layers", self._setup.keeps_rows_only(inputs)
        last = f"{name}, last layers" if rows_only else layers
        parts = _Parts(f"{outer}, begin", layers, last, f"{outer}, end")
        self._names[name] = parts

        begin = Program(partial(_begin, self._setup), (weights, table, inputs, *extras))
        x, rope = jax.eval_shape(begin.function, *begin.arguments)
        pages, own, *of_lora = self._of(self._groups[0], weights, cache, *lora)
        layer_arguments = (x, pages, own, rope, inputs.paged, *of_lora)
        programs = {parts.begin: begin}
        for part, keeps in ((layers, False), (last, rows_only)):
            programs[part] = Program(
                partial(self._layers, rows_only=keeps),
                layer_arguments,
                # What comes out of the last layer may be smaller than what goes in.
                (1,) if keeps else (0, 1),
                (spec(()), specs_of(pages)),
            )
        if rows_only:
            x = x.update(shape=(len(inputs.table_rows), *x.shape[1:]))
        programs[parts.end] = Program(
            partial(_end, self._setup),
            (weights, table, x, inputs, *extras),
            (1,),
            (spec(()), spec(()), logits_spec, spec(())),
        )
        return programs

    def executables(self, compiled: Mapping[str, Any]) -> dict[str, Any]:
        """What runs the forward passes whose programs were made, by their names."""
        return {
            name: partial(self._run, _Parts(*(compiled[part] for part in parts)))
            for name, parts in self._names.items()
        }

    def _run(
        self,
        parts: _Parts,
        weights: tuple[jax.Array, ...],
        cache: list[jax.Array],
        table: jax.Array,
        inputs: ForwardInputs,
        *lora: Any,
    ) -> tuple[Any, ...]:
        extras = lora[2:]
        x, rope = parts.begin(weights, table, inputs, *extras)
        new_cache: list[jax.Array] = []
        for group in self._groups:
            run = parts.last if group is self._groups[-1] else parts.layers
            pages, own, *of_lora = self._of(group, weights, cache, *lora)
            x, pages = run(x, pages, own, rope, inputs.paged, *of_lora)
            new_cache += pages
        tokens, table, logits, hidden = parts.end(weights, table, x, inputs, *extras)
        return tokens, table, new_cache, logits, hidden

    def _of(
        self,
        group: slice,
        weights: tuple[Any, ...],
        cache: list[Any],
        bank: list[Bank] | None = None,
        batches: LoraBatches | None = None,
        extras: Extras | None = None,
        extras_at: ExtrasBatch | None = None,
    ) -> tuple[Any, ...]:
        """What some layers are told, from what a forward pass is: pages, weights, and of adapters
        if there are any."""
        own = [tuple(weights[at] for at in places) for places in self._weights_at[group]]
        if bank is None:
            return cache[group], own
        # What holds the slots of all layers, or nothing.
        lora = bank[0], batches, self._first_slots[group]
        if extras is None:
            return cache[group], own, *lora
        return cache[group], own, *lora, extras.layers[group], extras_at


def _begin(
    setup: ForwardSetup,
    weights: tuple[jax.Array, ...],
    table: Int32[Array, " rows"],
    inputs: ForwardInputs,
    *extras: Any,
) -> tuple[Float[Array, "T d"], RopeTables]:
    return setup.model(weights).begin(step_tokens(table, inputs), inputs.paged, extras or None)


def _layers(
    setup: ForwardSetup,
    graph: nnx.GraphDef[LlamaLayer],
    structure: Any,
    x: Float[Array, "T d"],
    cache: list[Pages],
    weights: list[tuple[jax.Array, ...]],
    rope: RopeTables,
    paged: PagedBatch,
    bank: Bank | None = None,
    batches: LoraBatches | None = None,
    first_slots: list[Int32[Array, " 1"]] | None = None,
    vectors: list[GroupVectors] | None = None,
    extras_at: ExtrasBatch | None = None,
    *,
    rows_only: bool,
) -> tuple[Float[Array, "N d"], list[Pages]]:
    new_cache = []
    for i, (own, pages) in enumerate(zip(weights, cache, strict=True)):
        lora, kept = None, None
        if setup.lora_matmul is not None and first_slots is not None:
            assert bank is not None
            assert batches is not None
            batch = dataclasses.replace(batches.tokens, first_slot=first_slots[i])
            own_vectors = vectors[i] if vectors else {}
            lora = layer_lora(setup.lora_matmul, bank, batch, own_vectors, extras_at)
        if rows_only and i == len(cache) - 1:
            kept = kept_rows(setup, paged, lora, batches, extras_at)
        state = jax.tree.unflatten(structure, own)
        x, written = run_layer(
            graph, state, x, rope, pages, paged, setup.attention, lora, kept=kept
        )
        new_cache.append(written)
    return x, new_cache


def _end(
    setup: ForwardSetup,
    weights: tuple[jax.Array, ...],
    table: Int32[Array, " rows"],
    x: Float[Array, "N d"],
    inputs: ForwardInputs,
    *extras: Any,
) -> tuple[Any, ...]:
    model = setup.model(weights)
    return end_step(setup, model, model.norm(x), table, inputs, extras or None)
