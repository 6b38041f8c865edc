"""A PEFT folder, or tensors under PEFT's names, turned into an Adapter or refused by name.

The configuration is judged first, then the names, dtypes and shapes that the header gives
(:mod:`.peft_layout`), and only then are tensors read: what is refused costs no memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError

from jaxlora.adapters.adapter import NO_LAYER, VOCABULARY_TARGETS, Adapter
from jaxlora.adapters.content import largest, largest_of
from jaxlora.adapters.folder import WEIGHTS_FILE, AdapterFolder, cannot_be_read
from jaxlora.adapters.host_blocks import Allocate, ordinary_memory
from jaxlora.adapters.peft_layout import Layout, Limits, layout_of
from jaxlora.adapters.peft_tensors import refuse_if
from jaxlora.adapters.placed_pairs import PlacedPairs
from jaxlora.adapters.tensors import TensorFile, Tensors, TensorsInMemory, TensorSource
from jaxlora.checks import abridged, shown
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterRefusedError

TokenOf = Callable[[int], str | None]
"""What the model's tokenizer calls a token, None if it has none of the id."""
IsBaseCopy = Callable[[str, np.ndarray], bool]
"""Whether an array equals the base's matrix of a target, "embed" or "lm_head", in its dtype."""


def load_adapter(
    name: str,
    path: str | os.PathLike[str],
    model: ModelConfig,
    limits: Limits,
    *,
    is_base_copy: IsBaseCopy | None = None,
    token_of: TokenOf | None = None,
    max_bytes: int | None = None,
    allocate: Allocate = ordinary_memory,
) -> Adapter:
    """Reads the PEFT folder at ``path``: adapter_config.json and adapter_model.safetensors.

    ``is_base_copy`` judges copies of the base's matrices, which PEFT saves beside LoRA on them;
    without it they are refused. ``token_of`` tells of the tokenizer that prompts will be read by,
    if there is one. ``max_bytes`` is the most the file of weights may have, and ``allocate`` gives
    the memory that the adapter lies in. Raises AdapterNotFoundError if there is no adapter, and
    AdapterRefusedError if there is one that cannot be served as PEFT would serve it, or whose files
    are damaged or not its own.
    """
    folder = AdapterFolder(Path(path))
    config, weights_file = folder.config(), folder.weights_file(max_bytes)
    _check_tokens(folder, model, token_of)
    try:
        source = TensorFile(weights_file)
        return _build(name, source, config, model, limits, is_base_copy, allocate)
    except SafetensorError as error:
        reason = shown(str(error))  # It may quote what the header has.
        raise AdapterRefusedError(f"{WEIGHTS_FILE} is truncated or damaged: {reason}") from error
    except OSError as error:
        raise cannot_be_read(WEIGHTS_FILE, error) from error


def _check_tokens(folder: AdapterFolder, model: ModelConfig, token_of: TokenOf | None) -> None:
    """Raises AdapterRefusedError if texts would become other tokens than they were in training."""
    added = folder.added_tokens()
    num_tokens = max(added, default=-1) + 1
    if num_tokens > model.vocab_size:
        raise AdapterRefusedError(
            f"The adapter changes the vocabulary: its tokenizer needs {num_tokens} tokens, the "
            f"model has {model.vocab_size}."
        )
    if token_of is None:
        return
    # Many tables have room for tokens that the model's tokenizer does not know.
    named = {i: text for i, text in added.items() if text is not None and i >= 0}
    others = {i: text for i, text in named.items() if token_of(i) != text}
    if others:
        # This one is in no text.
        pad_token = folder.pad_token()
        others = {i: text for i, text in others.items() if text != pad_token}
    refuse_if(
        "The adapter's tokenizer has tokens that the engine's has not, so that texts would not be "
        "read as they were in training; start the engine with the adapter's (tokenizer), or take "
        "its files out of the adapter's folder",
        (f"{i} {text}" for i, text in sorted(others.items())),
    )


def adapter_from_tensors(
    name: str,
    tensors: Mapping[str, np.ndarray | jax.Array],
    config: Mapping[str, Any],
    model: ModelConfig,
    limits: Limits,
    *,
    is_base_copy: IsBaseCopy | None = None,
    allocate: Allocate = ordinary_memory,
) -> Adapter:
    """Makes an adapter of arrays in memory, which are copied.

    ``tensors`` has PEFT's names, with or without ``base_model.model.`` and the adapter's own name
    (``lora_A.default.weight``): ``lora_A`` of shape ``[r, d_in]``, ``lora_B`` of shape
    ``[d_out, r]``. ``config`` is what adapter_config.json would hold; a missing key has PEFT's
    default. The rest, and what is raised, is as for load_adapter.
    """
    source = TensorsInMemory(tensors)
    return _build(name, source, config, model, limits, is_base_copy, allocate)


def _build(
    name: str,
    source: TensorSource,
    config: Mapping[str, Any],
    model: ModelConfig,
    limits: Limits,
    is_base_copy: IsBaseCopy | None,
    allocate: Allocate,
) -> Adapter:
    limits = dataclasses.replace(limits, compares_copies=is_base_copy is not None)
    layout = layout_of(source.headers, config, model, limits)
    if is_base_copy is not None:
        _check_copies(layout, source, is_base_copy)
    tensors, magnitudes = source.read(layout.names, largest, allocate)
    _check_numbers(layout, tensors, magnitudes, limits.dtype)
    matrices = {target: tensors[name] for target, name in layout.matrices.items()}
    if layout.is_tied and matrices and not np.array_equal(matrices["embed"], matrices["lm_head"]):
        raise AdapterRefusedError(
            "ensure_weight_tying=True, but the adapter's embed_tokens and lm_head differ."
        )
    pairs = PlacedPairs(layout, tensors)
    if layout.is_tied and (NO_LAYER, "embed") in pairs:
        embedding, head = (pairs[NO_LAYER, target] for target in VOCABULARY_TARGETS)
        if not (np.array_equal(embedding.a, head.b.T) and np.array_equal(embedding.b, head.a.T)):
            raise AdapterRefusedError(
                "ensure_weight_tying=True, but lm_head's lora_A and lora_B are not the transposed "
                "lora_embedding_B and lora_embedding_A."
            )
    # What a tied head shares with its embedding stays one array.
    rows = {name: (ids, tensors[name]) for ids, name in layout.rows.values()}
    if model.tie_word_embeddings and len(rows) > 1:
        (ids, embedding_rows), (_, head_rows) = rows.values()
        if not np.array_equal(embedding_rows, head_rows):
            raise AdapterRefusedError(
                f"trainable_token_indices={abridged(list(ids))}, but the adapter's rows of "
                "embed_tokens and of lm_head, which are one matrix in this model, differ."
            )
        rows = dict.fromkeys(rows, (ids, embedding_rows))
    replaced = {target: rows[name] for target, (_, name) in layout.rows.items()}
    return Adapter.of(
        name,
        pairs,
        matrices,
        replaced,
        config=MappingProxyType(dict(config)),
        blocks=tensors.blocks,
        description=layout.description,
        traits=layout.traits,
        alike=layout,
    )


def _check_numbers(layout: Layout, tensors: Tensors, magnitudes: list[float], dtype: str) -> None:
    """Everything is finite, and stays so in a slot, where B is scaled; ``magnitudes`` are the
    largest of the pieces. (Not so, an adapter's matrices may spoil its neighbours' products with
    zero.)"""
    if not all(map(math.isfinite, magnitudes)):
        bad = sorted(name for name in layout.names if not math.isfinite(largest(tensors[name])))
        refuse_if("The adapter's weights contain NaN or Inf", bad)
    most, limit = max(magnitudes), largest_of(dtype)
    if most * max(1.0, layout.largest_scale) > limit:
        reach = {
            module.tensors[side]: factor * largest(tensors[module.tensors[side]])
            for module in layout.modules
            for side, factor in (("a", 1.0), ("b", abs(module.scale)))
        }
        refuse_if(
            "A, or B times the adapter's scale (of lora_alpha and rank), is beyond "
            f"{dtype}, which ends at {limit:.3g}",
            (f"{name} reaches {value:.3g}" for name, value in reach.items() if value > limit),
        )


def _check_copies(layout: Layout, source: TensorSource, is_base_copy: IsBaseCopy) -> None:
    # One at a time: they are large, and none is kept.
    refuse_if(
        "The adapter brings another matrix than the base's",
        (
            key
            for key, target in layout.copies.items()
            if not is_base_copy(target, _read_one(source, key))
        ),
    )


def _read_one(source: TensorSource, name: str) -> np.ndarray:
    tensors, _ = source.read(frozenset([name]), lambda piece: None)
    return tensors[name]
