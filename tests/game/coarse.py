"""Define an honest method that answers as coarsely as the game allows: it stores which answer serves each value."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvfloor import Method, Partial, State, Traits
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.keys.families import FAMILIES


@dataclass(frozen=True)
class Coarse(Method):
    """Cut the levels, from the top one down, into runs that one answer serves, and store the run of each value.

    All values but those of the longest run are stored: as the gap to the one before, a byte (255 for a gap that goes
    on), and the run, a byte. So few bytes suffice where nearly all values are in one run. Keys are public.
    """

    name: ClassVar[str] = "coarse"
    family: str
    n: int
    key_seed: int
    bits: int
    eta: float
    traits: ClassVar[Traits] = Traits(lossy_values=True)  # type: ignore[misc]

    def open(self, spec):
        return CoarseState(self, spec)

    def capacity(self, n, prompt=None, pinned=0):
        return 0

    def runs(self):
        """Return the answers, one per run, and the lowest level of each run; the first run holds the top level."""
        top, leak, eta = 2**self.bits - 1, leak_ratio(self.bits, self.eta), self.eta
        answers, lowest, level = [], [], top
        while level >= 0:
            answer = (1.0 - eta) * (1.0 - leak) * level / top  # the least that serves this level
            least = max(0.0, top * (answer / (1.0 + eta) - leak) / (1.0 - leak))
            answers.append(answer)
            lowest.append(-int(-least // 1))
            level = lowest[-1] - 1
        return torch.tensor(answers), torch.tensor(lowest)


class CoarseState(State):
    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.shared["keys"] = FAMILIES[method.family](method.n, spec.d, method.key_seed).to(spec.dtype)
        self.coded = torch.zeros(0, dtype=torch.uint8)

    def _append(self, k, v, take):
        if bool(self.seen.any()):
            raise ValueError("coarse takes all tokens at once")
        _, lowest = self.method.runs()
        levels = (v.double() * (2**self.method.bits - 1)).round().long().flatten()
        run = (levels.unsqueeze(1) < lowest).sum(1)
        coded, last = [], -1
        for place in (run > 0).nonzero()[:, 0].tolist():
            gap, last = place - last - 1, place
            coded += [255] * (gap // 255) + [gap % 255, int(run[place])]
        self.coded = torch.tensor(coded, dtype=torch.uint8)
        self.seen = self.seen + take

    def _read(self, q):
        answers, _ = self.method.runs()
        run = torch.zeros(int(self.seen[0]) * self.spec.dv, dtype=torch.int64)
        place, codes = 0, iter(self.coded.tolist())
        for gap in codes:
            place += gap
            if gap < 255:
                run[place] = next(codes)
                place += 1
        nearest = torch.einsum("rmd,nd->rmn", q, self.shared["keys"]).argmax(-1)
        mean = answers[run].view(-1, self.spec.dv)[nearest]
        return Partial(mean.float(), torch.zeros(nearest.shape))
