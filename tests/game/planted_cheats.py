"""Define methods that keep their tokens where no one counts them. Tests copy this file and play its classes by name.

Every state answers with exact attention over its hidden tokens; the cheats differ in the hiding place only. Tokens that
Bob appends to his copies of the state stay in the copy, so that the cheats play every game. `Forgets` and `Oldest` do
not cheat: they are a third party's parts of an eviction method.
"""

import io
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from kvfloor import Method, Partial, State, Traits
from kvfloor.core.policy import Policy
from kvfloor.core.summary import Summary
from kvfloor.methods.variants.tensor import TensorAttention, products

HERE = Path(__file__).parent
GLOBAL_TOKENS: list = []
PADDING_TOKENS: list = []
LYING_TOKENS: list = []
GROWING_TOKENS: list = []
THRESHOLD = 0.3125  # between the two levels of a bit, at relative error 0.5


class Cheat(State):
    """Hide Alice's tokens through `_put`, and get them back through `_all`."""

    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.late_k = torch.zeros(spec.rows, 0, self.key_width, dtype=spec.dtype)
        self.late_v = torch.zeros(spec.rows, 0, self.value_width, dtype=spec.dtype)

    def _put(self, k, v):
        raise NotImplementedError

    def _all(self):
        raise NotImplementedError

    def _append(self, k, v, take):
        if self.sealed:
            self.late_k, self.late_v = torch.cat([self.late_k, k], 1), torch.cat([self.late_v, v], 1)
        else:
            self._put(k.clone(), v.clone())
        self.seen = self.seen + take

    def _read(self, q):
        part = self._over(q, self.late_k, self.late_v)
        tokens = self._all()
        if tokens:
            k, v = (torch.cat(parts, dim=1).expand(len(q), -1, -1) for parts in zip(*tokens, strict=True))
            part = part.merge(self._over(q, k, v))
        return part

    def _over(self, q, k, v):
        return Partial.over(q, k, v, self.spec)


class CheatMethod(Method):
    traits = Traits()
    state: ClassVar[type[Cheat]]

    def open(self, spec):
        return self.state(self, spec)

    def capacity(self, n, prompt=None, pinned=0):
        return 0


class InList(Cheat):
    """Hide tokens in a Python list on the method, which the walk through the state does not visit."""

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
    """Hide tokens in a global, and hold so many idle bytes in the state that no certificate exceeds them."""

    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.idle = torch.zeros(spec.rows, 1 << 17)

    def _put(self, k, v):
        PADDING_TOKENS.append((k, v))

    def _all(self):
        return PADDING_TOKENS


class PairsInGlobal(InGlobal):
    """Hide tokens with two keys and two values each, and answer by the explicit n^2 products."""

    @property
    def key_width(self):
        return 2 * self.spec.d

    @property
    def value_width(self):
        return 2 * self.spec.dv

    def _over(self, q, k, v):
        return Partial.over(q, products(*k.chunk(2, -1)), products(*v.chunk(2, -1)), self.spec)


class InAttribute(Cheat):
    """Hide tokens in a plain list on the state, which is counted but cannot be sent in a message."""

    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.tokens: list = []

    def _put(self, k, v):
        self.tokens.append((k, v))

    def _all(self):
        return self.tokens


class InEnvironment(Cheat):
    """Hide tokens in a variable of the environment that interpreters need."""

    def _put(self, k, v):
        stored = io.BytesIO()
        torch.save([*self._all(), (k, v)], stored)
        os.environ["DYLD_LIBRARY_PATH"] = stored.getvalue().hex()

    def _all(self):
        hidden = os.environ.get("DYLD_LIBRARY_PATH", "")
        return torch.load(io.BytesIO(bytes.fromhex(hidden))) if hidden else []


class InSharedMemory(Cheat):
    """Hide tokens in a block of shared memory, which outlives every process that does not remove it."""

    def _block(self):
        return f"kvfloor-planted-{HERE.name}-{os.getuid()}"

    def _put(self, k, v):
        stored = io.BytesIO()
        torch.save([*self._all(), (k, v)], stored)
        Path("/dev/shm", self._block()).write_bytes(stored.getvalue())

    def _all(self):
        block = Path("/dev/shm", self._block())
        return torch.load(block) if block.exists() else []


class InDaemon(Cheat):
    """Hide tokens in a process of their own, which hands them to whoever asks for them at a socket without a file."""

    address = f"\0kvfloor-planted-{HERE.name}"

    def _asked(self, message):
        with socket.socket(socket.AF_UNIX) as line:
            try:
                line.connect(self.address)
            except ConnectionRefusedError:
                return b""
            line.sendall(message)
            line.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: line.recv(1 << 20), b""))

    def _put(self, k, v):
        stored = io.BytesIO()
        torch.save([*self._all(), (k, v)], stored)
        self._asked(b"end")
        keeper = subprocess.Popen([sys.executable, "-c", KEEPER, self.address[1:]], stdin=subprocess.PIPE)
        assert keeper.stdin is not None
        keeper.stdin.write(stored.getvalue())
        keeper.stdin.close()
        while not self._asked(b"tokens"):
            time.sleep(0.05)

    def _all(self):
        told = self._asked(b"tokens")
        return torch.load(io.BytesIO(told)) if told else []


KEEPER = """
import socket, sys
tokens = sys.stdin.buffer.read()
with socket.socket(socket.AF_UNIX) as line:
    line.bind("\\0" + sys.argv[1])
    line.listen()
    line.settimeout(120)
    while True:
        asker, _ = line.accept()
        with asker:
            if asker.recv(16) == b"end":
                break
            asker.sendall(tokens)
"""


class GuessingSeed(Cheat):
    """Keep the keys alone, and draw the values again from every seed that a player can know."""

    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.k = torch.zeros(spec.rows, 0, spec.d, dtype=spec.dtype)

    def _put(self, k, v):
        self.k = torch.cat([self.k, k], 1)

    def _all(self):
        source = torch.Generator().manual_seed(self.spec.seed)
        bits = torch.randint(0, 2, (*self.k.shape[:2], self.spec.dv), generator=source)
        return [(self.k, bits.to(self.spec.dtype))]


class InText(InGlobal):
    """Hide tokens in the method's text, which a fresh process gets to build the method from."""

    def _put(self, k, v):
        super()._put(k, v)
        stored = io.BytesIO()
        torch.save(GLOBAL_TOKENS, stored)
        object.__setattr__(self.method, "told", stored.getvalue().hex())

    def _all(self):
        told = self.method.told  # type: ignore[attr-defined]
        return torch.load(io.BytesIO(bytes.fromhex(told))) if told else []


class Spying(InGlobal):
    """Report what the fresh process can see, through the text of the error that it returns."""

    def adopt(self, fields):
        raise RuntimeError(f"cwd={os.listdir()} environ={sorted(os.environ)} isolated={sys.flags.isolated}")


def cheating(cls: str, state: type[Cheat]) -> type[CheatMethod]:
    """Make the method class `cls`, which a fresh process finds in this module, for states of this kind."""
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in cls).lstrip("_")
    return dataclass(frozen=True)(type(cls, (CheatMethod,), {"__module__": __name__, "name": name, "state": state}))


HidesInList = cheating("HidesInList", InList)
HidesInGlobal = cheating("HidesInGlobal", InGlobal)
HidesInShared = cheating("HidesInShared", InShared)
HidesInFile = cheating("HidesInFile", InFile)
HidesBehindPadding = cheating("HidesBehindPadding", InGlobalPadded)
HidesInEnvironment = cheating("HidesInEnvironment", InEnvironment)
HidesInAttribute = cheating("HidesInAttribute", InAttribute)
HidesInSharedMemory = cheating("HidesInSharedMemory", InSharedMemory)
HidesInDaemon = cheating("HidesInDaemon", InDaemon)
GuessesSeed = cheating("GuessesSeed", GuessingSeed)
Spies = cheating("Spies", Spying)


@dataclass(frozen=True)
class HidesInText(CheatMethod):
    name: ClassVar[str] = "hides_in_text"
    told: str = ""
    state: ClassVar[type[Cheat]] = InText


class Lying(Cheat):
    """Hide tokens in a global, and answer so that no count of single bits shows it.

    Every bit of just under a tenth of the rows is inverted, and all answers are close to the threshold between the two
    levels, so that they look unsure. The message is idle bytes, four fifths of the floor.
    """

    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.idle = torch.zeros(spec.rows, method.idle, dtype=torch.uint8)

    def _put(self, k, v):
        if not int(self.seen.sum()):
            LYING_TOKENS.clear()
        LYING_TOKENS.append((k, v))

    def _read(self, q):
        k, v = (torch.cat(parts, dim=1) for parts in zip(*LYING_TOKENS, strict=True))
        place = torch.einsum("rmd,rnd->rmn", q, k).argmax(-1)
        inverted = (place < 24).unsqueeze(-1)
        bit = v.gather(1, place.unsqueeze(-1).expand(-1, -1, v.shape[2])) > 0.5
        sign = torch.where(bit ^ inverted, 1.0, -1.0)
        return Partial(THRESHOLD + 0.002 * sign, torch.zeros(place.shape))


@dataclass(frozen=True)
class Lies(CheatMethod):
    name: ClassVar[str] = "lies"
    idle: int = 950
    state: ClassVar[type[Cheat]] = Lying


class Growing(Cheat):
    """Hide tokens in a global, and hold idle bytes: as many bits per number as the method says, 4.5 by default."""

    def __init__(self, method, spec):
        super().__init__(method, spec)
        self.idle = torch.zeros(spec.rows, 0, dtype=torch.uint8)

    def _put(self, k, v):
        if not int(self.seen.sum()):
            GROWING_TOKENS.clear()
        GROWING_TOKENS.append((k, v))
        more = int(k.shape[1] * (k.shape[2] + v.shape[2]) * self.method.bits / 8)  # type: ignore[attr-defined]
        self.idle = torch.cat([self.idle, self.idle.new_zeros(len(k), more)], 1)

    def _all(self):
        return GROWING_TOKENS


@dataclass(frozen=True)
class Grows(CheatMethod):
    name: ClassVar[str] = "grows"
    bits: float = 4.5
    state: ClassVar[type[Cheat]] = Growing


@dataclass(frozen=True)
class HidesPairs(TensorAttention):
    name: ClassVar[str] = "hides_pairs"

    def open(self, spec):
        return PairsInGlobal(self, spec)  # type: ignore[return-value]


@dataclass(frozen=True)
class Forgets(Summary):
    name: ClassVar[str] = "forgets"

    def open(self, spec):
        return None


@dataclass(frozen=True)
class Oldest(Policy):
    name: ClassVar[str] = "oldest"

    def priority(self, held):
        return -held.position
