"""The op by XLA: a gather, a cast and an update for every matrix of a layer, all layers at once."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas.slot_write.op import ABSENT, Implementation, Pair, padded


def write_slot(
    pairs: Sequence[Pair],
    buffer: Float[Array, " size"],
    places: Int32[Array, "L members 2"],
    scales: Float[Array, "L members"],
    slot: Int32[Array, ""],
    *,
    splits: Sequence[tuple[int, ...]],
    rank: int,
) -> list[Pair]:
    """The op (:mod:`.op`) in any dtypes."""

    def take(places: jax.Array, rows: int, columns: int) -> jax.Array:
        """Of each layer its matrix, zeros where there is none."""

        def part(place: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(buffer, (place,), (rows * columns,))

        parts = jax.vmap(part)(places).reshape(-1, rows, columns)
        return jnp.where((places == ABSENT)[:, None, None], 0, parts)

    above = ((0, 0), (0, padded(rank) - rank), (0, 0))
    member, written = 0, []
    for (a, b), widths in zip(pairs, splits, strict=True):
        capacity, d_in = b.shape[2], a.shape[3]
        new_a, columns = a, []
        for m, width in enumerate(widths):
            (a_at, b_at), scale = places[:, member].T, scales[:, member, None, None]
            rows = jnp.pad(take(a_at, rank, d_in).astype(a.dtype), above)
            new_a = jax.lax.dynamic_update_slice(new_a, rows[:, None], (0, slot, m * capacity, 0))
            part = (take(b_at, width, rank).astype(jnp.float32) * scale).astype(b.dtype)
            columns.append(jnp.swapaxes(part, 1, 2))
            member += 1
        part = jnp.pad(jnp.concatenate(columns, axis=2), above)[:, None]
        written.append(Pair(new_a, jax.lax.dynamic_update_slice(b, part, (0, slot, 0, 0))))
    return written


IMPLEMENTATION = Implementation(name="xla", function=write_slot, alignment=1)
