"""The names PEFT gives an adapter's tensors: each is found its module, or refused by name."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from jaxlora.adapters.adapter import NO_LAYER
from jaxlora.adapters.tensors import Header
from jaxlora.checks import shown, some
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterRefusedError

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
EMBEDDING: Final = "model.embed_tokens"
HEAD: Final = "lm_head"
_VOCABULARY: Final[Mapping[str, tuple[str, ...]]] = {EMBEDDING: ("embed",), HEAD: ("lm_head",)}


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


# PEFT drops its own name for the adapter ("default") when it saves; a state dict still has it.
_NAME: Final = r"(?:\.(?P<name>[^.]+))??"
_LINEAR_SIDES: Final = {
    "a": rf"lora_A{_NAME}\.weight",
    "b": rf"lora_B{_NAME}\.weight",
    "bias": rf"lora_B{_NAME}\.bias",
    "magnitude": rf"lora_magnitude_vector{_NAME}(?:\.weight)?",
}
# PEFT saves the base's own matrix beside LoRA on it, and where it was told to save embeddings also
# beside one that was trained, or rows of it. A whole matrix is one that was trained
# (modules_to_save), or the base's again where PEFT was told to save embeddings.
_HEAD_SIDES: Final = _LINEAR_SIDES | {
    "base": r"(?:token_adapter\.)?base_layer\.weight|original_module\.weight",
    "whole": rf"(?:modules_to_save{_NAME}\.)?weight",
    "rows": rf"token_adapter\.trainable_tokens_delta{_NAME}",
}
_EMBEDDING_SIDES: Final = _HEAD_SIDES | {
    "a": rf"lora_embedding_A{_NAME}",
    "b": rf"lora_embedding_B{_NAME}",
}
_SIDES: Final = {EMBEDDING: _EMBEDDING_SIDES, HEAD: _HEAD_SIDES}
_MODULE: Final = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?P<path>model\.layers\.(?P<layer>0|[1-9][0-9]{0,4})\."
    rf"(?P<linear>{_any_of(_LINEARS)})|{_any_of(_VOCABULARY)})\.(?P<rest>.+)"
)

# Tensors that are no part of LoRA on those modules: the first row to match says why not.
_REFUSED: Final = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"\.bias$", "Adapter bias is not supported."),
        (r"", "nothing in the model has this name"),
    )
)


@dataclasses.dataclass
class Module:
    """One module with LoRA, as the names of its tensors tell."""

    layer: int
    """NO_LAYER for the embedding and the output head."""
    targets: tuple[str, ...]
    tensors: dict[str, str] = dataclasses.field(default_factory=dict)
    """Names of its tensors: "a" and "b", and where it has them "bias", "magnitude", "base",
    "whole" and "rows"."""


def find_modules(headers: Mapping[str, Header], model: ModelConfig | None) -> dict[str, Module]:
    """The modules by path, ``model.layers.0.self_attn.q_proj``; any number of layers without a
    model.

    Raises AdapterRefusedError unless every tensor is part of one module, and every module has its
    A and its B, or nothing but a matrix.
    """
    modules: dict[str, Module] = {}
    unmatched: list[str] = []
    doubled: list[str] = []
    doubled_matrices: list[str] = []
    owners: dict[tuple[int, str], str] = {}
    names: set[str] = set()
    for key in headers:
        match = _MODULE.fullmatch(key)
        side, name = _side(match["path"], match["rest"]) if match else (None, None)
        if match is None or not side:
            unmatched.append(key)
            continue
        if model is not None and int(match["layer"] or 0) >= model.num_layers:
            unmatched.append(key)
            continue
        path = match["path"]
        layer = NO_LAYER if match["layer"] is None else int(match["layer"])
        targets = _VOCABULARY.get(path) or _LINEARS[match["linear"]]
        module = modules.setdefault(path, Module(layer, targets))
        # q_proj and qkv_proj of one layer would both change q.
        is_shared = any(owners.setdefault((layer, t), path) != path for t in targets)
        if is_shared or side in module.tensors:
            (doubled_matrices if side == "whole" else doubled).append(key)
        module.tensors[side] = key
        if name:
            names.add(name)
    _refuse_unmatched(unmatched, headers, model)
    if len(names) > 1:
        refuse_if("The tensors are of several adapters, give those of one", sorted(names))
    refuse_if("The adapter has several tensors for the same weights", doubled)
    refuse_if(
        "The adapter's modules_to_save are there twice; let PEFT save it with "
        "save_embedding_layers=False",
        doubled_matrices,
    )
    halves = [
        next(iter(module.tensors.values()))
        for module in modules.values()
        if not {"a", "b"} <= module.tensors.keys()
        and module.tensors.keys() - {"base", "whole", "rows"}
    ]
    refuse_if("The adapter has lora_A without lora_B, or lora_B without lora_A", halves)
    if not modules:
        raise AdapterRefusedError("The adapter has no tensors.")
    return modules


def refuse_if(reason: str, names: Iterable[str]) -> None:
    """Raises AdapterRefusedError with up to five of the names, if there are any."""
    found = list(map(shown, names))
    if found:
        raise AdapterRefusedError(f"{reason}: {some(found)}")


def _side(path: str, rest: str) -> tuple[str | None, str | None]:
    """Which of its module's tensors it is, and the adapter's name if it has it."""
    for side, pattern in _SIDES.get(path, _LINEAR_SIDES).items():
        match = re.fullmatch(pattern, rest)
        if match:
            return side, match.groupdict().get("name")
    return None, None


def _refuse_unmatched(
    unmatched: Collection[str], headers: Mapping[str, Header], model: ModelConfig | None
) -> None:
    if model is not None:
        size = model.vocab_size
        refuse_if(
            f"The adapter changes the vocabulary, which has {size} tokens in the model",
            (
                f"{key} has shape {list(header.shape)}"
                for key, header in headers.items()
                if header.shape[:1] != (size,) and _is_vocabulary_matrix(key)
            ),
        )
    for pattern, reason in _REFUSED:
        keys = [key for key in unmatched if pattern.search(key)]
        refuse_if(f"{len(keys)} of the adapter's {len(headers)} tensors: {reason}", keys)


def _is_vocabulary_matrix(name: str) -> bool:
    # No pattern: strangers' names have any length, and to search one takes its square.
    parts = name.split(".")
    pairs = itertools.pairwise(parts)
    is_of_one = any(p in ("embed_tokens", "lm_head") and q[:5] != "lora_" for p, q in pairs)
    return is_of_one and parts[-1] == "weight"
