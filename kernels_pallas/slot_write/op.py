"""The op that puts an adapter into a slot of the stacked arrays.

A group of linears has ``a[L, S, M * r, d_in]`` and ``b[L, S, r, d_out]``. Of layer ``l`` and member
``m`` a buffer holds A ``[rank, d_in]`` from element ``places[l, m, 0]`` on, and B ``[d_out, rank]``
from ``places[l, m, 1]``, as PEFT saves them; the op writes::

    a[l, slot, m * r + i, :]  = A[i]                         for i < rank
    b[l, slot, i, cols(m)]    = scales[l, m] * B[:, i]       for i < rank

and zeros for the ranks from there to the next multiple of 16, and wherever a place is
:data:`ABSENT`. Rows above that keep what they held. The scale is applied in float32.

Shape letters: L layers, S slots, M members of the group, r the bank's rank capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from jaxtyping import Array, Float

ABSENT: Final = -1
"""The place of a matrix that an adapter does not have: zeros are written."""
TILE: Final = 16
"""Ranks that kernels read together: of a slot, those from the true one to a multiple are zero."""


class Pair(NamedTuple):
    """One group's arrays."""

    a: Float[Array, "L S Mr d_in"]
    b: Float[Array, "L S r d_out"]


class Implementation(NamedTuple):
    """One way to compute the op."""

    name: str
    function: Callable[..., list[Pair]]
    """``(pairs, buffer, places, scales, slot, *, splits, rank) -> pairs``: ``pairs`` and ``splits``
    (output widths of the members) by group, ``buffer`` flat, ``places`` ``[L, M of all groups, 2]``
    and ``scales`` ``[L, M of all groups]``, ``slot`` a scalar of run time, ``rank`` one of Python.
    Where ``pairs`` are donated they are updated in place."""
    alignment: int
    """What every place must be a multiple of, in bytes."""


def padded(rank: int) -> int:
    """The ranks that are written for an adapter of this one."""
    return -(-rank // TILE) * TILE
