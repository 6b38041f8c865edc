"""Which versions of adapters are held, and where in the queue the first is that waits for each."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from jaxlora.adapters.registered import Registered

Place = tuple[int, int]
"""In the queue: lower ones come first."""
LAST_PLACE: Place = (sys.maxsize, 0)
"""Behind all that wait."""


class Holds:
    """What sequences hold, waiting and running ones, and beam searches."""

    def __init__(self) -> None:
        self._places: dict[Registered, Place] = {}

    def __len__(self) -> int:
        """Versions that anybody holds."""
        return len(self._places)

    def __iter__(self) -> Iterator[Registered]:
        """Each of them."""
        return iter(self._places)

    def add(self, entry: Registered, place: Place) -> None:
        """One more holds it, who waits at a place of the queue."""
        entry.num_holders += 1
        self._places[entry] = min(place, self._places.get(entry, place))

    def end(self, entry: Registered) -> bool:
        """One holds it no more; whether that was the last."""
        entry.num_holders -= 1
        if entry.num_holders == 0:
            del self._places[entry]
        return entry.num_holders == 0

    def without_slot(self, places: Mapping[Registered, Place] | None) -> list[Registered]:
        """What is held and has no slot, nor will have one for a pin, most urgent first.

        ``places`` are those of the first that waits for each now; what nobody waits for, as between
        two steps of a beam search, is last. None: as they were.
        """
        found = [entry for entry in self._places if lacks_slot(entry)]
        if places is not None:
            for entry in found:
                self._places[entry] = places.get(entry, LAST_PLACE)
        found.sort(key=self._places.__getitem__)
        return found


def lacks_slot(entry: Registered) -> bool:
    """It has no slot, and is not pinned."""
    return entry.slot is None and not entry.pinned
