"""The public half of the game: everything that Alice and Bob agree on before any value is hidden."""

import dataclasses
import hashlib
import math
import secrets

import torch
from torch import Tensor

from kvfloor.barriers.decode import leak_ratio
from kvfloor.barriers.gaps import best_family, one_sided_gaps
from kvfloor.barriers.keys import FAMILIES, jl_dimension
from kvfloor.floors.domain import relative_error, whole
from kvfloor.floors.spike import spike_C
from kvfloor.method import Spec

MOST_BITS = 16
_LENGTH_STEP = 64.0  # query lengths are rounded up to 1/64, so that float noise in a gap cannot change a query


def derived_seed(purpose: str, seed: int | str) -> int:
    """63 bits of SHA-256 over "kvfloor/barriers/v1/PURPOSE/SEED": streams for different purposes are unrelated."""
    digest = hashlib.sha256(f"kvfloor/barriers/v1/{purpose}/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclasses.dataclass(frozen=True)
class Instance:
    """A spike instance: n public keys in d dimensions, rows of dv values of `bits` bits, answered within 1±eta.

    key_seed and method_seed are public and derive from the run's seed by `derived_seed`; neither tells the run's seed
    nor the hidden values.
    """

    n: int
    d: int
    dv: int
    bits: int
    eta: float
    family: str
    key_seed: int
    method_seed: int

    @classmethod
    def agree(cls, n: int, d: int, dv: int | None, bits: int, eta: float, seed: int, family: str | None) -> "Instance":
        """An instance from a user's arguments; ValueError names the one that is out of its domain."""
        n, d = whole("n", n), whole("d", d)
        dv = d if dv is None else whole("dv", dv)
        if whole("bits", bits) > MOST_BITS:
            raise ValueError(f"bits must lie in 1..{MOST_BITS}, got {bits}")
        key_seed = derived_seed("keys", seed)
        if family is None:
            family = best_family(n, d, key_seed)
        elif family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
        return cls(n, d, dv, bits, relative_error(eta), family, key_seed, derived_seed("method", seed))

    @property
    def hidden_bits(self) -> int:
        """Bits that Alice hides in the values."""
        return self.n * self.dv * self.bits

    def spec(self) -> Spec:
        """What the method is opened for: one row, the papers' scale 1."""
        return Spec(rows=1, d=self.d, dv=self.dv, scale=1.0, seed=self.method_seed)

    def keys(self) -> Tensor:
        """The public keys (n, d), float32."""
        return FAMILIES[self.family](self.n, self.d, self.key_seed).float()

    def queries(self, keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One spike query per row (m, d), float32, and the rows' one-sided gaps (m,).

        q = C_i k_i / scale with the row's own gap, no token of logit 0 (Bob asks without appending).
        Raises ValueError where a key does not stand out from the others.
        """
        gaps = one_sided_gaps(keys, rows)
        if not bool((gaps > 0.0).all()):
            needs = f"; its theorem needs d >= {jl_dimension(self.n)}" if self.family == "jl" else ""
            raise ValueError(
                f"family {self.family!r} has keys that no query singles out at n={self.n}, d={self.d} "
                f"(worst gap {gaps.min().item():.3g}){needs}; leave the family out to get the best one"
            )
        ratio = leak_ratio(self.bits, self.eta)
        norms = keys[rows].double().square().sum(dim=1)
        lengths = [
            math.ceil(_LENGTH_STEP * spike_C(self.n, 0, min(gap, norm), norm, ratio)) / _LENGTH_STEP
            for gap, norm in zip(gaps.tolist(), norms.tolist(), strict=True)
        ]
        scaled = torch.tensor(lengths, dtype=torch.float64) / self.spec().scale
        return (keys[rows].double() * scaled.unsqueeze(1)).float(), gaps


class Hidden:
    """The private half: values and sampled rows that neither the method nor Bob's process is ever given the source of.

    Both come from SHAKE-256 over a domain-separated string with `seed`; by default 128 fresh bits from the operating
    system. A given seed repeats a run; the method is shown neither it nor anything that it derives from.
    """

    def __init__(self, seed: int | str | None = None) -> None:
        self.seed = secrets.token_hex(16) if seed is None else str(seed)

    def levels(self, instance: Instance) -> Tensor:
        """The hidden levels (n, dv), int64, independent and uniform in [0, 2^bits)."""
        size = instance.n * instance.dv
        words = torch.frombuffer(bytearray(self._stream("values", 2 * size)), dtype=torch.int16)
        return (words.long() & (2**instance.bits - 1)).view(instance.n, instance.dv)

    def rows(self, n: int, count: int) -> Tensor:
        """`count` rows (count,), int64, drawn uniformly from n with replacement. Call it once the message is fixed."""
        words = torch.frombuffer(bytearray(self._stream("rows", 8 * count)), dtype=torch.int64)
        return (words & (2**63 - 1)) % n

    def _stream(self, purpose: str, size_bytes: int) -> bytes:
        return hashlib.shake_256(f"kvfloor/barriers/v1/hidden {purpose}/{self.seed}".encode()).digest(size_bytes)
