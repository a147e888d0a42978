"""Read every token in 8-bit codes, bound the error that the codes cause, and fetch exact tokens where it is too large.

A row is one (batch item, kv head) stream, a slot the place of one held token. In shapes, g is the GQA group (query
heads per kv head), a new tokens, m queries, s slots, d and dv the widths of a key and a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.certify.certified import Certified
from kvfloor.certify.rounding import unit
from kvfloor.core.blocked import Blocked
from kvfloor.core.method import Guarantee, Method, Traits, lossy, part_text
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.core.state import whole
from kvfloor.methods.tiered.cold import PLACES, ExactSlots, exact_slots
from kvfloor.methods.tiered.cold_slots import ColdSlots
from kvfloor.methods.tiered.fetch import CertifiedReader, shaped
from kvfloor.methods.tiered.hot import Hot, logit_rounding
from kvfloor.methods.tiered.hot_store import HotStore
from kvfloor.methods.tiered.plane_reader import PlaneReader
from kvfloor.methods.tiered.tally import Tally
from kvfloor.validation import count, within
from kvfloor.validation import whole as whole_number

_SLOTS = 64
_AT_ONCE = 256  # queries of an exact read at once, as in `exact`
_LARGEST = {torch.float32: 2.0**50, torch.float64: 2.0**500}
"""Numbers of at most this size, squared and summed over channels and tokens, stay finite."""
_LEAST_BITS = 4
_MOST_DELTA = 0.5
_NUMBERS = 1 << 25  # entries of a matrix of queries and tokens at once
_MORE = 8  # times as many are kept while planes are read


@dataclass(frozen=True)
class Tiered(Method):
    """Read all tokens in 8 bits per number and certify each answer, fetching exact tokens until its error is small.

    Every answer differs from exact attention by at most epsilon times the largest norm of a value that the query sees,
    in the Euclidean norm, up to rounding. The theorems are in docs/certificates.md.
    epsilon  the largest error allowed; 0: all tokens are read exactly, and no codes are kept
    page     tokens that are coded together
    first    number of a row's first tokens that are never coded
    recent   least number of a row's newest tokens that have no codes yet, rounded up to whole pages
    extra    bits that half of the keys' channels, those of the wider ranges, have beyond 8: 0 to 8
    planes   True: codes lie in two planes of 4 bits, without extra bits. A query reads the upper plane of all keys, and
             further planes of those tokens alone whose error is too large: fewer bytes, and more work
    keys     bits per number of a coded key, 4 to 8
    values   bits per number of a coded value, 4 to 8
    delta    probability with which the bound of an answer may fail: the codes are dithered, and the less of two bounds
             is taken, one that always holds and one that holds with probability 1 - delta for a query, keys and values
             that do not depend on the dither; 0: no dither, and every bound always holds
    cold     where the exact tokens are kept. device: beside the codes, so the state is larger than that of `exact`, and
             what shrinks is what is read; ram: in the host's memory; disk: in a file that no other program sees
    folder   the folder of that file, for cold=disk; None: the system's folder for temporary files (TMPDIR). It is no
             part of the method: methods that differ only in it are equal, and their text does not have it
    """

    name: ClassVar[str] = "tiered"
    paper: ClassVar[str] = (
        "codes: Liu et al. 2024, KIVI (arXiv 2402.02750); Vargaftik et al. 2022, EDEN (arXiv 2108.08842). "
        "Bounds: docs/certificates.md"
    )
    epsilon: float = 0.02
    page: int = 64
    first: int = 4
    recent: int = 256
    extra: int = 2
    planes: bool = False
    cold: str = "device"
    keys: int = 8
    values: int = 8
    delta: float = 0.0
    folder: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require_epsilon(self.epsilon)
        count("tiered", least=1, page=self.page)
        count("tiered", least=0, first=self.first, recent=self.recent)
        whole_number("extra", self.extra, least=0, most=8)
        if not isinstance(self.planes, bool):
            raise ValueError(f"tiered: planes must be True or False, got {self.planes!r}")
        for name in ("keys", "values"):
            whole_number(f"tiered: {name}", getattr(self, name), least=_LEAST_BITS, most=8)
        within("tiered: delta", self.delta, 0.0, _MOST_DELTA)
        if self.planes and (self.keys, self.values, self.delta) != (8, 8, 0):
            raise ValueError(
                f"tiered: planes cut codes of 8 bits without a dither in two, so planes=True goes with keys=8, "
                f"values=8 and delta=0, got keys={self.keys}, values={self.values}, delta={self.delta}"
            )
        if self.cold not in PLACES:
            raise ValueError(f"tiered: cold must be one of {', '.join(PLACES)}, got {self.cold!r}")
        if self.folder is not None and (self.cold != "disk" or not isinstance(self.folder, str) or not self.folder):
            raise ValueError(f"tiered: folder names a folder as text, with cold=disk alone, got {self.folder!r}")

    @property
    def traits(self) -> Traits:
        traits = Traits(constant_memory=False, pins=True)
        return lossy(traits) if self.epsilon else traits

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.page if self.epsilon else _AT_ONCE

    def open(self, spec: Spec) -> TieredState:
        return TieredState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        del n, prompt, pinned
        return None

    def with_error(self, epsilon: float) -> Tiered:
        return replace(self, epsilon=min(self.epsilon, epsilon))

    def __str__(self) -> str:
        return part_text(self, skip=("folder",))

    def guarantee(self, spec: Spec) -> Guarantee | None:
        norm, source = "2-norm, relative to the largest value norm, up to rounding", "docs/certificates.md"
        if not self.delta or not self.epsilon or spec.softcap is not None:
            return Guarantee(float(self.epsilon), 0.0, norm, "every query", (), source)
        return Guarantee(float(self.epsilon), float(self.delta), norm, OBLIVIOUS, _ASSUMED, source)


OBLIVIOUS = "each query by itself that does not depend on the dither (oblivious)"
_ASSUMED = (
    "the seed is drawn at random and kept from whoever chooses keys, values and queries",
    "keys and values do not depend on the dither",
    "counter-based draws are independent and uniform",
)


class TieredState(Blocked[Tiered]):
    """Keep every token in slots, exactly, and in codes beside them; answer from the codes where these are sure enough.

    slots  the tokens as they were given: in memory, or in numbered blocks outside of it (`Tiered.cold`)
    hot    the codes, and what bounds their errors; None for epsilon = 0
    tally  what the reads so far have fetched; no part of the memory
    """

    def __init__(self, method: Tiered, spec: Spec) -> None:
        slots = exact_slots(spec, _SLOTS, method.page, method.cold, method.folder, streamed=not method.epsilon)
        super().__init__(method, spec, slots, method.block, in_order=True)
        recent, bits = -(-method.recent // method.page) * method.page, (method.keys, method.values)
        extra = 0 if method.planes else method.extra
        store = HotStore(method.first, extra, recent, method.planes, *bits, method.delta > 0, method.page)
        self.hot = Hot(spec, _SLOTS, store, method.page) if method.epsilon else None
        self.tally = Tally()

    @whole
    def read_certified(self, q: Tensor, epsilon: float | None = None) -> Certified:
        """Return attention of q over the remembered tokens, with a bound on each answer's error; change nothing.

        q is (rows, m, d), and the result (rows, m). Or q is (rows, g, m, d), and the result (rows, g, m): then the g
        queries of a token share the exact tokens that one of them fetches.
        epsilon is the largest `relative` bound allowed, by default that of the method. A larger bound is returned only
        for a query that has read every token exactly, and then comes from rounding alone. With epsilon 0, every token
        is read exactly and the answer has the bits of `exact`. Raises ValueError for an epsilon that is negative, not
        finite or no number.
        """
        grouped = isinstance(q, Tensor) and q.ndim == 4
        q = self._checked(q, "q", self.spec.d, axes=4 if grouped else 3, finite=True)
        epsilon = self.method.epsilon if epsilon is None else require_epsilon(epsilon)
        shape = q.shape[:-1]
        if self.hot is None or epsilon == 0:
            found = self._read_exactly(q.flatten(1, -2))
        else:
            found = self._certified(self.hot, q if grouped else q.unsqueeze(1), None, None, epsilon)
        return shaped(found, *shape)

    def _read(self, q: Tensor) -> Partial:
        if self.hot is None:
            return super()._read(q)
        found = self._certified(self.hot, q.unsqueeze(1), None, None, self.method.epsilon)
        return found.partial.shaped(*q.shape[:-1])

    def _read_exactly(self, q: Tensor) -> Certified:
        view = self.slots.view()
        part = view.over(q, self.spec, self._left_unread(q))
        spec, dtype = self.spec, self.spec.compute_dtype
        live = torch.ones_like(view.v[..., 0], dtype=torch.bool) if view.live is None else view.live
        norms = (x.to(dtype).norm(dim=-1) * live for x in (view.k, view.v))
        key, value = (x.amax(1) if x.shape[1] else x.sum(1) for x in norms)
        logit = logit_rounding(q.to(dtype) * spec.scale, key.unsqueeze(1), spec, run=spec.d).squeeze(2)
        # A fused kernel rounds the weights to the cache's dtype.
        rounding = torch.expm1(logit) + unit(dtype) * (view.width + 32) + torch.finfo(spec.dtype).eps
        largest = value.unsqueeze(1).expand_as(rounding)
        self.tally.add(self.seen.new_full(q.shape[:2], 0) + self.held.unsqueeze(1), token_bytes=spec.token_bytes)
        found = Certified(part, 2 * rounding * largest, rounding, largest * (1 - unit(dtype) * (spec.dv + 8)))
        self.tally.note(found)
        return found

    def _among_slots(self, q: Tensor, new_k: Tensor, new_v: Tensor, before: Tensor) -> Partial:
        if self.hot is None:
            return super()._among_slots(q, new_k, new_v, before)
        arrived = torch.arange(q.shape[2])
        last = before.unsqueeze(1) + arrived  # the last slot that a query sees
        real = (last < self.slots.held.unsqueeze(1)).to(q.device)
        hide = None
        if q.shape[2] > 1:  # a single token sees all that its row holds
            hide = (torch.arange(int(self.slots.held.max())) > last.unsqueeze(2)).to(q.device)
        return self._certified(self.hot, q, hide, real, self.method.epsilon).partial

    def _certified(self, hot: Hot, q: Tensor, hide: Tensor | None, real: Tensor | None, epsilon: float) -> Certified:
        """Return certified answers (rows, g, m) to q (rows, g, m, d), as many queries at a time as memory allows.

        hide  bool (rows, m, s), True for slots that the queries do not see; None: they see all held tokens
        real  bool (rows, m), False for padding; None: there is none
        """
        rows, g, m, d = q.shape
        width = int(self.slots.held.max())
        if real is not None:
            q = q.masked_fill(~real[:, None, :, None], 0)  # padding may be anything, NaN too
        assert isinstance(self.slots, ExactSlots)
        planes = hot.coarse is not None
        if planes:
            reader = PlaneReader(self.spec, hot, self.slots, epsilon)
        else:
            reader = CertifiedReader(self.spec, hot, self.slots, epsilon, self.method.delta)
        piece = max(1, _NUMBERS // max(1, rows * width * max(g * (_MORE if planes else 1), d)))
        found, token_bytes = [], self.spec.token_bytes
        for start in range(0, max(1, m), piece):
            at = slice(start, start + piece)
            hidden, some = (None if x is None else x[:, at] for x in (hide, real))
            part, fetched, *beside = reader.read(q[:, :, at], hidden, some)
            self.tally.add(*(x if some is None else x[some] for x in (fetched, *beside)), token_bytes=token_bytes)
            self.tally.note(part, some)
            found.append(part)
        return found[0] if len(found) == 1 else _joined(found)

    def _push(self, k: Tensor, v: Tensor, take: Tensor, bare: Tensor | None = None) -> Tensor:
        if self.hot is not None:
            position = self.seen.unsqueeze(1) + torch.arange(k.shape[1])
            self.hot.codes.push(k, v, position.to(k.device), take)
        return super()._push(k, v, take, bare)

    def _close(self, rows: Tensor | None) -> None:
        if self.hot is not None:
            self.hot.settle(self.seen, rows)

    @property
    def _plainly_read(self) -> bool:
        return self.hot is None

    def _at_once(self, seen: int, left: int) -> int:
        del seen
        return left if self.hot is None else 0

    def _reserve(self, g: int, tokens: int | None) -> None:
        if tokens is None:
            super()._reserve(g, tokens)
            return
        if isinstance(self.slots, ColdSlots):
            raise ValueError(f"{self.method} keeps tokens outside of its memory, which no block of fixed size holds")
        capacity = torch.full_like(self.slots.capacity, tokens)
        self.slots.resize(capacity)
        if self.hot is not None:
            self.hot.codes.resize(capacity)

    def _require_tokens(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        super()._require_tokens(k, v, take)
        if self.hot is not None and int((self.seen + take).max()) > self.hot.codes.longest:
            raise ValueError(f"{self.method} numbers tokens in 32 bits: a stream ends after {self.hot.codes.longest:,}")
        if self.hot is not None:
            for name, x in (("k", k), ("v", v)):
                self._require_summable(name, x, take)
        if isinstance(self.slots, ColdSlots):
            self.slots.reserve_pages(take)

    def _require_summable(self, name: str, x: Tensor, take: Tensor) -> None:
        """Raise ValueError if the first take[r] tokens of row r of x (rows, t, w) have numbers too large to square."""
        most = _LARGEST[self.spec.compute_dtype]
        if torch.finfo(x.dtype).max <= most or not x.numel():
            return
        if max(abs(end.item()) for end in torch.aminmax(x)) > most:
            real = (torch.arange(x.shape[1]) < take.unsqueeze(1)).to(x.device)
            largest = float(x.abs().amax(-1).masked_fill(~real, 0).max())
            if largest > most:
                raise ValueError(
                    f"{name} has a number of size {largest:.3g}: {self.method} sums squares, so give numbers of at "
                    f"most {most:.3g}, or use exact; the state was not changed"
                )

    def _pin(self, start: int, stop: int) -> None:
        """Do nothing for positions start .. stop - 1: no token is ever evicted, so every span is pinned."""

    def _require_forgettable(self, row: Tensor, position: Tensor) -> None:
        """Accept all tokens: the codes' sums keep what is dropped, and remain upper bounds."""

    def _forget(self, row: Tensor, position: Tensor) -> None:
        marked = self.slots.find(row, position)
        if self.hot is not None:
            self.hot.codes.evict(marked)
        self.slots.evict(marked)

    @property
    def bytes_read(self) -> int:
        """Return the bytes that one query per row reads, summed over rows: the codes, and what queries fetch.

        A query is taken to fetch what those before it have fetched on average.
        """
        if self.hot is None:
            return self.slot_bytes_read
        fetched = self.tally.bytes / max(1, self.tally.queries) * self.spec.rows
        return round(self.hot.bytes_read + fetched)

    @property
    def cold_nbytes(self) -> int:
        return self.slots.cold.nbytes if isinstance(self.slots, ColdSlots) else 0

    @property
    def cold_read_bytes(self) -> int:
        """Return the bytes of keys and values that this state and its copies have read from `ram` or `disk` so far."""
        return self.slots.cold.read_bytes if isinstance(self.slots, ColdSlots) else 0

    def require_sound(self, fields: dict[str, Any]) -> None:
        super().require_sound(fields)
        if isinstance(self.slots, ColdSlots):
            self.slots.require_given(fields["slots"], fields["seen"])
        if self.hot is not None:
            self.hot.require_beside(fields["hot"], fields["slots"], fields["seen"])


def require_epsilon(epsilon: Any) -> float:
    """Return epsilon; raise ValueError unless it is a finite number of at least 0."""
    return within("epsilon", epsilon, 0.0, math.inf, high_open=True)


def _joined(parts: list[Certified]) -> Certified:
    mean, mass = (torch.cat([getattr(x.partial, n) for x in parts], 2) for n in ("mean", "log_mass"))
    rest = (torch.cat([getattr(x, n) for x in parts], 2) for n in ("error", "spread", "largest"))
    chances = [x.chance for x in parts if x.chance is not None]
    chance = torch.cat(chances, 2) if len(chances) == len(parts) else None
    return Certified(Partial(mean, mass), *rest, chance=chance, delta=parts[0].delta)
