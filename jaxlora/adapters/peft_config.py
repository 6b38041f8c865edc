"""PEFT's adapter_config.json: every option is known, and served exactly or refused by name.

``_OPTIONS`` is the whole policy: PEFT's default of each option, the values that are served and
the words in which the others are refused. To serve one more option, move its row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from jaxlora.adapters.peft_patterns import ModuleMatcher
from jaxlora.checks import abridged, shown
from jaxlora.errors import AdapterRefusedError

_MAX_REASONS: Final = 20
_MAX_SCALE: Final = 3.4e38  # float32, in which the scale is folded into B

# The modules that may be saved whole, as PEFT may spell them.
_VOCABULARY: Final = {
    "embed_tokens": "model.embed_tokens",
    "model.embed_tokens": "model.embed_tokens",
    "lm_head": "lm_head",
}


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_int(value) and 0 < value < 1 << 31


def _is_alpha(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and -_MAX_SCALE <= value <= _MAX_SCALE


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_pattern_of(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return value is None or (
            isinstance(value, Mapping)
            and all(isinstance(key, str) and is_value(item) for key, item in value.items())
        )

    return check


def _is_any_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        if value is None or is_item(value):
            return True
        return isinstance(value, list | tuple | set | frozenset) and all(map(is_item, value))

    return check


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def _is_plain_init(value: Any) -> bool:
    """Initializations that leave the base weights as they are: plain LoRA once trained."""
    names = ("gaussian", "eva", "orthogonal", "lora_ga", "mica")
    return value is None or _is_bool(value) or (_is_str(value) and value.lower() in names)


def _is_vocabulary(value: Any) -> bool:
    return not value or (
        _is_any_of(_is_str)(value)
        and not isinstance(value, str)
        and set(value) <= _VOCABULARY.keys()
    )


def _is_ids(value: Any) -> bool:
    is_list = isinstance(value, list | tuple) and all(_is_int(i) and i >= 0 for i in value)
    return is_list and len(set(value)) == len(value) > 0


def _is_token_indices(value: Any) -> bool:
    if isinstance(value, Mapping):
        known = value.keys() <= _VOCABULARY.keys() and all(map(_is_ids, value.values()))
        return known and len({_VOCABULARY[key] for key in value}) == len(value)
    return not value or _is_ids(value)


def _is_off(value: Any) -> bool:
    """Falsy, except ``{}``: PEFT takes that for a sub-configuration with every default."""
    return not value and not isinstance(value, Mapping)


def _is_anything(value: Any) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class _Option:
    default: Any
    serves: Callable[[Any], bool]
    refusal: str = "{key}={value} is not {needs}."
    needs: str = ""


def _served(default: Any, serves: Callable[[Any], bool], needs: str) -> _Option:
    return _Option(default, serves, needs=needs)


def _inert(default: Any = None) -> _Option:
    return _Option(default, _is_anything)


def _refused(refusal: str, default: Any = None) -> _Option:
    return _Option(default, _is_off, refusal)


def _switch() -> _Option:
    return _served(False, lambda v: v is None or _is_bool(v), "true or false")


_NAMES: Final = "a string or a list of strings"

_OPTIONS: Final[Mapping[str, _Option]] = {
    # What decides rank, scale and place.
    "peft_type": _served("LORA", lambda v: v == "LORA", "served: only LORA is"),
    "r": _served(8, _is_rank, "a positive integer"),
    "lora_alpha": _served(8, _is_alpha, "a finite number"),
    "use_rslora": _switch(),
    "rank_pattern": _served({}, _is_pattern_of(_is_rank), "a map of patterns to ranks"),
    "alpha_pattern": _served({}, _is_pattern_of(_is_alpha), "a map of patterns to finite numbers"),
    "target_modules": _served(None, _is_any_of(_is_str), _NAMES),
    "exclude_modules": _served(None, _is_any_of(_is_str), _NAMES),
    "layers_to_transform": _served(None, _is_any_of(_is_int), "a layer or a list of layers"),
    "layers_pattern": _served(None, _is_any_of(_is_str), _NAMES),
    "init_lora_weights": _Option(
        True,
        _is_plain_init,
        "{key}={value} may have changed the base weights: convert the adapter to plain LoRA "
        "(PEFT's save_pretrained with path_initial_model_for_weight_conversion; not for LoftQ) and "
        "load that, or serve the changed base and set {key} to true in adapter_config.json.",
    ),
    # What says nothing about the trained weights: bookkeeping, training, and the details of
    # initializations and variants whose own switch is judged above or below.
    "task_type": _inert(),
    "auto_mapping": _inert(),
    "peft_version": _inert(),
    "base_model_name_or_path": _inert(),
    "revision": _inert(),
    "inference_mode": _inert(False),
    "lora_dropout": _inert(0.0),
    "runtime_config": _inert(),
    "megatron_core": _inert("megatron.core"),
    "qalora_group_size": _inert(16),
    "loftq_config": _inert({}),
    "eva_config": _inert(),
    "lora_ga_config": _inert(),
    # What is served by an engine that was started for it.
    "use_dora": _switch(),
    "lora_bias": _switch(),
    "ensure_weight_tying": _switch(),
    "modules_to_save": _Option(None, _is_vocabulary, "Unsupported modules_to_save: {value}"),
    "trainable_token_indices": _served(
        None,
        _is_token_indices,
        "a list of different token ids, or one for embed_tokens and one for lm_head",
    ),
    # What is not served.
    "bias": _Option(
        "none", lambda v: v == "none", "Adapter bias is not supported. ({key}={value})"
    ),
    "fan_in_fan_out": _refused("{key}={value} is for Conv1D bases, which are not served.", False),
    "layer_replication": _refused("{key}={value} changes the number of layers: not served."),
    "megatron_config": _refused("{key}={value} is not served."),
    "corda_config": _refused(
        "{key}={value} is not served: it may have changed the base weights. PEFT leaves it in an "
        "adapter that was converted to plain LoRA: take it out of that one's adapter_config.json."
    ),
    "alora_invocation_tokens": _refused("{key}={value} (aLoRA) is not served."),
    "use_bdlora": _refused("{key}={value} (BD-LoRA) is not served."),
    "use_qalora": _refused("{key}={value} (QA-LoRA) is not served.", False),
    "velora_config": _refused("{key}={value} (VeLoRA) is not served."),
    "monteclora_config": _refused("{key}={value} (MonteCLoRA) is not served."),
    "arrow_config": _refused("{key}={value} (Arrow) is not served."),
    "kasa_config": _refused("{key}={value} (KaSA) is not served: it changes the base weights."),
    "target_parameters": _refused("{key}={value} is not served: use target_modules."),
}
_UNKNOWN: Final = _Option(
    None,
    lambda value: not value,
    "{key}={value} is an option jaxlora does not know: it may change what the adapter computes.",
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """What the configuration says of one module."""

    rank: int
    scale: float
    left_out_by: str | None
    """The option by which PEFT leaves the module out and would ignore its tensors, if any."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PeftConfig:
    """The options of a LoRA adapter that decide rank, scale, place and kind."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | Collection[str] | None
    exclude_modules: str | Collection[str] | None
    layers_to_transform: Collection[int]
    layers_pattern: Collection[str]
    use_dora: bool
    lora_bias: bool
    ensure_weight_tying: bool
    modules_to_save: Collection[str]
    """Full names, of the embedding and the output head only."""
    token_indices: Mapping[str, tuple[int, ...]]
    """trainable_token_indices by such a name: the rows of its matrix that were trained."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> PeftConfig:
        """Judges every key of an adapter_config.json; missing keys have PEFT's defaults.

        Raises AdapterRefusedError with one sentence for each option that cannot be served, up to 20
        of them.
        """
        # Another method has other options, of which nothing need be said.
        reasons = _reasons("peft_type", config.get("peft_type", "LORA")) or [
            reason for key, value in config.items() for reason in _reasons(key, value)
        ]
        if reasons:
            more = len(reasons) - _MAX_REASONS
            rest = [f"{more} more options are refused, too."] if more > 0 else []
            raise AdapterRefusedError(" ".join([*reasons[:_MAX_REASONS], *rest]))
        options = {key: config.get(key, option.default) for key, option in _OPTIONS.items()}
        peft_config = cls(
            r=int(options["r"]),
            lora_alpha=float(options["lora_alpha"]),
            use_rslora=bool(options["use_rslora"]),
            rank_pattern={k: int(v) for k, v in (options["rank_pattern"] or {}).items()},
            alpha_pattern={k: float(v) for k, v in (options["alpha_pattern"] or {}).items()},
            target_modules=_as_names(options["target_modules"]),
            exclude_modules=_as_names(options["exclude_modules"]),
            layers_to_transform=_as_collection(options["layers_to_transform"]),
            layers_pattern=_as_collection(options["layers_pattern"]),
            use_dora=bool(options["use_dora"]),
            lora_bias=bool(options["lora_bias"]),
            ensure_weight_tying=bool(options["ensure_weight_tying"]),
            token_indices=_by_matrix(options["trainable_token_indices"]),
            modules_to_save=frozenset(_VOCABULARY[m] for m in options["modules_to_save"] or ()),
        )
        # An empty list is all layers, whatever the pattern.
        if peft_config.layers_pattern and options["layers_to_transform"] is None:
            raise AdapterRefusedError("layers_pattern needs layers_to_transform, as in PEFT.")
        if peft_config.layers_to_transform and isinstance(peft_config.target_modules, str):
            raise AdapterRefusedError(
                "layers_to_transform needs target_modules to be a list, as in PEFT."
            )
        if peft_config.lora_bias and peft_config.use_dora:
            raise AdapterRefusedError("lora_bias and use_dora exclude each other, as in PEFT.")
        return peft_config

    def place(self, modules: Collection[str]) -> dict[str, Placement]:
        """Rank, scale and place of modules named like ``model.layers.0.self_attn.q_proj``.

        Of several patterns that match a module the first counts, as in PEFT. Raises
        AdapterRefusedError for a pattern that is no regular expression or takes too long.
        """
        matcher = ModuleMatcher()
        placements = {}
        for module in modules:
            rank = matcher.lookup(self.rank_pattern, module, self.r)
            alpha = matcher.lookup(self.alpha_pattern, module, self.lora_alpha)
            scale = alpha / (math.sqrt(rank) if self.use_rslora else rank)
            placements[module] = Placement(rank, scale, self._left_out_by(module, matcher))
        return placements

    def _left_out_by(self, module: str, matcher: ModuleMatcher) -> str | None:
        if self.exclude_modules and matcher.names(self.exclude_modules, module):
            return "exclude_modules"
        targets = self.target_modules
        if targets is None:
            return None
        if isinstance(targets, str) and targets.lower() == "all-linear":
            # Neither the embedding, which is no linear, nor the output head.
            return None if ".layers." in f".{module}" else "target_modules"
        if not matcher.names(targets, module):
            return "target_modules"
        # A module listed under its full name is taken whatever its layer.
        if not self.layers_to_transform or module in targets:
            return None
        layer = matcher.layer(self.layers_pattern or (r"[^.]*",), module)
        return None if layer in self.layers_to_transform else "layers_to_transform"


def _reasons(key: str, value: Any) -> list[str]:
    """Why an option cannot be served: no or one sentence."""
    option = _OPTIONS.get(key, _UNKNOWN)
    # What was not read from JSON may have no truth of its own, as arrays have none.
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        if option.serves(value):
            return []
    return [option.refusal.format(key=shown(str(key)), value=abridged(value), needs=option.needs)]


def _by_matrix(token_indices: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(token_indices, Mapping):
        token_indices = {"embed_tokens": token_indices} if token_indices else {}
    return {_VOCABULARY[key]: tuple(map(int, ids)) for key, ids in token_indices.items()}


def _as_names(value: Any) -> Any:
    """A list as a set, which may be long and is asked for every module."""
    return value if value is None or isinstance(value, str) else frozenset(value)


def _as_collection(value: Any) -> Collection[Any]:
    if value is None or value == "":
        return ()
    return value if isinstance(value, list | tuple | set | frozenset) else (value,)
