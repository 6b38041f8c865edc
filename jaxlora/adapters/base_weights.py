"""What an adapter must know of the base's weights: DoRA's norms, and whether a copy is a copy.

The weights stay on the device. Norms are computed there, one linear at a time and in blocks of
rows, so that no second copy of a matrix is ever made. Of several devices each finds what it can of
its own part, and the host puts that together: threads ask while steps run, and programs that wait
for other devices have to be begun in one order on all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxlora.adapters.adapter import NO_LAYER, TARGETS, Adapter, Traits
from jaxlora.adapters.content import largest_of
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterRefusedError
from jaxlora.models.lora import Group, groups, vocabulary_groups
from jaxlora.parallel import Devices, ShapesOnly, shard

_BLOCK_ROWS = 1024


class BaseWeights:
    """The weights of one model, for adapters of ranks up to ``max_rank``.

    ``state`` is the state of a :class:`~jaxlora.models.llama.Llama`, and ``dora_targets`` are the
    targets DoRA may be on, short names as in TARGETS. It may hold shapes at first, which is enough
    for :meth:`programs`: then :meth:`use_weights`.
    """

    def __init__(
        self,
        config: ModelConfig,
        devices: Devices,
        state: nnx.State[Any, Any],
        *,
        max_rank: int,
        dora_targets: Collection[str],
    ) -> None:
        self._config = config
        self._devices = devices
        self._state: Any = state
        self._max_rank = max_rank
        self._dora_targets = dora_targets
        self._programs: dict[str, Any] = {}
        local = shard(config, devices.count)
        self._parts: dict[str, tuple[Group, int, int]] = {
            member: (group, sum(group.splits[:i]), width)
            for group in (*groups(local), *vocabulary_groups(local))
            for i, (member, width) in enumerate(zip(group.members, group.splits, strict=True))
        }
        """Target -> its group, and its first output and number of outputs in that; of one
        device."""

    def is_copy(self, target: str, array: np.ndarray) -> bool:
        """Whether an array is the base's "embed" or "lm_head", once cast to the base's dtype."""
        weight = self._weight(NO_LAYER, target)
        parts = array.reshape(self._devices.num_parts("vocab"), -1, weight.shape[1])
        size = parts.shape[1]
        count = min(size, _BLOCK_ROWS)
        starts = (min(i, size - count) for i in range(0, size, count))

        def equal_from(start: int) -> bool:
            # Some rows of each device's part.
            block = parts[:, start : start + count].reshape(-1, weight.shape[1])
            found = self._programs["copy"](weight, block.astype(weight.dtype), np.int32(start))
            return bool(np.asarray(found).all())

        return all(map(equal_from, starts))

    def programs(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """What compares and what computes norms: function and example arguments by name. What each
        device finds is returned one after the other."""
        shapes = ShapesOnly(self._devices.mesh)
        weight = self._weight(NO_LAYER, "embed")
        (embed, *_), hidden = self._parts["embed"], weight.shape[1]
        block = shapes.zeros((min(embed.d_in, _BLOCK_ROWS), hidden), weight.dtype, ("vocab", None))
        start = jax.ShapeDtypeStruct((), np.int32)
        programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
        programs = {"copy": (_has_rows, (weight, block, start))}
        for target in self._dora_targets:
            weight = self._weight(0 if target in TARGETS else NO_LAYER, target)
            group, first, size = self._parts[target]
            a = shapes.zeros((self._max_rank, group.d_in), np.float32, (None, group.in_axis))
            b = shapes.zeros((size, self._max_rank), np.float32, (group.out_axis, None))
            squares = partial(_row_squares, start=first, size=size)
            programs[target] = (_column_squares if target == "embed" else squares, (weight, a, b))
        return programs

    def use_weights(self, state: nnx.State[Any, Any]) -> None:
        """Takes the weights in the place of their shapes."""
        self._state = state

    def use_programs(self, programs: dict[str, Any]) -> None:
        """Takes the compiled programs, by name."""
        self._programs = programs

    def with_gains(self, adapter: Adapter) -> Adapter:
        """The adapter with the gains of its DoRA modules; itself if it has none.

        Raises AdapterRefusedError where a norm is zero or overflows, or B with its gain does.
        """
        if "dora" not in adapter.extras:
            return adapter
        modules = dict(adapter.modules)
        limit = largest_of(self._weight(NO_LAYER, "embed").dtype)
        for (layer, target), pair in adapter.modules.items():
            if pair.magnitude is None:
                continue
            a = np.zeros((self._max_rank, pair.a.shape[1]), np.float32)
            b = np.zeros((pair.b.shape[0], self._max_rank), np.float32)
            a[: pair.rank] = pair.a
            b[:, : pair.rank] = pair.scaled_b()
            found = np.asarray(self._programs[target](self._weight(layer, target), a, b))
            summands = self._devices.num_parts(self._parts[target][0].in_axis)
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                norms = np.sqrt(found.reshape(summands, -1).sum(axis=0))
                gain = pair.magnitude.astype(np.float32) / norms
                fits = np.isfinite(gain) & (np.abs(gain) * np.abs(b).max(axis=1) <= limit)
            if not fits.all():
                where = target if layer == NO_LAYER else f"layer {layer}, {target}"
                raise AdapterRefusedError(
                    f"DoRA divides by the norm of the changed weight, which is zero or too large "
                    f"for {int((~fits).sum())} outputs of {where}, or the magnitude is too large."
                )
            modules[layer, target] = dataclasses.replace(pair, gain=gain)
        traits = Traits.of(modules)
        frozen = MappingProxyType(modules)
        return dataclasses.replace(adapter, modules=frozen, traits=traits, alike=None)

    def matrix(self, target: str) -> jax.Array:
        """The base's "embed" or "lm_head", ``[vocab_size, hidden_size]``."""
        return self._weight(NO_LAYER, target)

    def _weight(self, layer: int, target: str) -> Any:
        """The matrix a target is part of, as the model holds it: an array, at first its shape."""
        # Of the state: to merge a model leaves a reference cycle that holds all weights.
        if target == "embed" or (target == "lm_head" and self._config.tie_word_embeddings):
            return self._state["embedding"].get_value()
        if target == "lm_head":
            return self._state["lm_head"]["weight"].get_value()
        return self._state["layers"][layer][self._parts[target][0].name]["weight"].get_value()


def _has_rows(
    weight: Float[Array, "V d"], block: Float[Array, "rows d"], start: Int32[Array, ""]
) -> Bool[Array, " 1"]:
    """Whether the rows of ``weight`` from ``start`` on are those of ``block``."""
    return jnp.all(lax.dynamic_slice_in_dim(weight, start, len(block)) == block)[None]


def _row_squares(
    weight: Float[Array, "rows d_in"],
    a: Float32[Array, "r d_in"],
    b: Float32[Array, "d_out r"],
    *,
    start: int,
    size: int,
) -> Float32[Array, " d_out"]:
    """Squares of the norms of the rows of ``weight[start : start + size] + b @ a``."""
    count = min(size, _BLOCK_ROWS)

    def add_block(i: jax.Array, squares: jax.Array) -> jax.Array:
        # The last block starts earlier instead of running past the end.
        first = jnp.minimum(i * count, size - count)
        rows = lax.dynamic_slice_in_dim(weight, start + first, count).astype(jnp.float32)
        rows += jnp.matmul(
            lax.dynamic_slice_in_dim(b, first, count), a, precision=lax.Precision.HIGHEST
        )
        of_block = jnp.sum(jnp.square(rows), axis=1)
        return lax.dynamic_update_slice_in_dim(squares, of_block, first, 0)

    return lax.fori_loop(0, -(-size // count), add_block, jnp.zeros(size, jnp.float32))


def _column_squares(
    weight: Float[Array, "V d"], a: Float32[Array, "r V"], b: Float32[Array, "d r"]
) -> Float32[Array, " d"]:
    """Squares of the norms of the columns of ``weight + (b @ a).T``."""
    size, width = weight.shape
    count = min(size, _BLOCK_ROWS)

    def add_block(i: jax.Array, squares: jax.Array) -> jax.Array:
        first = jnp.minimum(i * count, size - count)
        fresh = first + jnp.arange(count) >= i * count
        rows = lax.dynamic_slice_in_dim(weight, first, count).astype(jnp.float32)
        rows += jnp.matmul(
            lax.dynamic_slice_in_dim(a, first, count, axis=1).T,
            b.T,
            precision=lax.Precision.HIGHEST,
        )
        return squares + jnp.sum(jnp.where(fresh[:, None], jnp.square(rows), 0), axis=0)

    blocks = -(-size // count)
    return lax.fori_loop(0, blocks, add_block, jnp.zeros(width, jnp.float32))
