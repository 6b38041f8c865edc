"""The way of large arrays to the devices, in pieces that steps can go between."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.parallel import Devices


class Transfer:
    """Sends arrays of one size: of each device ``num_rows`` rows of so many elements, in pieces of
    at most ``piece_bytes``, or of a row. XLA has a transfer wait for the steps that were
    dispatched, and what the next one reads from the host waits behind it.
    """

    def __init__(
        self, devices: Devices, num_rows: int, row_size: int, dtype: jnp.dtype, piece_bytes: int
    ) -> None:
        self._devices = devices
        self._shape = (devices.count, num_rows, row_size)
        self._dtype = jnp.dtype(dtype)
        most = max(1, piece_bytes // (row_size * self._dtype.itemsize))
        self.num_pieces = number = -(-num_rows // most)
        self._cuts = [
            slice(num_rows * n // number, num_rows * (n + 1) // number) for n in range(number)
        ]

    @property
    def num_bytes(self) -> int:
        """Of one device."""
        _, num_rows, row_size = self._shape
        return num_rows * row_size * self._dtype.itemsize

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What :meth:`send` returns the like of."""
        sharding = self._devices.sharding(("device",))
        count, _, row_size = self._shape
        sizes = [count * (cut.stop - cut.start) * row_size for cut in self._cuts]
        return tuple(jax.ShapeDtypeStruct((n,), self._dtype, sharding=sharding) for n in sizes)

    def send(self, array: np.ndarray) -> tuple[jax.Array, ...]:
        """Brings an array, of the devices one after the other, and waits for it: flat pieces that
        follow one another on each device."""
        parts, pieces = array.reshape(self._shape), []
        for cut in self._cuts:
            piece = parts[:, cut].astype(self._dtype, copy=False)
            pieces.append(self._devices.put_parts(piece.reshape(self._devices.count, -1)))
            # Steps go between this one and the next.
            pieces[-1].block_until_ready()
        return tuple(pieces)
