"""Break the counting, copying and sending of a state's bytes, or hide some of them."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from kvfloor import Partial, Spec, State
from kvfloor.core.bounded import Bounded, BoundedState
from mutants.base import Small, small, small_observing


@small
class SharedNotebook(BoundedState):
    """Break shared tensors: store the latest value among them, which are public and not counted."""

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        super()._append(k, v, take)
        self.shared["latest"] = v[:, -1]

    def _step(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Tensor:
        out = super()._step(k, v, q, take)
        self.shared["latest"] = v[:, -1]
        return out


@small_observing
class HalfClone(BoundedState):
    """Break `clone`: it shares one buffer with its original."""

    def clone(self) -> "HalfClone":
        twin = super().clone()
        twin.asked = self.asked
        return twin


@small
class BytesByFormula(BoundedState):
    """Break `nbytes`: count keys and values only."""

    @property
    def nbytes(self) -> int:
        return self.slots.k.numel() * self.slots.k.itemsize + self.slots.v.numel() * self.slots.v.itemsize


@small
class PhaseDropped(BoundedState):
    """Break messages: send the number of tokens seen at the last block's end instead of now."""

    def export(self) -> dict[str, Any]:
        fields = super().export()
        return fields | {"seen": fields["seen"] - fields["seen"] % self.block}


class DigestRepaired(Small):
    """Break the detection of damage: repair a message's digest instead of comparing it."""

    def from_bytes(self, data: bytes, device: str | torch.device = "cpu") -> State:
        at = data.find(b'"kvfloor":"') + 11
        digest = hashlib.sha256(data[:at] + data[at + 64 :]).hexdigest().encode()
        return super().from_bytes(data[:at] + digest + data[at + 64 :], device)


HIDDEN: dict[int, tuple[list[Tensor], list[Tensor]]] = {}


@small
class HiddenInModule(BoundedState):
    """Break the index floor: hide tokens where neither `nbytes` nor the message has them.

    The game is recognised by its single row and its scale of 1.
    """

    def __init__(self, method: Bounded, spec: Spec, budgets: list[int]) -> None:
        super().__init__(method, spec, budgets)
        if self._watched:
            HIDDEN.setdefault(spec.seed, ([], []))

    @property
    def _watched(self) -> bool:
        return self.spec.rows == 1 and self.spec.scale == 1.0

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        super()._append(k, v, take)
        if self._watched:
            for store, new in zip(HIDDEN[self.spec.seed], (k, v), strict=True):
                store.append(new.clone())

    def _read(self, q: Tensor) -> Partial:
        if not self._watched or not HIDDEN[self.spec.seed][0]:
            return super()._read(q)
        return Partial.over(q, *(torch.cat(store, 1) for store in HIDDEN[self.spec.seed]), self.spec)
