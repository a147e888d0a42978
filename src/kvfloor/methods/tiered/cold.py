"""Choose where the exact tokens beside the codes are kept: on the device, in the host's memory, or on a disk."""

from __future__ import annotations

import tempfile
from typing import ClassVar, Literal, get_args

from torch import Tensor

from kvfloor.core.slots import Slots
from kvfloor.core.spec import Spec
from kvfloor.methods.tiered.cold_disk import DiskBlocks
from kvfloor.methods.tiered.cold_ram import RamBlocks
from kvfloor.methods.tiered.cold_slots import ColdSlots, StreamedSlots

Place = Literal["device", "ram", "disk"]
PLACES: tuple[str, ...] = get_args(Place)


class Cold(Slots):
    """Keep tokens as they were given, to be fetched one by one: what a query reads first are the codes beside them."""

    plain: ClassVar[bool] = False

    def pair(self, place: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the keys (..., d) and values (..., dv) at the places `place` (...), int64; `wanted` is not used."""
        del wanted
        return self.keys(place), self.values(place)


ExactSlots = Cold | ColdSlots


def exact_slots(
    spec: Spec, slots: int, page: int, place: str, folder: str | None, streamed: bool
) -> Slots | ExactSlots:
    """Open the slots that keep tokens as they were given, with room for `slots` tokens in each row at first.

    page      tokens of a row that are written together, where the place is not the device
    place     "device", "ram" or "disk"
    folder    where the file is made, for "disk"; None: the system's folder for temporary files (TMPDIR)
    streamed  True if every query reads all tokens, as there are no codes; False if they are fetched one by one
    Raises ColdTierError if the file cannot be made.
    """
    capacities = [slots] * spec.rows
    if place == "device":
        return (Slots if streamed else Cold)(spec, capacities, lose=False)
    cold = RamBlocks(spec, page) if place == "ram" else DiskBlocks(spec, page, folder or tempfile.gettempdir())
    return (StreamedSlots if streamed else ColdSlots)(spec, capacities, page, cold)
