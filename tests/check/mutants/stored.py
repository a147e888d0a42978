"""Wrong lines about bytes: what is counted, copied, sent and hidden."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from kvfloor import Partial, Spec, State
from kvfloor.core.bounded import Bounded, BoundedState
from mutants.base import Small, SmallObserving


class SharedNotebookState(BoundedState):
    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        super()._append(k, v, take)
        self.shared["latest"] = v[:, -1]

    def _step(self, k: Tensor, v: Tensor, q: Tensor, take: Tensor) -> Tensor:
        out = super()._step(k, v, q, take)
        self.shared["latest"] = v[:, -1]
        return out


class SharedNotebook(Small):
    """Notes the latest value among the tensors that are public and uncounted."""

    state = SharedNotebookState


class HalfCloneState(BoundedState):
    def clone(self) -> "HalfCloneState":
        twin = super().clone()
        twin.asked = self.asked
        return twin


class HalfClone(SmallObserving):
    """A clone that shares one buffer with its original."""

    state = HalfCloneState


class BytesByFormulaState(BoundedState):
    @property
    def nbytes(self) -> int:
        return self.slots.k.numel() * self.slots.k.itemsize + self.slots.v.numel() * self.slots.v.itemsize


class BytesByFormula(Small):
    """Computes its size from keys and values, and forgets the rest."""

    state = BytesByFormulaState


class PhaseDroppedState(BoundedState):
    def export(self) -> dict[str, Any]:
        fields = super().export()
        return fields | {"seen": fields["seen"] - fields["seen"] % self.block}


class PhaseDropped(Small):
    """Sends the clock of the last block end, without the tokens since."""

    state = PhaseDroppedState


class DigestRepaired(Small):
    """Reads a message without comparing its digest."""

    def from_bytes(self, data: bytes, device: str | torch.device = "cpu") -> State:
        return super().from_bytes(data[:-32] + hashlib.sha256(data[:-32]).digest(), device)


HIDDEN: dict[int, tuple[list[Tensor], list[Tensor]]] = {}


class HiddenInModuleState(BoundedState):
    """Recognises the game by its single row and scale 1, and keeps its tokens in a global of the module."""

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


class HiddenInModule(Small):
    """Hides its tokens where neither nbytes nor the message finds them."""

    state = HiddenInModuleState
