"""A PEFT folder, or tensors under PEFT's names, turned into an Adapter or refused by name.

The configuration is judged first, then the names, dtypes and shapes that the header gives, and
only then are tensors read: what is refused costs no memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlora.adapters.adapter import (
    NO_LAYER,
    VOCABULARY_TARGETS,
    Adapter,
    LoraPair,
    target_shape,
)
from jaxlora.adapters.folder import WEIGHTS_FILE, AdapterFolder
from jaxlora.adapters.peft_config import PeftConfig, Placement
from jaxlora.adapters.peft_tensors import (
    DTYPES,
    EMBEDDING,
    HEAD,
    Header,
    Module,
    find_modules,
    refuse_if,
)
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterRefusedError

_Array = np.ndarray[Any, np.dtype[Any]]
IsBaseCopy = Callable[[str, _Array], bool]
"""Whether an array equals the base's matrix of a target, "embed" or "lm_head", in its dtype."""

# What an adapter must not have unless the engine was started for it: as in its files, and as in
# EngineArgs.lora_extras.
_EXTRAS: Final = {
    "embed_tokens": "LoRA on embed_tokens",
    "lm_head": "LoRA on lm_head",
    "dora": "DoRA (use_dora)",
    "bias": "a bias on B (lora_bias)",
    "saved_embed_tokens": "embeddings of its own (modules_to_save, trainable_token_indices)",
    "saved_lm_head": "an output head of its own (modules_to_save, trainable_token_indices)",
}


def load_adapter(
    name: str,
    path: str | os.PathLike[str],
    model: ModelConfig,
    *,
    max_rank: int,
    target_modules: Collection[str] | None = None,
    extras: Collection[str] | None = None,
    is_base_copy: IsBaseCopy | None = None,
    max_bytes: int | None = None,
) -> Adapter:
    """Reads the PEFT folder at ``path``: adapter_config.json and adapter_model.safetensors.

    ``max_rank``, ``target_modules`` (short names as in TARGETS) and ``extras`` (as in
    EngineArgs.lora_extras) are the engine's limits; None is all. ``is_base_copy`` judges copies of
    the base's matrices, which PEFT saves beside LoRA on them; without it they are refused.
    ``max_bytes`` is the most the file of weights may have. Raises
    AdapterNotFoundError if there is no adapter, and AdapterRefusedError if there is one that
    cannot be served as PEFT would serve it, or whose files are damaged or not its own.
    """
    folder = AdapterFolder(Path(path))
    config, weights_file = folder.config(), folder.weights_file(max_bytes)
    num_tokens = folder.num_tokens()
    if num_tokens > model.vocab_size:
        raise AdapterRefusedError(
            f"The adapter changes the vocabulary: its tokenizer needs {num_tokens} tokens, the "
            f"model has {model.vocab_size}."
        )
    limits = _Limits(max_rank, target_modules, extras, is_base_copy)
    try:
        # pread, not mmap: a file that shrinks while it is read is an error, not a SIGBUS.
        with safe_open(weights_file, framework="np", backend="pread") as file:
            return _build(name, read_headers(file), file.get_tensor, config, model, limits)
    except (SafetensorError, OSError) as error:
        raise AdapterRefusedError(f"{WEIGHTS_FILE} is truncated or damaged: {error}") from error


def read_headers(file: Any) -> dict[str, Header]:
    """Shapes and dtypes of the tensors in a safetensors file that is open."""
    parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    return {
        key: Header(tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
        for key, part in parts.items()
    }


def adapter_from_tensors(
    name: str,
    tensors: Mapping[str, _Array | jax.Array],
    config: Mapping[str, Any],
    model: ModelConfig,
    *,
    max_rank: int,
    target_modules: Collection[str] | None = None,
    extras: Collection[str] | None = None,
    is_base_copy: IsBaseCopy | None = None,
) -> Adapter:
    """Makes an adapter of arrays in memory, which are copied.

    ``tensors`` has PEFT's names, with or without ``base_model.model.`` and the adapter's own name
    (``lora_A.default.weight``): ``lora_A`` of shape ``[r, d_in]``, ``lora_B`` of shape
    ``[d_out, r]``. ``config`` is what adapter_config.json would hold; a missing key has PEFT's
    default. The limits, and what is raised, are those of load_adapter.
    """
    headers = {
        key: Header(tuple(map(int, array.shape)), _dtype_name(array.dtype))
        for key, array in tensors.items()
    }

    def read(key: str) -> _Array:
        return np.array(tensors[key], order="C")

    limits = _Limits(max_rank, target_modules, extras, is_base_copy)
    return _build(name, headers, read, config, model, limits)


@dataclasses.dataclass(frozen=True)
class _Limits:
    max_rank: int
    target_modules: Collection[str] | None
    extras: Collection[str] | None
    is_base_copy: IsBaseCopy | None


def _is_finite(array: _Array) -> bool:
    exponents = {"bfloat16": 0x7F80, "float16": 0x7C00}.get(array.dtype.name)
    if exponents is None:
        return bool(np.isfinite(array).all())
    # A third of the time, which 84 MB notice.
    bits = array.view(np.uint16)
    return bool(((bits & exponents) != exponents).all())


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isnative else dtype.str


def _build(
    name: str,
    headers: Mapping[str, Header],
    read: Callable[[str], _Array],
    config: Mapping[str, Any],
    model: ModelConfig,
    limits: _Limits,
) -> Adapter:
    peft_config = PeftConfig.from_dict(config)
    found = find_modules(headers, model)
    modules = {path: module for path, module in found.items() if "a" in module.tensors}
    if not modules:
        raise AdapterRefusedError("The adapter has no LoRA tensors.")
    placements = peft_config.place(modules)
    is_tied = peft_config.ensure_weight_tying and model.tie_word_embeddings
    saved = set(peft_config.modules_to_save)
    if is_tied:
        _check_tie(modules, placements)
        saved |= {EMBEDDING, HEAD} if saved else set()
    _check_saved(saved, found)
    tokens = _placed_tokens(peft_config, found, saved, model)
    _check_placements(placements)
    _check_targets(modules, limits.target_modules)
    shared = {HEAD} if tokens and model.tie_word_embeddings else set()
    _check_kind(modules, {*saved, *tokens, *shared}, peft_config, limits.extras)
    _check_headers(headers, found, placements, tokens, model)
    rank = max(placement.rank for placement in placements.values())
    if rank > limits.max_rank:
        raise AdapterRefusedError(
            f"LoRA rank {rank} is greater than max_lora_rank {limits.max_rank}."
        )
    _check_copies(found, saved, read, limits.is_base_copy)
    arrays = {
        key: read(key)
        for module in modules.values()
        for side, key in module.tensors.items()
        if side not in ("base", "whole", "rows")
    }
    matrices = {
        found[path].targets[0]: read(found[path].tensors["whole"]) for path in sorted(saved)
    }
    not_finite = [key for key, array in arrays.items() if not _is_finite(array)]
    values = {
        path: read(module.tensors["rows"])
        for path, module in found.items()
        if "rows" in module.tensors
    }
    for path, array in itertools.chain(matrices.items(), values.items()):
        array.flags.writeable = False
        not_finite += [] if _is_finite(array) else [path]
    refuse_if("The adapter's weights contain NaN or Inf", not_finite)
    if is_tied and matrices and not np.array_equal(matrices["embed"], matrices["lm_head"]):
        raise AdapterRefusedError(
            "ensure_weight_tying=True, but the adapter's embed_tokens and lm_head differ."
        )
    pairs: dict[tuple[int, str], LoraPair] = {}
    for path, module in modules.items():
        own = {side: arrays[key] for side, key in module.tensors.items() if key in arrays}
        for array in own.values():
            array.flags.writeable = False
        a = own.pop("a")
        ends = itertools.accumulate(target_shape(model, target)[1] for target in module.targets)
        cuts = list(ends)[:-1]
        parts = {side: np.split(array, cuts) for side, array in own.items()}
        for i, target in enumerate(module.targets):
            outputs = {side: split[i] for side, split in parts.items()}
            scale = placements[path].scale
            pairs[module.layer, target] = LoraPair(a=a, scale=scale, **outputs)
    if is_tied and EMBEDDING in modules:
        embedding, head = (pairs[NO_LAYER, target] for target in VOCABULARY_TARGETS)
        if not (np.array_equal(embedding.a, head.b.T) and np.array_equal(embedding.b, head.a.T)):
            raise AdapterRefusedError(
                "ensure_weight_tying=True, but lm_head's lora_A and lora_B are not the transposed "
                "lora_embedding_B and lora_embedding_A."
            )
    replaced = {found[path].targets[0]: (tokens[path], array) for path, array in values.items()}
    if model.tie_word_embeddings and EMBEDDING in tokens:
        # Rows, unlike whole matrices, stay one for both.
        replaced["lm_head"] = replaced["embed"]
    return Adapter.of(name, pairs, matrices, replaced, MappingProxyType(dict(config)))


def _placed_tokens(
    config: PeftConfig, found: Mapping[str, Module], saved: Collection[str], model: ModelConfig
) -> Mapping[str, tuple[int, ...]]:
    """trainable_token_indices by module, if it and the tensors agree."""
    tokens = config.token_indices
    refuse_if(
        "trainable_token_indices and the adapter's trainable_tokens_delta do not agree on",
        sorted(tokens.keys() ^ {path for path, m in found.items() if "rows" in m.tensors}),
    )
    if model.tie_word_embeddings and len(tokens) > 1:
        raise AdapterRefusedError(
            "trainable_token_indices for embed_tokens and for lm_head, which are one matrix in "
            "this model, are not served: PEFT shares them or not, depending on the ids."
        )
    too_large = [str(i) for ids in tokens.values() for i in ids if i >= model.vocab_size]
    refuse_if(f"trainable_token_indices beyond the vocabulary of {model.vocab_size}", too_large)
    touched = {*tokens, HEAD} if model.tie_word_embeddings and tokens else set(tokens)
    refuse_if(
        "The adapter has trainable_token_indices together with LoRA or modules_to_save on",
        sorted(p for p in touched if p in saved or (p in found and "a" in found[p].tensors)),
    )
    return tokens


def _check_saved(saved: Collection[str], found: Mapping[str, Module]) -> None:
    missing = [path for path in saved if path not in found or "whole" not in found[path].tensors]
    refuse_if("modules_to_save names modules for which the adapter has no tensor", missing)
    both = [path for path in saved if "a" in found[path].tensors]
    refuse_if("The adapter has both LoRA and modules_to_save on", both)


def _check_tie(modules: Collection[str], placements: dict[str, Placement]) -> None:
    """PEFT gives one LoRA to embedding and head, and names only the embedding as a target."""
    missing = {EMBEDDING, HEAD} - set(modules)
    if len(missing) == 1:
        raise AdapterRefusedError(
            "ensure_weight_tying=True shares LoRA between embed_tokens and lm_head, but the "
            f"adapter has no tensors for {missing.pop()}."
        )
    if HEAD in placements:
        placements[HEAD] = dataclasses.replace(placements[HEAD], left_out_by=None)


def _check_placements(placements: Mapping[str, Placement]) -> None:
    for option in sorted({p.left_out_by for p in placements.values() if p.left_out_by}):
        left_out = [path for path, p in placements.items() if p.left_out_by == option]
        refuse_if(
            f"The adapter has tensors that PEFT would ignore, because its {option} leaves their "
            "modules out",
            left_out,
        )


def _check_targets(modules: Mapping[str, Module], target_modules: Collection[str] | None) -> None:
    if target_modules is None:
        return
    disabled = {
        path.rpartition(".")[2]
        for path, module in modules.items()
        if module.layer != NO_LAYER and not set(module.targets) <= set(target_modules)
    }
    refuse_if(
        f"The adapter targets modules that the engine's lora_target_modules "
        f"({', '.join(target_modules)}) leaves out",
        sorted(disabled),
    )


def _check_kind(
    modules: Mapping[str, Module],
    saved: Collection[str],
    config: PeftConfig,
    extras: Collection[str] | None,
) -> None:
    """The configuration's switches and the tensors agree, and the engine has what they need."""
    for option, is_on, side, tensor in (
        ("use_dora", config.use_dora, "magnitude", "lora_magnitude_vector"),
        ("lora_bias", config.lora_bias, "bias", "lora_B.bias"),
    ):
        odd = [path for path, module in modules.items() if (side in module.tensors) != is_on]
        have = "has no" if is_on else "has a"
        refuse_if(f"{option}={is_on}, but the adapter {have} {tensor} in", odd)
    needed = {"embed_tokens"} if EMBEDDING in modules else set()
    needed |= {"lm_head"} if HEAD in modules else set()
    needed |= {"dora"} if config.use_dora else set()
    needed |= {"bias"} if config.lora_bias else set()
    needed |= {f"saved_{path.rpartition('.')[2]}" for path in saved}
    missing = [extra for extra in _EXTRAS if extra in needed and extra not in (extras or ())]
    if extras is not None and missing:
        raise AdapterRefusedError(
            f"The adapter has {' and '.join(_EXTRAS[extra] for extra in missing)}, for which the "
            f"engine has no room: start it with lora_extras={sorted({*extras, *missing})}."
        )


def _check_headers(
    headers: Mapping[str, Header],
    modules: Mapping[str, Module],
    placements: Mapping[str, Placement],
    tokens: Mapping[str, tuple[int, ...]],
    model: ModelConfig,
) -> None:
    refuse_if(
        f"The adapter's tensors must be one of {', '.join(DTYPES.values())}",
        (f"{key} is {h.dtype}" for key, h in headers.items() if h.dtype not in DTYPES.values()),
    )

    def misfits() -> Iterator[str]:
        for path, module in modules.items():
            rank = placements[path].rank if path in placements else 0
            shapes = [target_shape(model, target) for target in module.targets]
            d_out = sum(width for _, width in shapes)
            expected = {
                "a": (rank, shapes[0][0]),
                "b": (d_out, rank),
                "bias": (d_out,),
                "magnitude": (d_out,),
                "base": (model.vocab_size, model.hidden_size),
                "whole": (model.vocab_size, model.hidden_size),
                "rows": (len(tokens.get(path, ())), model.hidden_size),
            }
            for side, key in module.tensors.items():
                if headers[key].shape != expected[side]:
                    found = list(headers[key].shape)
                    yield f"{key} has shape {found}, expected {list(expected[side])}"

    refuse_if(
        "The adapter does not fit the model's widths and its own ranks (r, rank_pattern)",
        misfits(),
    )


def _check_copies(
    modules: Mapping[str, Module],
    saved: Collection[str],
    read: Callable[[str], _Array],
    is_base_copy: IsBaseCopy | None,
) -> None:
    """PEFT writes these into the base model: without an effect only if they are its own."""
    copies = {
        key: module.targets[0]
        for path, module in modules.items()
        for side, key in module.tensors.items()
        if side == "base" or (side == "whole" and path not in saved)
    }
    if is_base_copy is None:
        refuse_if(
            "The adapter brings matrices of the base model, and an engine started without "
            "lora_extras does not compare them with its own",
            copies,
        )
        return
    refuse_if(
        "The adapter brings another matrix than the base's",
        (key for key, target in copies.items() if not is_base_copy(target, read(key))),
    )
