"""A PEFT folder, or tensors under PEFT's names, turned into an Adapter or refused by name.

The configuration is judged first, then the names, dtypes and shapes that the header gives, and
only then are tensors read: what is refused costs no memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxlora.adapters.adapter import Adapter, LoraPair, target_shape
from jaxlora.adapters.folder import WEIGHTS_FILE, AdapterFolder
from jaxlora.adapters.peft_config import PeftConfig, Placement
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterRefusedError

_Array = np.ndarray[Any, np.dtype[Any]]

_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_NAMES: Final = 5

# The linears of a layer by Hugging Face's names. A fused linear's targets share its A; its B is
# their B's, one below the other.
_LINEARS: Final[Mapping[str, tuple[str, ...]]] = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
    "self_attn.qkv_proj": ("q", "k", "v"),
    "mlp.gate_up_proj": ("gate", "up"),
}

# PEFT drops its own name for the adapter ("default") when it saves; a state dict still has it.
_TENSOR: Final = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?P<module>model\.layers\.(?P<layer>0|[1-9][0-9]{0,4})\."
    rf"(?P<linear>{'|'.join(map(re.escape, _LINEARS))}))"
    r"\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight"
)

# Tensors that are not one half of a LoRA on those linears: the first row to match says why not.
_REFUSED_TENSORS: Final = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"lora_magnitude_vector", "jaxlora does not yet support DoRA"),
        (r"lora_B\.([^.]+\.)?bias$", "lora_bias is not supported yet"),
        (r"lora_embedding_[AB]|embed_tokens\.lora_", "LoRA on embed_tokens is not supported yet"),
        (r"lm_head\.lora_", "LoRA on lm_head is not supported yet"),
        (r"trainable_tokens|token_adapter", "trainable_token_indices is not supported yet"),
        (r"(embed_tokens|lm_head)\.", "modules_to_save is not supported yet"),
        (r"\.bias$", "Adapter bias is not supported."),
        (r"", "nothing in the model has this name"),
    )
)
_VOCABULARY_MATRIX: Final = re.compile(r"(embed_tokens|lm_head)\.(?!lora_)([^.]+\.)*weight$")


def load_adapter(
    name: str,
    path: str | os.PathLike[str],
    model: ModelConfig,
    *,
    max_rank: int,
    target_modules: Collection[str] | None = None,
) -> Adapter:
    """Reads the PEFT folder at ``path``: adapter_config.json and adapter_model.safetensors.

    ``max_rank`` and ``target_modules`` (short names as in TARGETS; None is all) are the engine's
    limits. Raises AdapterNotFoundError if there is no adapter, and AdapterRefusedError if there
    is one that cannot be served as PEFT would serve it, or whose files are damaged or not its own.
    """
    folder = AdapterFolder(Path(path))
    config, weights_file, num_tokens = folder.config(), folder.weights_file(), folder.num_tokens()
    if num_tokens > model.vocab_size:
        raise AdapterRefusedError(
            f"The adapter changes the vocabulary: its tokenizer needs {num_tokens} tokens, the "
            f"model has {model.vocab_size}."
        )
    try:
        # pread, not mmap: a file that shrinks while it is read is an error, not a SIGBUS.
        with safe_open(weights_file, framework="np", backend="pread") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            headers = {
                key: _Header(
                    tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype())
                )
                for key, part in parts.items()
            }
            return _build(name, headers, file.get_tensor, config, model, max_rank, target_modules)
    except (SafetensorError, OSError) as error:
        raise AdapterRefusedError(f"{WEIGHTS_FILE} is truncated or damaged: {error}") from error


def adapter_from_tensors(
    name: str,
    tensors: Mapping[str, _Array | jax.Array],
    config: Mapping[str, Any],
    model: ModelConfig,
    *,
    max_rank: int,
    target_modules: Collection[str] | None = None,
) -> Adapter:
    """Makes an adapter of arrays in memory, which are copied.

    ``tensors`` has PEFT's names, with or without ``base_model.model.`` and the adapter's own name
    (``lora_A.default.weight``): ``lora_A`` of shape ``[r, d_in]``, ``lora_B`` of shape
    ``[d_out, r]``. ``config`` is what adapter_config.json would hold; a missing key has PEFT's
    default. Raises AdapterRefusedError as load_adapter does.
    """
    headers = {
        key: _Header(tuple(map(int, array.shape)), _dtype_name(array.dtype))
        for key, array in tensors.items()
    }

    def read(key: str) -> _Array:
        return np.array(tensors[key], order="C")

    return _build(name, headers, read, config, model, max_rank, target_modules)


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isnative else dtype.str


@dataclasses.dataclass(frozen=True)
class _Header:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass
class _Module:
    """One linear with LoRA, as the names of its tensors tell."""

    layer: int
    linear: str
    tensors: dict[str, str] = dataclasses.field(default_factory=dict)
    """Names of its tensors by side, "A" or "B"."""

    @property
    def targets(self) -> tuple[str, ...]:
        return _LINEARS[self.linear]


def _build(
    name: str,
    headers: Mapping[str, _Header],
    read: Callable[[str], _Array],
    config: Mapping[str, Any],
    model: ModelConfig,
    max_rank: int,
    target_modules: Collection[str] | None,
) -> Adapter:
    peft_config = PeftConfig.from_dict(config)
    modules = _find_modules(headers, model)
    placements = peft_config.place(modules)
    _check_placements(placements)
    _check_targets(modules, target_modules)
    _check_headers(headers, modules, placements, model)
    rank = max(placement.rank for placement in placements.values())
    if rank > max_rank:
        raise AdapterRefusedError(f"LoRA rank {rank} is greater than max_lora_rank {max_rank}.")
    arrays = {key: read(key) for key in headers}
    not_finite = [key for key, array in arrays.items() if not np.isfinite(array).all()]
    _refuse_if("The adapter's weights contain NaN or Inf", not_finite)
    pairs: dict[tuple[int, str], LoraPair] = {}
    for path, module in modules.items():
        a, b = (arrays[module.tensors[side]] for side in "AB")
        a.flags.writeable = b.flags.writeable = False
        ends = itertools.accumulate(target_shape(model, target)[1] for target in module.targets)
        for target, part in zip(module.targets, np.split(b, list(ends)[:-1]), strict=True):
            pairs[module.layer, target] = LoraPair(a=a, b=part, scale=placements[path].scale)
    return Adapter.of(name, pairs)


def _find_modules(headers: Mapping[str, _Header], model: ModelConfig) -> dict[str, _Module]:
    """The modules by path. Every tensor must be half of one module, and every half have another."""
    modules: dict[str, _Module] = {}
    unmatched: list[str] = []
    doubled: list[str] = []
    owners: dict[tuple[int, str], str] = {}
    for key in headers:
        match = _TENSOR.fullmatch(key)
        if match is None or int(match["layer"]) >= model.num_layers:
            unmatched.append(key)
            continue
        path, side = match["module"], match["side"]
        module = modules.setdefault(path, _Module(int(match["layer"]), match["linear"]))
        # q_proj and qkv_proj of one layer would both change q.
        is_shared = any(owners.setdefault((module.layer, t), path) != path for t in module.targets)
        if is_shared or side in module.tensors:
            doubled.append(key)
        module.tensors[side] = key
    _refuse_unmatched(unmatched, headers, model)
    _refuse_if("The adapter has several tensors for the same weights", doubled)
    halves = [next(iter(m.tensors.values())) for m in modules.values() if len(m.tensors) == 1]
    _refuse_if("The adapter has lora_A without lora_B, or lora_B without lora_A", halves)
    if not modules:
        raise AdapterRefusedError("The adapter has no tensors.")
    return modules


def _refuse_unmatched(
    unmatched: Collection[str], headers: Mapping[str, _Header], model: ModelConfig
) -> None:
    _refuse_if(
        f"The adapter changes the vocabulary, which has {model.vocab_size} tokens in the model",
        (
            f"{key} has shape {list(headers[key].shape)}"
            for key in unmatched
            if _VOCABULARY_MATRIX.search(key) and headers[key].shape[:1] != (model.vocab_size,)
        ),
    )
    for pattern, reason in _REFUSED_TENSORS:
        keys = [key for key in unmatched if pattern.search(key)]
        _refuse_if(f"{len(keys)} of the adapter's {len(headers)} tensors: {reason}", keys)


def _check_placements(placements: Mapping[str, Placement]) -> None:
    for option in sorted({p.left_out_by for p in placements.values() if p.left_out_by}):
        left_out = [path for path, p in placements.items() if p.left_out_by == option]
        _refuse_if(
            f"The adapter has tensors that PEFT would ignore, because its {option} leaves their "
            "modules out",
            left_out,
        )


def _check_targets(modules: Mapping[str, _Module], target_modules: Collection[str] | None) -> None:
    if target_modules is None:
        return
    disabled = {
        module.linear.rpartition(".")[2]
        for module in modules.values()
        if not set(module.targets) <= set(target_modules)
    }
    _refuse_if(
        f"The adapter targets modules that the engine's lora_target_modules "
        f"({', '.join(target_modules)}) leaves out",
        sorted(disabled),
    )


def _check_headers(
    headers: Mapping[str, _Header],
    modules: Mapping[str, _Module],
    placements: Mapping[str, Placement],
    model: ModelConfig,
) -> None:
    _refuse_if(
        f"The adapter's tensors must be one of {', '.join(_DTYPES.values())}",
        (f"{key} is {h.dtype}" for key, h in headers.items() if h.dtype not in _DTYPES.values()),
    )

    def misfits() -> Iterator[str]:
        for path, module in modules.items():
            rank = placements[path].rank
            shapes = [target_shape(model, target) for target in module.targets]
            expected = {"A": (rank, shapes[0][0]), "B": (sum(d_out for _, d_out in shapes), rank)}
            for side, key in module.tensors.items():
                if headers[key].shape != expected[side]:
                    found = list(headers[key].shape)
                    yield f"{key} has shape {found}, expected {list(expected[side])}"

    _refuse_if(
        "The adapter does not fit the model's widths and its own ranks (r, rank_pattern)",
        misfits(),
    )


def _refuse_if(reason: str, names: Iterable[str]) -> None:
    """Raises with up to five of the names, if there are any."""
    found = list(names)
    if found:
        more = f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else ""
        raise AdapterRefusedError(f"{reason}: {', '.join(found[:_MAX_NAMES])}{more}")
