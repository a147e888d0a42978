"""Methods that keep their tokens where no one counts them. Copied beside the run by the tests and played by name.

Every state answers with exact attention over tokens it put somewhere; only the place differs. `Forgets` is honest: a
third party's part of an eviction method.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from kvfloor import Method, Partial, State, Traits
from kvfloor.summaries.summary import Summary

HERE = Path(__file__).parent
GLOBAL_TOKENS: list = []
PADDING_TOKENS: list = []


class Cheat(State):
    """Keeps nothing itself; `_put` and `_all` are the hiding place."""

    def _put(self, k, v):
        raise NotImplementedError

    def _all(self):
        raise NotImplementedError

    def _append(self, k, v, take):
        self._put(k.clone(), v.clone())
        self.seen = self.seen + take

    def _read(self, q):
        tokens = self._all()
        if not tokens:
            return Partial.empty(*q.shape[:2], dv=self.spec.dv, dtype=q.dtype)
        k, v = (torch.cat(parts, dim=1) for parts in zip(*tokens, strict=True))
        return Partial.over(q, k, v, self.spec)


class CheatMethod(Method):
    traits = Traits()
    state: ClassVar[type[Cheat]]

    def open(self, spec):
        return self.state(self, spec)

    def capacity(self, n, prompt=None, pinned=0):
        return 0


class InList(Cheat):
    """A Python list that hangs on the method, outside the walk of the state."""

    def __init__(self, method, spec):
        super().__init__(method, spec)
        object.__setattr__(method, "_tokens", [])

    def _put(self, k, v):
        self.method._tokens.append((k, v))  # type: ignore[attr-defined]

    def _all(self):
        return self.method._tokens  # type: ignore[attr-defined]


class InGlobal(Cheat):
    def _put(self, k, v):
        GLOBAL_TOKENS.append((k, v))

    def _all(self):
        return GLOBAL_TOKENS


class InShared(Cheat):
    def _put(self, k, v):
        self.shared[f"k{len(self.shared) // 2}"] = k
        self.shared[f"v{len(self.shared) // 2}"] = v

    def _all(self):
        return [(self.shared[f"k{i}"], self.shared[f"v{i}"]) for i in range(len(self.shared) // 2)]


class InFile(Cheat):
    def _put(self, k, v):
        torch.save([*self._all(), (k, v)], HERE / "tokens.pt")

    def _all(self):
        return torch.load(HERE / "tokens.pt") if (HERE / "tokens.pt").exists() else []


class InGlobalPadded(Cheat):
    """A global again, with enough idle bytes in the state that no certificate exceeds them."""

    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.idle = torch.zeros(spec.rows, 1 << 17)

    def _put(self, k, v):
        PADDING_TOKENS.append((k, v))

    def _all(self):
        return PADDING_TOKENS


class InAttribute(Cheat):
    """A plain list on the state: counted, but no message can carry it."""

    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.tokens: list = []

    def _put(self, k, v):
        self.tokens.append((k, v))

    def _all(self):
        return self.tokens


class Spying(InGlobal):
    """Tells, in the only words that come back, what the fresh process can see."""

    def adopt(self, fields):
        raise RuntimeError(f"cwd={os.listdir()} environ={sorted(os.environ)} isolated={sys.flags.isolated}")


@dataclass(frozen=True)
class HidesInList(CheatMethod):
    name: ClassVar[str] = "hides_in_list"
    state = InList


@dataclass(frozen=True)
class HidesInGlobal(CheatMethod):
    name: ClassVar[str] = "hides_in_global"
    state = InGlobal


@dataclass(frozen=True)
class HidesInShared(CheatMethod):
    name: ClassVar[str] = "hides_in_shared"
    state = InShared


@dataclass(frozen=True)
class HidesInFile(CheatMethod):
    name: ClassVar[str] = "hides_in_file"
    state = InFile


@dataclass(frozen=True)
class HidesBehindPadding(CheatMethod):
    name: ClassVar[str] = "hides_behind_padding"
    state = InGlobalPadded


@dataclass(frozen=True)
class HidesInAttribute(CheatMethod):
    name: ClassVar[str] = "hides_in_attribute"
    state = InAttribute


@dataclass(frozen=True)
class Spies(CheatMethod):
    name: ClassVar[str] = "spies"
    state = Spying


@dataclass(frozen=True)
class Forgets(Summary):
    name: ClassVar[str] = "forgets"

    def open(self, spec):
        return None
