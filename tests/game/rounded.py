"""Define a planted method that knows the public keys and keeps only the leading bits of each hidden level."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfloor import Method, Partial, State, Traits
from kvfloor.game.engine.level_answers import LevelTable
from kvfloor.game.keys.families import FAMILIES


@dataclass(frozen=True)
class Rounded(Method):
    """Keep the `kept` leading bits of 8 of each level of the format `values` at error `eta`, packed."""

    name: ClassVar[str] = "rounded"
    family: str
    n: int
    key_seed: int
    kept: int
    values: str
    eta: float
    traits: ClassVar[Traits] = Traits(lossy_values=True)  # type: ignore[misc]

    def open(self, spec):
        return RoundedState(self, spec)

    def capacity(self, n, prompt=None, pinned=0):
        return 0


class RoundedState(State):
    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.shared["keys"] = FAMILIES[method.family](method.n, spec.d, method.key_seed).to(spec.dtype)
        self.shared["numbers"] = LevelTable(method.values, method.eta).numbers
        self.coded = torch.zeros(0, dtype=torch.uint8)

    def _append(self, k, v, take):
        if bool(self.seen.any()):
            raise ValueError("rounded takes all tokens at once")
        levels = torch.searchsorted(self.shared["numbers"], v.double().contiguous()).flatten()
        codes = levels >> (8 - self.method.kept)
        bits = (codes.unsqueeze(1) >> torch.arange(self.method.kept)) & 1
        padded = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
        self.coded = (padded << torch.arange(8)).sum(1).to(torch.uint8)
        self.seen = self.seen + take

    def _read(self, q):
        kept, seen = self.method.kept, int(self.seen[0])
        bits = ((self.coded.long().unsqueeze(1) >> torch.arange(8)) & 1).flatten()[: seen * self.spec.dv * kept]
        codes = (bits.view(-1, kept) << torch.arange(kept)).sum(1)
        middle = (codes << (8 - kept)) + (2 ** (8 - kept)) // 2
        numbers = self.shared["numbers"]
        values = numbers[middle.clamp_max(len(numbers) - 1)].view(1, seen, self.spec.dv).to(self.spec.dtype)
        return Partial.over(q, self.shared["keys"][None, :seen], values, self.spec)
