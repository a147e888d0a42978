"""Track which slots of a cache hold no token to attend to, by comparing the 2-d attention masks of its forwards.

A slot is one column of the padded batch. A mask (batch, slots) covers every slot, those of earlier forwards too. A pad
is a slot that was masked out from the start. It was never stored, so a later mask cannot bring it back. If a later mask
hides a token that was stored, every layer drops this token: generate() appends such tokens (pad tokens) to batch items
that have ended. The masks are compared once per forward, not per layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tokens = tuple[Tensor, Tensor]  # of e tokens: batch item (e,), position among the item's own (e,), int64 on the CPU

_WHOLE = "give the same zeros again, or feed the tokens of these slots with all others to a new cache"


class Presence:
    """Hold two lists of slots for one cache: the pads, and the slots whose tokens a later mask has hidden.

    In each forward, the first layer that computes attention compares the mask with both lists, for all layers.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Remove all entries, as for an empty cache."""
        self.slots = 0
        self.pads = torch.zeros(0, 2, dtype=torch.int64)  # (batch item, slot) of slots never stored
        self.hidden = torch.zeros(0, 2, dtype=torch.int64)  # (batch item, slot) of tokens stored and dropped later
        self._leaving: Tokens | None = None

    @property
    def nbytes(self) -> int:
        """Return the bytes of the lists of pads and of hidden tokens: 16 per entry; every rank has the same lists."""
        return self.pads.nbytes + self.hidden.nbytes

    def leaving(self, padding: Tensor | None, seen: int, batch: int) -> Tokens | None:
        """Return the stored tokens that this forward's mask hides for the first time; None if there are none.

        Returns, for e tokens, (batch item (e,), position (e,) among the item's stored tokens). Changes nothing. Raises
        ValueError if the mask is True for a slot that an earlier mask hid: the cache holds no token there.
        padding: bool (batch, slots), True in slots to attend to; the first `seen` slots are from earlier forwards.
        None: earlier slots stay as they were, and all new slots hold real tokens, as when tokens after a padded prompt
        come without a mask. batch: the number of batch items.
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
        """Record the new pads and newly hidden tokens of a forward of n slots, after a layer has applied the mask.

        padding: bool (batch, slots), True in slots to attend to; the first `seen` slots are from earlier forwards.
        leaving: batch items and positions of the newly hidden tokens, as the method `leaving` returned them, or None.
        Only the first call in a forward has an effect.
        """
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
        """Keep the entries of the batch items `items` (b,), in that order; an item may be repeated."""
        self.pads, self.hidden = (_selected(absent, items.tolist()) for absent in (self.pads, self.hidden))
        self._leaving = None

    def export(self) -> dict[str, Tensor]:
        """Return {"pads", "hidden"}: (batch item, slot) pairs (e, 2), for a saved cache."""
        return {"pads": self.pads, "hidden": self.hidden}

    def adopt(self, fields: dict[str, Tensor], slots: int) -> None:
        """Replace all entries by those of a saved cache, to which `slots` slots were fed.

        fields: {"pads", "hidden"}, tensors of (batch item, slot) pairs (e, 2).
        """
        self.reset()
        self.slots, self.pads, self.hidden = slots, fields["pads"], fields["hidden"]

    def _positions(self, newly: Tensor, batch: int, seen: int) -> Tokens:
        """Convert (batch item, slot) pairs `newly` (e, 2) to batch item (e,) and position (e,) of the tokens there.

        A position counts all tokens that were ever stored for the batch item, also those hidden since, but no pads.
        batch: number of batch items; seen: slots fed so far, which include those in `newly`.
        """
        taken = torch.ones(batch, seen, dtype=torch.int64)
        taken[tuple(self.pads.unbind(1))] = 0
        item, slot = newly.unbind(1)
        return item, (taken.cumsum(1) - 1)[item, slot]


def _selected(absent: Tensor, items: list[int]) -> Tensor:
    """Return those of the (batch item, slot) pairs `absent` (e, 2) whose batch item is in `items`: (f, 2).

    A pair's batch item is replaced by its index in `items`. An item that is in `items` twice has its pairs twice.
    """
    parts = [absent[absent[:, 0] == item] for item in items]
    for place, part in enumerate(parts):
        part[:, 0] = place
    return torch.cat([absent[:0], *parts])


def _spelled(absent: Tensor) -> str:
    """Return text for an error: the first of the (batch item, slot) pairs `absent` (e, 2), and the number of others."""
    item, slot = absent[0].tolist()
    return f"slot {slot} of row {item}" + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
