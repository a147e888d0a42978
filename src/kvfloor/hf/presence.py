"""The slots of a cache that hold no token to attend to, by the masks of its forwards: pads, and tokens hidden since.

A 2-d mask is about every slot, those of earlier forwards too. A pad was never taken in, so it cannot be shown later. A
token that was taken in and is hidden by a later mask, such as what `generate()` appends to a row that has ended, is
dropped by every layer. A mask that repeats what is known costs one count of its entries per forward, not per layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tokens = tuple[Tensor, Tensor]  # batch item (e,) and position among the item's own tokens (e,), int64 on the CPU

_WHOLE = "give the same zeros again, or feed the tokens of these slots with all others to a new cache"


class Presence:
    """What all layers of one cache know about their slots; the first of them to answer a forward compares its mask."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything: the cache is empty."""
        self.slots = 0
        self.pads = torch.zeros(0, 2, dtype=torch.int64)  # (batch item, slot) of what was never taken in
        self.hidden = torch.zeros(0, 2, dtype=torch.int64)  # and of what was taken in and is dropped
        self._leaving: Tokens | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered: 16 per pad and per dropped token."""
        return self.pads.nbytes + self.hidden.nbytes

    def leaving(self, padding: Tensor | None, seen: int, batch: int) -> Tokens | None:
        """The tokens that this forward's mask hides though they were taken in; None if there are none.

        padding: bool (batch, slots), `seen` of which came before this forward. None says nothing about those, and
        that the new ones are real: so a padded prompt may be followed by tokens without a mask.
        Raises ValueError for a mask that shows a slot again which holds no token. Changes nothing.
        """
        if self.slots != seen:  # another layer of this forward has compared this mask already
            return self._leaving
        if padding is None or not seen or len(padding) != batch:
            return None
        absent = torch.cat([self.pads, self.hidden]) if len(self.hidden) else self.pads
        past = padding[:, :seen]
        item, slot = absent.to(past.device).unbind(1)
        if len(absent) and bool((again := past[item, slot]).any()):
            raise ValueError(
                f"this attention mask shows {_spelled(absent[again.cpu()])}, which an earlier mask hid, so that the "
                f"cache holds no token there: {_WHOLE}"
            )
        if int(past.count_nonzero()) == past.numel() - len(absent):
            return None
        newly = past.logical_not()
        newly[item, slot] = False
        return self._positions(newly.cpu().nonzero(), batch, seen)

    def commit(self, padding: Tensor | None, seen: int, n: int, leaving: Tokens | None) -> None:
        """Take over what the mask of a forward of n slots told, once a layer has followed it."""
        if self.slots != seen:
            return
        self.slots, self._leaving = seen + n, leaving
        if padding is None:
            return
        if leaving is not None:
            newly = padding[:, :seen].logical_not().cpu()
            newly[tuple(torch.cat([self.pads, self.hidden]).unbind(1))] = False
            self.hidden = torch.cat([self.hidden, newly.nonzero()])
        new = padding[:, seen : seen + n]
        if not bool(new.all()):
            self.pads = torch.cat([self.pads, new.logical_not().cpu().nonzero() + torch.tensor([0, seen])])

    def select(self, items: Tensor) -> None:
        """Keep these batch items (b,), repeats allowed, in this order."""
        self.pads, self.hidden = (_selected(absent, items.tolist()) for absent in (self.pads, self.hidden))
        self._leaving = None

    def export(self) -> dict[str, Tensor]:
        """What a saved cache needs of it beside its layers' clocks."""
        return {"pads": self.pads, "hidden": self.hidden}

    def adopt(self, fields: dict[str, Tensor], slots: int) -> None:
        """Continue from what `export` gave of a cache that had seen so many slots."""
        self.reset()
        self.slots, self.pads, self.hidden = slots, fields["pads"], fields["hidden"]

    def _positions(self, newly: Tensor, batch: int, seen: int) -> Tokens:
        """Item and position of the tokens in the slots (e, 2): a row counts what it took in, hidden since or not."""
        taken = torch.ones(batch, seen, dtype=torch.int64)
        taken[tuple(self.pads.unbind(1))] = 0
        item, slot = newly.unbind(1)
        return item, (taken.cumsum(1) - 1)[item, slot]


def _selected(absent: Tensor, items: list[int]) -> Tensor:
    """The slots (e, 2) of these batch items, under the items' new places."""
    parts = [absent[absent[:, 0] == item] for item in items]
    for place, part in enumerate(parts):
        part[:, 0] = place
    return torch.cat([absent[:0], *parts])


def _spelled(absent: Tensor) -> str:
    """The first of these slots (e, 2) in words."""
    item, slot = absent[0].tolist()
    return f"slot {slot} of row {item}" + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
