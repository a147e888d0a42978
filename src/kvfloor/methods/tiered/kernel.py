"""Answer few queries from the codes of `tiered`, with bounds, in compiled C where the system has a C compiler.

`Glimpse.answer` defines this attention in torch. The kernel's answers and bounds differ from it by rounding, in which
tokens are bounded one by one, and in that the values of tokens of little weight are not read; its bounds hold by
themselves (docs/certificates.md). For queries whose bounds are too large it fetches the tokens that widen them most
and answers again: by itself where these lie in memory as they were given (`Near`), else it names them and is given
them. In shapes, r are rows, i.e. (batch item, kv head) streams, m queries, s slots of a row, d and dv the widths of a
key and a value, a sets of queries, c fetched tokens of a set.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfloor.certify.certified import Certified
from kvfloor.certify.rounding import unit
from kvfloor.core.partial import Partial
from kvfloor.core.slots import Slots
from kvfloor.methods.stores import fused
from kvfloor.methods.stores.codes import ChannelCodes
from kvfloor.methods.stores.loud import LoudChannels
from kvfloor.methods.stores.stepped_tokens import SteppedTokens
from kvfloor.methods.stores.turn import matrix
from kvfloor.methods.tiered import kernel_library
from kvfloor.methods.tiered.cold_slots import ColdSlots

if TYPE_CHECKING:
    from kvfloor.methods.tiered.hot import Hot

MOST_QUERIES = 8
"""Most queries of a row for which the kernel is used."""

MOST_FETCHED = 128
"""Most tokens that a set of queries fetches at once."""

SHARE = 0.5
"""How much of a query's mass is left unread, as a share of epsilon minus about what the codes take of it."""

_BITS = 8
_TILE = 32  # the kernel reads so many tokens of a page at a time
_WIDEST = 256
_NONE = torch.zeros(0, 0, dtype=torch.uint8)
_NEAR = (torch.float32, torch.bfloat16)  # of the tokens that the kernel fetches itself
_INTEGERS = (
    *("rows", "m", "d", "dv", "first", "group", "ring", "extra", "fine_words", "slots", "groups", "longest_row"),
    *("positions", "halves"),
)
_NUMBERS = ("scale", "softcap", "gram_rounding", "epsilon", "share")
_RESULTS = ("log_mass", "error", "spread", "largest", "unread")
_ARRAYS = (
    *("q", "offset", "count", "coded", "hide"),
    *("key_packed", "key_fine", "low", "high", "loud", "span"),
    *("value_packed", "value_widest", "radius"),
    *("fresh_k", "fresh_v", "key_gram", "excess", "reach", "longest", "operator", "turn"),
    *("mean", *_RESULTS, "kept"),
    *("idle", "near", "near_k", "near_v", "fetched"),
)
_NOTHING_NEAR: dict[str, Any] = {"positions": 0, "halves": 0} | dict.fromkeys(_ARRAYS[-5:])


class _Given(ctypes.Structure):
    """Lay out what the kernel is given, as `struct given` of native/given.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
    ]


class _Fetch(ctypes.Structure):
    """Lay out sets of queries and their tokens, as `struct fetch` of native/fetch.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "positions", "room")),
        *((name, ctypes.c_void_p) for name in ("row", "position", "token", "found", "k", "v")),
    ]


@lru_cache(maxsize=1)
def installed() -> bool:
    """Return True if there is a compiled kernel that takes what this module gives; compile it if it is missing."""
    library = kernel_library.library()
    return library is not None and library.size_of_given() == ctypes.sizeof(_Given)


def serves(hot: Hot) -> bool:
    """Return True if the kernel can read this tier: on a CPU, in float32, without dither, and if no token was dropped.

    Pages must be whole tiles; keys at most 256 numbers, and a multiple of 32, as the bits beyond 8 of a key must be;
    values a multiple of 64.
    """
    codes, spec = hot.codes, hot.spec
    if spec.device_type != "cpu" or spec.compute_dtype != torch.float32 or spec.tied:
        return False
    keys, values = codes.key_codes, codes.value_codes
    if spec.d % 32 or spec.d > _WIDEST or spec.dv % 64 or not codes.ordered:
        return False
    if keys.bits != _BITS or not isinstance(values, SteppedTokens) or values.bits != _BITS:
        return False
    if keys.dithered or values.dithered:
        return False
    if isinstance(keys, LoudChannels) and (keys.extra not in (1, 2, 4) or keys.fine.shape[1] % 4):
        return False
    return isinstance(keys, LoudChannels | ChannelCodes) and codes.group % _TILE == 0 and installed()


def read(hot: Hot, q: Tensor, hide: Tensor | None, epsilon: float = 0.0) -> Certified:
    """Return certified answers (r, m) to q (r, m, d) from the codes of a tier that the kernel serves, not rotated.

    hide     bool (r, m, s), True for tokens that the queries do not see; None: they see all that their row holds
    epsilon  the largest error wanted, relative to the largest norm of a value. Values of tokens of little weight stay
             unread as long as the bound is not above it; with 0, all that have weight are read
    """
    given = arguments(hot, q, hide, epsilon)
    run(given, int(hot.codes.held.sum()))
    return found(given)


@dataclass(frozen=True)
class Near:
    """Say where tokens lie as they were given, in memory that the kernel reads.

    slots    the tokens, in the same slots as their codes
    skip     bool (r, positions), True for sets of queries that fetch nothing. A row's set at a position are its queries
             whose index modulo the number of positions is that position
    fetched  (r, positions) how many tokens were fetched for a set; the kernel adds to it
    """

    slots: Slots
    skip: Tensor
    fetched: Tensor

    @classmethod
    def reached(cls, slots: Slots, skip: Tensor, fetched: Tensor) -> Near | None:
        """Return where the tokens are; None if they are not in flat float32 or bfloat16 tensors on the CPU."""
        if isinstance(slots, ColdSlots) or slots.k.device.type != "cpu" or slots.k.dtype not in _NEAR:
            return None
        return cls(slots, skip, fetched)

    def arguments(self) -> dict[str, Any]:
        """Return the entries of `struct given` of native/given.h by name."""
        k, v = self.slots.k, self.slots.v
        assert k.is_contiguous() and v.is_contiguous() and self.fetched.is_contiguous()
        return {
            "positions": self.skip.shape[1],
            "halves": int(k.dtype == torch.bfloat16),
            "idle": self.skip,
            "near": self.slots.offset,
            "near_k": k,
            "near_v": v,
            "fetched": self.fetched,
        }


class RefinedReading:
    """Answer queries as `read` does, then once more with tokens as they were given, as often as it helps.

    Use it in a `with` statement: it holds what the kernel knows of the rows that have unsure queries.
    near  where the tokens lie as they were given, and which queries fetch none: the kernel then fetches what it wants
          itself, and holds only the rows that no token makes sure; None: it fetches nothing itself
    """

    def __init__(self, hot: Hot, q: Tensor, hide: Tensor | None, epsilon: float, near: Near | None = None) -> None:
        self._given = arguments(hot, q, hide, epsilon)
        self._given["kept"] = torch.zeros(len(q), dtype=torch.int64)
        if near is not None:
            self._given |= near.arguments()
        self._slots = int(hot.codes.held.sum())
        self._packed, self._tensors = packed(self._given)

    def __enter__(self) -> RefinedReading:
        try:
            certify(self._packed, len(self._given["kept"]), self._slots)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        _library().release(ctypes.byref(self._packed))

    def found(self) -> Certified:
        """Return the answers (r, m) of now: a later call of `refine` may change them."""
        return found(self._given)

    @property
    def settled(self) -> bool:
        """Return True if no row has an unsure query."""
        return not bool(self._given["kept"].any())

    def unsure(self, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sets of queries that have an unsure one, as rows (a,) and positions (a,).

        skip  bool (r, positions), True for sets that are left out. A row's set at a position are its queries whose
              index modulo the number of positions is that position
        """
        row, position = (torch.empty(skip.numel(), dtype=torch.int64) for _ in range(2))
        pointers = (x.data_ptr() for x in (skip, row, position))
        count = _library().unsure(ctypes.byref(self._packed), skip.shape[1], *pointers)
        return row[:count], position[:count]

    def wanted(self, row: Tensor, position: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Return the tokens (a, c) that widen the bounds of unsure queries most, and how many there are (a,).

        row, position  (a,) sets that `unsure` returned
        """
        token, many = torch.zeros(len(row), MOST_FETCHED, dtype=torch.int64), torch.zeros(len(row), dtype=torch.int64)
        self._call("want", positions, (row, position, token, many))
        return token[:, : int(many.max())].contiguous(), many

    def refine(self, row: Tensor, position: Tensor, positions: int, fetched: tuple[Tensor, ...]) -> None:
        """Answer the sets' unsure queries again, with some tokens read as they were given.

        fetched  what `wanted` returned, and these tokens' keys (a, c, d) and values (a, c, dv)
        """
        token, many, k, v = fetched
        assert k.shape[:2] == v.shape[:2] == token.shape
        self._call("refine", positions, (row, position, token, many, k.float().contiguous(), v.float().contiguous()))

    def _call(self, name: str, positions: int, tensors: tuple[Tensor, ...]) -> None:
        row, position, token, *rest = tensors
        row, position = row.contiguous(), position.contiguous()
        pointers = (x.data_ptr() for x in (row, position, token, *rest))
        names = ("row", "position", "token", "found", "k", "v")
        fetch = _Fetch(len(row), positions, token.shape[1], **dict(zip(names, pointers, strict=False)))
        getattr(_library(), name)(ctypes.byref(self._packed), ctypes.byref(fetch))


def arguments(hot: Hot, q: Tensor, hide: Tensor | None, epsilon: float) -> dict[str, Any]:
    """Return the entries of `struct given` of native/given.h by name: numbers, and tensors; None: no array."""
    codes, spec = hot.codes, hot.spec
    keys, values = codes.key_codes, codes.value_codes
    assert isinstance(keys, LoudChannels | ChannelCodes) and isinstance(values, SteppedTokens)
    (rows, m), extra, fine, loud = q.shape[:2], 0, _NONE, None
    assert m <= MOST_QUERIES
    if isinstance(keys, LoudChannels):
        extra, fine, loud = keys.extra, keys.fine, keys.loud
    longest_row = int(codes.coded.max()) if rows else 0
    radius: Tensor = codes.columns.radius  # type: ignore[attr-defined]
    return {
        "rows": rows,
        "m": m,
        "d": spec.d,
        "dv": spec.dv,
        "first": codes.first,
        "group": codes.group,
        "ring": codes.ring,
        "extra": extra,
        "fine_words": fine.shape[1] // 4,
        "groups": keys.low.shape[1],
        "slots": 0 if hide is None else hide.shape[2],
        "longest_row": longest_row,
        "scale": float(spec.scale),
        "softcap": float(spec.softcap or 0.0),
        "epsilon": float(epsilon),
        "share": SHARE,
        "gram_rounding": unit(spec.compute_dtype) * (2 * spec.d + codes.group + longest_row // codes.group + 32),
        "q": q.to(torch.float32),
        "offset": codes.offset,
        "count": codes.held,
        "coded": codes.coded,
        "hide": hide,
        "key_packed": keys.packed,
        "key_fine": fine,
        "low": keys.low,
        "high": keys.high,
        "loud": loud,
        "span": keys.range,
        "value_packed": values.packed,
        "value_widest": values.widest.view(torch.int16),
        "radius": radius.view(torch.int16),
        "fresh_k": codes.fresh_k.to(torch.float32),
        "fresh_v": codes.fresh_v.to(torch.float32),
        "key_gram": hot.key_gram,
        "excess": hot.excess,
        "reach": hot.reach,
        "longest": hot.longest,
        "operator": hot.operator,
        "turn": matrix(spec.dv, torch.float64, "cpu"),
        "mean": torch.empty(rows, m, spec.dv, dtype=torch.float32),
        **{name: torch.empty(rows, m, dtype=torch.float32) for name in _RESULTS},
        "kept": None,
        **_NOTHING_NEAR,
    }


def run(given: dict[str, Any], slots: int) -> None:
    """Let the kernel fill the arrays at the end of `given`; slots: how many it reads, for the number of threads."""
    structure, tensors = packed(given)
    certify(structure, given["rows"], slots)
    del tensors


def packed(given: dict[str, Any]) -> tuple[_Given, list[Tensor | None]]:
    """Return what the kernel takes, and the tensors whose addresses it has: they must outlive it."""
    tensors = [None if given[name] is None else given[name].contiguous() for name in _ARRAYS]
    addresses = (None if x is None else x.data_ptr() for x in tensors)
    return _Given(*(given[name] for name in _INTEGERS + _NUMBERS), *addresses), tensors


def certify(structure: _Given, rows: int, slots: int) -> None:
    """Let the kernel answer all rows, on as many threads as `slots` are worth."""
    failed, library = [], _library()

    def answer(begin: int, stop: int) -> None:
        if library.certify(begin, stop, ctypes.byref(structure)):
            failed.append(begin)

    fused.shared(answer, rows, slots, ())
    if failed:
        raise MemoryError("the kernel of certified reads found no memory for the logits of a row")


def _library() -> ctypes.CDLL:
    library = kernel_library.library()
    assert library is not None
    return library


def found(given: dict[str, Any]) -> Certified:
    """Return the answers that the kernel wrote to the arrays of `given`."""
    log_mass, *bounds = (given[name] for name in _RESULTS[:-1])
    return Certified(Partial(given["mean"], log_mass), *bounds)
