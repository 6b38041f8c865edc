"""An adapter's pairs as its layout places them, each made when somebody asks for it.

Making hundreds takes milliseconds of Python and letting go of them nearly as long, and whoever
steps the engine waits for Python's lock meanwhile. A slot write needs none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from jaxlora.adapters.adapter import LoraPair
from jaxlora.adapters.peft_layout import Layout
from jaxlora.adapters.tensors import Tensors


class PlacedPairs(Mapping[tuple[int, str], LoraPair]):
    """Pairs by layer and target, in the order of :func:`jaxlora.adapters.adapter.in_order`. Their
    arrays are parts of the tensors."""

    def __init__(self, layout: Layout, tensors: Tensors) -> None:
        self._places, self._tensors = layout.places, tensors

    def __getitem__(self, key: tuple[int, str]) -> LoraPair:
        module, number = self._places[key]
        tensors, cuts = self._tensors, module.cuts
        own = {side: tensors[name] for side, name in module.tensors.items()}
        if cuts:
            # The targets share A, and have a part of the rest each.
            a = own.pop("a")
            own = {"a": a} | {side: np.split(array, cuts)[number] for side, array in own.items()}
        (block, a_at, _), (block_b, b_at, (_, rank)) = (
            tensors.places[module.tensors[side]] for side in "ab"
        )
        row = (0, *cuts)[number]
        at = (a_at, b_at + row * rank) if block == block_b == 0 else None
        return LoraPair(scale=module.scale, at=at, **own)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
