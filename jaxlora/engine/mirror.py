"""Host arrays on the devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxlora.parallel import Devices


class Mirror:
    """Device copies of host arrays; what did not change since the last call is not sent again."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        self._sent: dict[str, list[tuple[np.ndarray, jax.Array]]] = {}

    def put(self, name: str, tree: Any) -> Any:
        """The tree with its leaves on the device. The caller does not write to them afterwards."""
        leaves, structure = jax.tree.flatten(tree)
        last = self._sent.get(name, [])
        known = [
            i < len(last) and last[i][0].shape == leaf.shape and np.array_equal(last[i][0], leaf)
            for i, leaf in enumerate(leaves)
        ]
        changed = [leaf for leaf, old in zip(leaves, known, strict=True) if not old]
        # Even a call for nothing takes 0.1 ms.
        fresh = iter(self._devices.put(changed) if changed else ())
        sent = [
            last[i] if old else (leaf, next(fresh))
            for i, (leaf, old) in enumerate(zip(leaves, known, strict=True))
        ]
        self._sent[name] = sent
        return jax.tree.unflatten(structure, [array for _, array in sent])
