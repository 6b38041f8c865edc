"""An adapter at rest: low-rank pairs on the host, checked, named by module, hashed by content."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora.adapters.content import digest
from jaxlora.config import ModelConfig
from jaxlora.models.lora import MODULES, groups, vocabulary_groups

TARGETS = MODULES
"""The linears of a decoder layer an adapter may change, in the order the layer applies them."""
VOCABULARY_TARGETS = ("embed", "lm_head")
"""The two matrices beside the layers: token embedding and output head."""
NO_LAYER = -1
"""Layer index under which an adapter keeps the VOCABULARY_TARGETS."""


@lru_cache(maxsize=64)
def target_shape(model: ModelConfig, target: str) -> tuple[int, int]:
    """Input and output width ``(d_in, d_out)`` of a target in the given model.

    The embedding counts as a linear of one-hot vectors, ``(vocab_size, hidden_size)``.
    """
    shapes = {
        member: (group.d_in, d_out)
        for group in (*groups(model), *vocabulary_groups(model))
        for member, d_out in zip(group.members, group.splits, strict=True)
    }
    return shapes[target]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoraPair:
    """The change of one linear: ``y += scale * (x A^T) B^T`` (LoRA, arXiv:2106.09685).

    With ``bias`` (PEFT's lora_bias): ``y += scale * ((x A^T) B^T + bias)``. With ``magnitude``
    (DoRA, arXiv:2402.09353): ``y = gain * (x W^T + scale * (x A^T) B^T) + base bias``, where
    ``gain = magnitude / norm(W + scale * B A)``, one norm for each output; only who knows the base
    weights can compute it (:mod:`jaxlora.adapters.base_weights`).
    """

    a: np.ndarray
    """Shape ``[r, d_in]``, float32, float16 or bfloat16 as the adapter was saved."""
    b: np.ndarray
    """Shape ``[d_out, r]``, not yet scaled."""
    scale: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA; to be multiplied into B in float32."""
    bias: np.ndarray | None = None
    """Shape ``[d_out]``, not yet scaled; never together with a magnitude."""
    magnitude: np.ndarray | None = None
    """Shape ``[d_out]``."""
    gain: np.ndarray | None = None
    """Shape ``[d_out]``, float32; follows from the magnitude and the base weights."""
    at: tuple[int, int] | None = None
    """Where ``a`` and ``b`` begin in the adapter's first block, if both are in it."""

    def scaled_b(self) -> np.ndarray:
        """B with scale and gain multiplied into it, float32 ``[d_out, r]``."""
        scaled = self.b.astype(np.float32) * np.float32(self.scale)
        return scaled if self.gain is None else scaled * self.gain[:, None]

    def arrays(self) -> dict[str, np.ndarray]:
        """What was saved of it, by name."""
        named = {"a": self.a, "b": self.b, "bias": self.bias, "magnitude": self.magnitude}
        return {side: array for side, array in named.items() if array is not None}

    @property
    def rank(self) -> int:
        """True rank r of the pair."""
        return int(self.a.shape[0])


def in_order(keys: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    """Layers and targets as an adapter has them: what is in no layer first."""
    targets = (*VOCABULARY_TARGETS, *TARGETS)
    return sorted(keys, key=lambda key: (key[0], targets.index(key[1])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What an adapter's pairs are like, whatever their numbers."""

    rank: int
    """The largest true rank."""
    dtypes: frozenset[str]
    """Of every A and B."""
    sides: frozenset[str]
    """Which of bias, magnitude and gain any pair has."""
    targets: frozenset[str]
    """Those of at least one layer."""

    @classmethod
    def of(cls, modules: Mapping[tuple[int, str], LoraPair]) -> Traits:
        """Of these pairs."""
        pairs = modules.values()
        rest = ("bias", "magnitude", "gain")
        return cls(
            rank=max((pair.rank for pair in pairs), default=0),
            dtypes=frozenset(array.dtype.name for pair in pairs for array in (pair.a, pair.b)),
            sides=frozenset(s for pair in pairs for s in rest if getattr(pair, s) is not None),
            targets=frozenset(target for _, target in modules),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """A named set of low-rank pairs. Its arrays are read-only; its version is its content."""

    name: str
    modules: Mapping[tuple[int, str], LoraPair]
    """By layer index and target, ``(3, "q")`` or ``(NO_LAYER, "embed")``; absent where the adapter
    changes nothing."""
    traits: Traits
    """Those of the modules."""
    matrices: Mapping[str, np.ndarray]
    """Matrices ``[vocab_size, hidden_size]`` to be used instead of the base's, by
    VOCABULARY_TARGETS."""
    rows: Mapping[str, tuple[tuple[int, ...], np.ndarray]]
    """Token ids and rows ``[ids, hidden_size]`` to be used instead of those rows of the base's
    matrix, by VOCABULARY_TARGETS."""
    version: str
    """Hash of its tensors as they were saved, and of their scales: what has an equal version has
    equal content, and a copy has an equal version under any name."""
    blocks: tuple[np.ndarray, ...] = ()
    """Flat arrays that its arrays are parts of, where they lie together."""
    alike: object | None = None
    """One object for all adapters with modules of the same shapes, scales and places in blocks;
    None for one by itself."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What its adapter_config.json holds."""
    fingerprint: tuple[int, ...] = ()
    """Of the files, before they were read (:func:`jaxlora.adapters.sources.fingerprint`)."""
    folder: str = ""
    """Where they are, of a hub repository the revision that was read; "" of tensors."""

    @classmethod
    def of(
        cls,
        name: str,
        modules: Mapping[tuple[int, str], LoraPair],
        matrices: Mapping[str, np.ndarray] = MappingProxyType({}),
        rows: Mapping[str, tuple[tuple[int, ...], np.ndarray]] = MappingProxyType({}),
        config: Mapping[str, Any] = MappingProxyType({}),
        blocks: Sequence[np.ndarray] = (),
        description: str = "",
        traits: Traits | None = None,
        alike: object | None = None,
    ) -> Adapter:
        """Computes the version: a hash of ``description``, which says what lies where in
        ``blocks``, and of the blocks; without blocks, of what the arrays are and hold. Modules
        whose ``traits`` are given are in order and read-only; of others both is seen to."""
        if traits is None:
            modules = MappingProxyType({key: modules[key] for key in in_order(modules)})
            traits = Traits.of(modules)
        whole = {key: matrices[key] for key in VOCABULARY_TARGETS if key in matrices}
        hashed = blocks
        if not blocks:
            description, hashed = _described(modules, whole, rows)
        return cls(
            name=name,
            modules=modules,
            traits=traits,
            matrices=MappingProxyType(whole),
            rows=MappingProxyType(dict(rows)),
            version=digest(description, hashed)[:16],
            blocks=tuple(blocks),
            alike=alike,
            config=config,
        )

    def __post_init__(self) -> None:
        """Works out what follows here, so that the thread that steps the engine need not."""
        _ = self.num_bytes

    @property
    def rank(self) -> int:
        """Largest true rank of any module."""
        return self.traits.rank

    @property
    def packed_dtype(self) -> np.dtype[Any]:
        """What holds every A and B as it was saved, and B with its gain: one dtype if all have it,
        else float32."""
        plain = "gain" not in self.traits.sides and len(self.traits.dtypes) == 1
        return jnp.dtype(next(iter(self.traits.dtypes)) if plain else np.float32)

    @property
    def targets(self) -> frozenset[str]:
        """The targets that at least one layer has."""
        return self.traits.targets

    @property
    def extras(self) -> frozenset[str]:
        """What it needs beyond LoRA on the layers' linears: some of EngineArgs.lora_extras."""
        names = {"embed": "embed_tokens", "lm_head": "lm_head"}
        found = {names[target] for target in self.targets & names.keys()}
        found |= {"dora"} if "magnitude" in self.traits.sides else set()
        found |= self.traits.sides & {"bias"}
        return frozenset(found | {f"saved_{names[target]}" for target in self.replaced})

    @property
    def replaced(self) -> frozenset[str]:
        """The VOCABULARY_TARGETS of which it has a matrix or rows of its own."""
        return frozenset(self.matrices.keys() | self.rows.keys())

    @cached_property
    def num_bytes(self) -> int:
        """Host memory of the arrays, with gains, in bytes; an A that fused targets share counts
        once."""
        gains = 0
        if "gain" in self.traits.sides:
            gains = sum(int(p.gain.nbytes) for p in self.modules.values() if p.gain is not None)
        if self.blocks:
            # They hold the arrays and nothing else.
            return gains + sum(int(block.nbytes) for block in self.blocks)
        arrays = (array for pair in self.modules.values() for array in pair.arrays().values())
        pairs = sum({array.ctypes.data: int(array.nbytes) for array in arrays}.values())
        # Embedding and head of a tied model share their rows.
        rows = {id(values): int(values.nbytes) for _, values in self.rows.values()}
        matrices = sum(int(matrix.nbytes) for matrix in self.matrices.values())
        return pairs + gains + matrices + sum(rows.values())


def _described(
    modules: Mapping[tuple[int, str], LoraPair],
    matrices: Mapping[str, np.ndarray],
    rows: Mapping[str, tuple[tuple[int, ...], np.ndarray]],
) -> tuple[str, list[np.ndarray]]:
    """All arrays, and what each is."""
    named = [
        (f"{layer} {target} {pair.scale!r} {side}", array)
        for (layer, target), pair in modules.items()
        for side, array in pair.arrays().items()
    ]
    named += [(f"saved {target}", matrix) for target, matrix in matrices.items()]
    named += [(f"rows {target} {ids}", values) for target, (ids, values) in sorted(rows.items())]
    lines = [f"{name} {array.dtype.name} {array.shape}" for name, array in named]
    return "\n".join(lines), [np.ascontiguousarray(array) for _, array in named]
