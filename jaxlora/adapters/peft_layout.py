"""What an adapter's headers and configuration say it is, before any of its tensors are read.

Whatever can be refused by them is refused here, so that it costs no memory.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from jaxlora.adapters.adapter import NO_LAYER, Traits, in_order, target_shape
from jaxlora.adapters.peft_config import PeftConfig, Placement
from jaxlora.adapters.peft_tensors import EMBEDDING, HEAD, Module, find_modules, refuse_if
from jaxlora.adapters.tensors import DTYPES, MAX_KEPT_BYTES, Header, Headers, cached
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterRefusedError

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

_ANY: Final = -1
"""Size of what is not known."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine serves; None is all."""

    max_rank: int
    target_modules: tuple[str, ...] | None = None
    """Short names as in TARGETS."""
    extras: tuple[str, ...] | None = None
    """As in EngineArgs.lora_extras."""
    dtype: str = "float32"
    """In which adapters lie in their slots, B scaled."""
    compares_copies: bool = False
    """Whether matrices of the base's can be told to be copies: set by what loads adapters."""


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedModule:
    """One module with LoRA."""

    layer: int
    targets: tuple[str, ...]
    tensors: Mapping[str, str]
    """Names of its tensors by side: "a", "b", "bias", "magnitude"."""
    scale: float
    cuts: tuple[int, ...]
    """Rows of B at which each target but the first begins."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Every tensor's place in the adapter."""

    modules: tuple[PlacedModule, ...]
    matrices: Mapping[str, str]
    """Target -> name of a matrix to be used instead of the base's."""
    rows: Mapping[str, tuple[tuple[int, ...], str]]
    """Target -> token ids, and the name of the rows to be used instead of theirs."""
    copies: Mapping[str, str]
    """Name of a matrix -> the target whose base matrix it must be a copy of."""
    is_tied: bool
    """Whether embedding and head share what they have."""
    headers: Mapping[str, Header]

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The tensors that are the adapter's own."""
        modules = (name for module in self.modules for name in module.tensors.values())
        rows = (name for _, name in self.rows.values())
        return frozenset((*modules, *self.matrices.values(), *rows))

    @functools.cached_property
    def places(self) -> Mapping[tuple[int, str], tuple[PlacedModule, int]]:
        """By layer and target, in order, the module and which of its targets it is."""
        found = {
            (module.layer, target): (module, number)
            for module in self.modules
            for number, target in enumerate(module.targets)
        }
        return {key: found[key] for key in in_order(found)}

    @functools.cached_property
    def traits(self) -> Traits:
        """Those of the pairs."""
        sides = [side for module in self.modules for side in module.tensors]
        pairs = [(self.headers[m.tensors["a"]], self.headers[m.tensors["b"]]) for m in self.modules]
        return Traits(
            rank=max(a.shape[0] for a, _ in pairs),
            dtypes=frozenset(header.dtype for pair in pairs for header in pair),
            sides=frozenset(sides) - {"a", "b"},
            targets=frozenset(target for _, target in self.places),
        )

    @functools.cached_property
    def largest_scale(self) -> float:
        """Magnitude of the largest."""
        return max(abs(module.scale) for module in self.modules)

    @functools.cached_property
    def description(self) -> str:
        """What lies where, whatever its names: with the bytes themselves, all that an adapter
        is."""
        order = {name: i for i, name in enumerate(n for n in self.headers if n in self.names)}

        def told(name: str) -> str:
            return f"{order[name]} {self.headers[name].dtype} {self.headers[name].shape}"

        lines = [
            f"{module.layer} {module.targets} {module.scale!r} {side} {told(name)}"
            for module in self.modules
            for side, name in module.tensors.items()
        ]
        lines += [f"{target} {told(name)}" for target, name in self.matrices.items()]
        lines += [f"{target} {ids} {told(name)}" for target, (ids, name) in self.rows.items()]
        return "\n".join(sorted(lines))


@dataclasses.dataclass(frozen=True)
class _Question:
    config_text: str
    model: ModelConfig
    limits: Limits
    config: Mapping[str, Any] = dataclasses.field(compare=False)


def layout_of(
    headers: Headers, config: Mapping[str, Any], model: ModelConfig, limits: Limits
) -> Layout:
    """The layout of an adapter with those tensors and that adapter_config.json.

    Most adapters of an engine were saved alike, so answers are kept: working one out takes
    milliseconds of Python. Raises AdapterRefusedError for what cannot be served.
    """
    try:
        # In its own order: of several patterns that match a module the first counts.
        text = json.dumps(config)
    except (TypeError, ValueError, RecursionError):  # From memory it need not be JSON.
        return _judge(headers, config, model, limits)
    if len(text) > MAX_KEPT_BYTES:
        return _judge(headers, config, model, limits)
    return _answer(headers, _Question(text, model, limits, config))


@cached
def _answer(headers: Headers, question: _Question) -> Layout:
    return _judge(headers, question.config, question.model, question.limits)


def _judge(
    headers: Mapping[str, Header], config: Mapping[str, Any], model: ModelConfig, limits: Limits
) -> Layout:
    peft_config = PeftConfig.from_dict(config)
    found = find_modules(headers, model)
    check_dtypes(headers)
    modules = with_lora(found)
    placements = peft_config.place(modules)
    is_tied = peft_config.ensure_weight_tying and model.tie_word_embeddings
    saved = set(peft_config.modules_to_save)
    if is_tied:
        check_tie(modules, placements)
        saved |= {EMBEDDING, HEAD} if saved else set()
    _check_saved(saved, found)
    tokens = _placed_tokens(peft_config, found, saved, model)
    check_placements(placements)
    _check_targets(modules, limits.target_modules)
    shared = {HEAD} if tokens and model.tie_word_embeddings else set()
    check_switches(modules, peft_config)
    _check_extras(extras_of(modules, {*saved, *tokens, *shared}), limits.extras)
    check_headers(headers, found, placements, tokens, model)
    rank = max(placement.rank for placement in placements.values())
    if rank > limits.max_rank:
        raise AdapterRefusedError(
            f"LoRA rank {rank} is greater than max_lora_rank {limits.max_rank}."
        )
    rows = {
        module.targets[0]: (tokens[path], module.tensors["rows"])
        for path, module in found.items()
        if "rows" in module.tensors
    }
    if model.tie_word_embeddings and EMBEDDING in tokens:
        # Rows, unlike whole matrices, stay one for both.
        rows.setdefault("lm_head", rows["embed"])
    return Layout(
        modules=tuple(_placed(module, placements[path], model) for path, module in modules.items()),
        matrices={found[path].targets[0]: found[path].tensors["whole"] for path in sorted(saved)},
        rows=rows,
        copies=_copies(found, saved, limits),
        is_tied=is_tied,
        headers=headers,
    )


def _placed(module: Module, placement: Placement, model: ModelConfig) -> PlacedModule:
    ends = itertools.accumulate(target_shape(model, target)[1] for target in module.targets)
    sides = ("a", "b", "bias", "magnitude")
    return PlacedModule(
        layer=module.layer,
        targets=module.targets,
        tensors={side: key for side, key in module.tensors.items() if side in sides},
        scale=placement.scale,
        cuts=tuple(ends)[:-1],
    )


def _copies(
    modules: Mapping[str, Module], saved: Collection[str], limits: Limits
) -> dict[str, str]:
    """PEFT writes these into the base model: without an effect only if they are its own."""
    copies = {
        key: module.targets[0]
        for path, module in modules.items()
        for side, key in module.tensors.items()
        if side == "base" or (side == "whole" and path not in saved)
    }
    if not limits.compares_copies:
        refuse_if(
            "The adapter brings matrices of the base model, and an engine started without "
            "lora_extras does not compare them with its own",
            copies,
        )
    return copies


def _placed_tokens(
    config: PeftConfig, found: Mapping[str, Module], saved: Collection[str], model: ModelConfig
) -> Mapping[str, tuple[int, ...]]:
    """trainable_token_indices by module, if it and the tensors agree."""
    tokens = config.token_indices
    if model.tie_word_embeddings and len(tokens) > 1:
        raise AdapterRefusedError(
            "trainable_token_indices for embed_tokens and for lm_head, which are one matrix in "
            "this model, are not served: PEFT shares them or not, depending on the ids."
        )
    with_rows = {path for path, module in found.items() if "rows" in module.tensors}
    if model.tie_word_embeddings and EMBEDDING in tokens and HEAD in with_rows:
        # There twice in a live model's state, and where PEFT was told to save embeddings.
        tokens = {**tokens, HEAD: tokens[EMBEDDING]}
    refuse_if(
        "trainable_token_indices and the adapter's trainable_tokens_delta do not agree on",
        sorted(tokens.keys() ^ with_rows),
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


def check_tie(modules: Collection[str], placements: dict[str, Placement]) -> None:
    """PEFT gives one LoRA to a tied model's embedding and head, and names only the embedding as a
    target: the head is placed likewise. Raises AdapterRefusedError if one of them has none."""
    missing = {EMBEDDING, HEAD} - set(modules)
    if len(missing) == 1:
        raise AdapterRefusedError(
            "ensure_weight_tying=True shares LoRA between embed_tokens and lm_head, but the "
            f"adapter has no tensors for {missing.pop()}."
        )
    if HEAD in placements:
        # Its scale is that of its own rank all the same.
        rank = placements[EMBEDDING].rank
        placements[HEAD] = dataclasses.replace(placements[HEAD], rank=rank, left_out_by=None)


def with_lora(found: Mapping[str, Module]) -> dict[str, Module]:
    """The modules that have LoRA. Raises AdapterRefusedError if none has."""
    modules = {path: module for path, module in found.items() if "a" in module.tensors}
    if not modules:
        raise AdapterRefusedError("The adapter has no LoRA tensors.")
    return modules


def check_placements(placements: Mapping[str, Placement]) -> None:
    """Raises AdapterRefusedError for modules that the configuration leaves out."""
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
        _last(path)
        for path, module in modules.items()
        if module.layer != NO_LAYER and not set(module.targets) <= set(target_modules)
    }
    refuse_if(
        f"The adapter targets modules that the engine's lora_target_modules "
        f"({', '.join(target_modules)}) leaves out",
        sorted(disabled),
    )


def check_switches(modules: Mapping[str, Module], config: PeftConfig) -> None:
    """Raises AdapterRefusedError unless the configuration's switches and the tensors agree."""
    for option, is_on, side, tensor in (
        ("use_dora", config.use_dora, "magnitude", "lora_magnitude_vector"),
        ("lora_bias", config.lora_bias, "bias", "lora_B.bias"),
    ):
        odd = [path for path, module in modules.items() if (side in module.tensors) != is_on]
        have = "has no" if is_on else "has a"
        refuse_if(f"{option}={is_on}, but the adapter {have} {tensor} in", odd)


def extras_of(modules: Mapping[str, Module], saved: Collection[str]) -> set[str]:
    """What an adapter with LoRA on these modules needs beyond that on a layer's linears, as in
    EngineArgs.lora_extras; of those that are ``saved`` it has a matrix or rows of its own."""
    found = {_last(path) for path, module in modules.items() if module.layer == NO_LAYER}
    for side, extra in (("magnitude", "dora"), ("bias", "bias")):
        found |= {extra} if any(side in m.tensors for m in modules.values()) else set()
    return found | {f"saved_{_last(path)}" for path in saved}


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _check_extras(needed: Collection[str], extras: Collection[str] | None) -> None:
    """The engine has what the adapter needs."""
    missing = [extra for extra in _EXTRAS if extra in needed and extra not in (extras or ())]
    if extras is not None and missing:
        raise AdapterRefusedError(
            f"The adapter has {' and '.join(_EXTRAS[extra] for extra in missing)}, for which the "
            f"engine has no room: start it with lora_extras={sorted({*extras, *missing})}."
        )


def check_dtypes(headers: Mapping[str, Header]) -> None:
    """Raises AdapterRefusedError for tensors that are never read."""
    refuse_if(
        f"The adapter's tensors must be one of {', '.join(DTYPES.values())}",
        (f"{key} is {h.dtype}" for key, h in headers.items() if h.dtype not in DTYPES.values()),
    )


def check_headers(
    headers: Mapping[str, Header],
    modules: Mapping[str, Module],
    placements: Mapping[str, Placement],
    tokens: Mapping[str, tuple[int, ...]],
    model: ModelConfig | None,
) -> None:
    """Raises AdapterRefusedError unless all tensors have the shapes that the adapter's ranks and
    the model's widths give them. Without a model any width will do."""

    def misfits() -> Iterator[str]:
        for path, module in modules.items():
            rank = placements[path].rank if path in placements else 0
            d_in = d_out = vocab_size = hidden_size = _ANY
            if model is not None:
                shapes = [target_shape(model, target) for target in module.targets]
                d_in, d_out = shapes[0][0], sum(width for _, width in shapes)
                vocab_size, hidden_size = model.vocab_size, model.hidden_size
            expected = {
                "a": (rank, d_in),
                "b": (d_out, rank),
                "bias": (d_out,),
                "magnitude": (d_out,),
                "base": (vocab_size, hidden_size),
                "whole": (vocab_size, hidden_size),
                "rows": (len(tokens.get(path, ())), hidden_size),
            }
            for side, key in module.tensors.items():
                found, wanted = headers[key].shape, expected[side]
                pairs = zip(found, wanted, strict=False)
                if len(found) != len(wanted) or any(b not in (_ANY, a) for a, b in pairs):
                    named = ", ".join("any" if size == _ANY else str(size) for size in wanted)
                    yield f"{key} has shape {list(found)}, expected [{named}]"

    widths = "" if model is None else " or the model's widths"
    refuse_if(f"The adapter does not fit its own ranks (r, rank_pattern){widths}", misfits())
