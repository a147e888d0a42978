"""Wrong lines about bytes: what is counted, copied, sent and hidden."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from kvfloor import Partial, Spec, State
from kvfloor.core.bounded import Bounded, BoundedState
from mutants.base import Small, small, small_observing


@small
class SharedNotebook(BoundedState):
    """Notes the latest value among the tensors that are public and uncounted."""

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        super()._append(k, v, take)
        self.shared["latest"] = v[:, -1]

    def _step(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Tensor:
        out = super()._step(k, v, q, take)
        self.shared["latest"] = v[:, -1]
        return out


@small_observing
class HalfClone(BoundedState):
    """A clone that shares one buffer with its original."""

    def clone(self) -> "HalfClone":
        twin = super().clone()
        twin.asked = self.asked
        return twin


@small
class BytesByFormula(BoundedState):
    """Computes its size from keys and values, and forgets the rest."""

    @property
    def nbytes(self) -> int:
        return self.slots.k.numel() * self.slots.k.itemsize + self.slots.v.numel() * self.slots.v.itemsize


@small
class PhaseDropped(BoundedState):
    """Sends the clock of the last block end, without the tokens since."""

    def export(self) -> dict[str, Any]:
        fields = super().export()
        return fields | {"seen": fields["seen"] - fields["seen"] % self.block}


class DigestRepaired(Small):
    """Reads a message without comparing its digest."""

    def from_bytes(self, data: bytes, device: str | torch.device = "cpu") -> State:
        at = data.find(b'"kvfloor":"') + 11
        digest = hashlib.sha256(data[:at] + data[at + 64 :]).hexdigest().encode()
        return super().from_bytes(data[:at] + digest + data[at + 64 :], device)


HIDDEN: dict[int, tuple[list[Tensor], list[Tensor]]] = {}


@small
class HiddenInModule(BoundedState):
    """Hides its tokens where neither nbytes nor the message finds them."""

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
