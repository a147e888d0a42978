"""Track the slots of a cache without a token to attend to, from the masks of its forwards: pads and hidden tokens.

A 2-d mask covers every slot, those of earlier forwards too. A pad was never taken in, so it cannot be shown later. A
token that was taken in and is hidden by a later mask, such as the tokens that `generate()` appends to an ended row, is
dropped by every layer. A mask that repeats known pads costs one count of its entries per forward, not per layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tokens = tuple[Tensor, Tensor]  # batch item (e,) and position among the item's own tokens (e,), int64 on the CPU

_WHOLE = "give the same zeros again, or feed the tokens of these slots with all others to a new cache"


class Presence:
    """Hold the pads and hidden slots of one cache; the first layer to answer a forward compares its mask with them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything: the cache is empty."""
        self.slots = 0
        self.pads = torch.zeros(0, 2, dtype=torch.int64)  # (batch item, slot) of slots never taken in
        self.hidden = torch.zeros(0, 2, dtype=torch.int64)  # (batch item, slot) of tokens taken in and dropped
        self._leaving: Tokens | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes of the lists: 16 per pad and per dropped token."""
        return self.pads.nbytes + self.hidden.nbytes

    def leaving(self, padding: Tensor | None, seen: int, batch: int) -> Tokens | None:
        """Return the tokens that this forward's mask hides though they were taken in; None if there are none.

        padding: bool (batch, slots), `seen` of which came before this forward. None leaves the earlier slots as they
        were, with all new ones real: so a padded prompt may be followed by tokens without a mask.
        Raises ValueError for a mask that shows a slot again that holds no token. Changes nothing.
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
        """Record the pads and hidden tokens in the mask of a forward of n slots, once a layer has followed it."""
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
        """Return the tensors that a saved cache needs beside its layers' clocks."""
        return {"pads": self.pads, "hidden": self.hidden}

    def adopt(self, fields: dict[str, Tensor], slots: int) -> None:
        """Continue from the tensors that `export` returned for a cache that had seen `slots` slots."""
        self.reset()
        self.slots, self.pads, self.hidden = slots, fields["pads"], fields["hidden"]

    def _positions(self, newly: Tensor, batch: int, seen: int) -> Tokens:
        """Return item and position of the tokens in these slots (e, 2).

        A row counts all tokens that it took in, hidden since or not.
        """
        taken = torch.ones(batch, seen, dtype=torch.int64)
        taken[tuple(self.pads.unbind(1))] = 0
        item, slot = newly.unbind(1)
        return item, (taken.cumsum(1) - 1)[item, slot]


def _selected(absent: Tensor, items: list[int]) -> Tensor:
    """Return the slots (e, 2) of these batch items, under the items' new places."""
    parts = [absent[absent[:, 0] == item] for item in items]
    for place, part in enumerate(parts):
        part[:, 0] = place
    return torch.cat([absent[:0], *parts])


def _spelled(absent: Tensor) -> str:
    """Describe the first of these slots (e, 2) in words."""
    item, slot = absent[0].tolist()
    return f"slot {slot} of row {item}" + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
