"""Compute attention over packed codes in place, where numba is installed: `pip install "kvfloor[fast]"`.

`CodedView.over` defines this attention in torch; answers agree up to rounding. The kernel only gives answers: what
decides on evictions, and what enters a state, never comes from it. Uncoded tokens are added to the result by the kernel
too. Arrays of the slots' tensors are made once and kept until a tensor is replaced.
A row is one (batch item, kv head) stream, a slot the place of one held token. In shapes, r are rows, m queries of each,
s slots, d and dv the widths of a key and a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from operator import is_
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.codes import ChannelCodes, SlotCodes, TokenCodes
from kvfloor.methods.stores.levels import levels
from kvfloor.methods.stores.turn import matrix, transposed

if TYPE_CHECKING:
    from kvfloor.methods.stores.coded import CodedSlots, CodedView

MOST_QUERIES = 8
"""Most queries of a row for which the kernel is used: with more, unpacking the codes once for all of them is cheap."""

_SHARED = 16384
"""Least number of slots to read for which work is split among threads."""


_NONE = np.zeros((0, 0, 0), np.float32)
_NOTHING = _NONE.astype(np.bool_)


@lru_cache(maxsize=1)
def installed() -> bool:
    """Return True if numba is there."""
    return find_spec("numba") is not None


def serves(slots: CodedSlots) -> bool:
    """Return True if the kernel can read these slots: on a CPU, float32 attention, values beside the keys, and numba.

    Values must be coded in rotated form. Keys that are coded per channel must be in their order, in groups of whole
    tiles, and have ranges of 8 bits.
    """
    keys, spec = slots.key_codes, slots.spec
    if spec.device_type != "cpu" or spec.compute_dtype != torch.float32 or spec.tied or not installed():
        return False
    if not isinstance(slots.value_codes, TokenCodes):
        return False
    if isinstance(keys, ChannelCodes):
        return slots.ordered and slots.group % _kernels().TILE == 0
    return isinstance(keys, TokenCodes)


def _kernels() -> Any:
    """Return the module of the kernel. Its first import on a machine compiles it, which takes a while."""
    from kvfloor.methods.stores import fused_numba

    return fused_numba


def attention(view: CodedView, q: Tensor, spec: Spec, hide: Tensor | None) -> Partial:
    """Compute attention of q (r, m, d) over the slots of a view that the kernel serves: a `Partial` (r, m).

    hide: as in `View.over`.
    """
    slots, (r, m), q = view.owner, q.shape[:2], q.to(torch.float32).contiguous()
    known, (out, log_mass, seen) = _known(slots), _over_codes(view, q, spec, hide)
    mean = torch.mm(torch.from_numpy(out).view(r * m, spec.dv), matrix(spec.dv, q.dtype, "cpu")).view(r, m, spec.dv)
    rows = known.rows if view.rows is None else view.rows.numpy()
    given = known.given or tuple(x.to(q.dtype).numpy() for x in (slots.fresh_k, slots.fresh_v))
    law = (float(spec.scale), float(spec.softcap or 0.0))
    _kernels().add_given(q.numpy(), *law, rows, *given, seen, mean.numpy(), log_mass)
    return Partial(mean, torch.from_numpy(log_mass))


def over_codes(view: CodedView, q: Tensor, spec: Spec, hide: Tensor | None) -> tuple[Partial, Tensor]:
    """Compute attention of q (r, m, d), float32, over the coded tokens alone, whose values stay rotated.

    Returns a `Partial` (r, m), and a mask (r, m, first + ring), True for the uncoded tokens that a query sees.
    """
    out, log_mass, seen = (torch.from_numpy(x) for x in _over_codes(view, q.contiguous(), spec, hide))
    return Partial(out, log_mass), seen.bool()


def _over_codes(view: CodedView, q: Tensor, spec: Spec, hide: Tensor | None) -> tuple[Any, Any, Any]:
    """Do the work of `over_codes` for contiguous q; return the mean, the log-mass and the mask as arrays."""
    slots, kernels, (r, m) = view.owner, _kernels(), q.shape[:2]
    known, keys, asked, bias = _known(slots), slots.key_codes, q, None
    if isinstance(keys, TokenCodes):
        asked = torch.mm(q.view(r * m, spec.d), transposed(spec.d, q.dtype, "cpu")).view(r, m, spec.d)
        if keys.centred:
            centre = keys.centre if view.rows is None else keys.centre[view.rows]
            bias = torch.bmm(q, centre.to(q.dtype).unsqueeze(-1)).numpy()
    chunks = max(1, -(-(view.width + slots.lead) // kernels.CHUNK))
    mean = np.empty((r, chunks, m, spec.dv), np.float32)
    top, mass = np.empty((2, r, chunks, m), np.float32)
    seen = np.zeros((r, m, slots.first + slots.ring), np.uint8)
    rows, offset, held, coded = known.rows, known.offset, slots.held.numpy(), slots.coded.numpy()
    if view.rows is not None:
        rows = view.rows.numpy()
        offset, held, coded = offset[rows], held[rows], coded[rows]
    given = (
        *(asked.numpy(), np.zeros((r, m), np.float32) if bias is None else bias.reshape(r, m)),
        *(float(spec.scale), float(spec.softcap or 0.0)),
        *(rows, offset, np.minimum(held, view.width), coded, known.position),
        *(slots.ordered, slots.first, slots.group, slots.lead, slots.ring),
        _NOTHING if hide is None else hide.expand(r, m, view.width).numpy(),
        *(*known.keys, *known.values, mean, top, mass, seen),
    )
    shared(kernels.attend_chunks, r * chunks, r * view.width, given)
    out, log_mass = np.empty((r, m, spec.dv), np.float32), np.empty((r, m), np.float32)
    kernels.join(mean, top, mass, out, log_mass)
    return out, log_mass, seen


@dataclass(frozen=True)
class KnownArrays:
    """Hold the arrays that the kernel reads, which are views of the tensors of slots.

    tensors   these tensors; when one of them is replaced, the views are made anew
    rows      (rows,) the indices of all rows
    keys      what `attend_chunks` is given of the codes of the keys; values: of those of the values
    given     fresh_k and fresh_v of `CodedSlots`; None if they are not in float32
    offset, position  as in `attend_chunks`
    """

    tensors: tuple[Tensor, ...]
    rows: Any
    offset: Any
    position: Any
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    given: tuple[Any, Any] | None


def _known(slots: CodedSlots) -> KnownArrays:
    """Return the arrays of the slots' present tensors."""
    keys, values, fresh = slots.key_codes, slots.value_codes, (slots.fresh_k, slots.fresh_v)
    assert isinstance(values, TokenCodes)
    if isinstance(keys, TokenCodes):
        own = (keys.scale,)
    else:
        assert isinstance(keys, ChannelCodes)
        own = (keys.low, keys.high, keys.range)
    tensors = (slots.offset, slots.position, *fresh, values.packed, values.scale, keys.packed, *own)
    known = slots._known_arrays
    if known is None or not all(map(is_, known.tensors, tensors)):
        plain = slots.fresh_k.dtype == torch.float32
        known = slots._known_arrays = KnownArrays(
            tensors=tensors,
            rows=np.arange(slots.spec.rows),
            offset=slots.offset.numpy(),
            position=slots.position.numpy(),
            keys=(keys.width, keys.bits, isinstance(keys, ChannelCodes), *_arrays(keys), *_shared(keys)),
            values=(values.width, values.bits, *_arrays(values)),
            given=(slots.fresh_k.numpy(), slots.fresh_v.numpy()) if plain else None,
        )
    return known


def _arrays(codes: SlotCodes) -> tuple[Any, Any, Any]:
    """Return the packed codes, the bits of each token's length, and the number that each code stands for."""
    if isinstance(codes, TokenCodes):
        return codes.packed.numpy(), codes.scale.view(torch.int16).numpy(), _table(codes.bits, codes.width)
    return codes.packed.numpy(), _NONE.ravel().astype(np.int16), _table(codes.bits, None)


def _shared(codes: SlotCodes) -> tuple[Any, Any, Any]:
    """Return what a group shares: low, high and range of `ChannelCodes`, or empty arrays."""
    if isinstance(codes, ChannelCodes):
        return codes.low.numpy(), codes.high.numpy(), codes.range.numpy()
    return _NONE.astype(np.uint8), _NONE.astype(np.uint8), _NONE


@lru_cache(maxsize=64)
def _table(bits: int, width: int | None) -> Any:
    """Return the levels of codes, at least 16 of them, as the kernel loads so many.

    width None: return the codes as numbers that count from their middle, 16 for the lower 4 bits, then for the others.
    """
    if width is None:
        return np.concatenate(
            [np.arange(16) - (2.0**part - 1) / 2 for part in (min(bits, 4), max(0, bits - 4))], dtype="f4"
        )
    level = levels(bits, width)
    return pad(level, (0, max(0, 16 - len(level)))).numpy()


def shared(kernel: Any, tasks: int, slots: int, given: tuple[Any, ...]) -> None:
    """Do the kernel's tasks, on as many threads as torch uses if there are many slots to read."""
    threads = min(torch.get_num_threads(), tasks) if slots >= _SHARED else 1
    if threads == 1:
        kernel(0, tasks, *given)
        return
    ends = [tasks * i // threads for i in range(threads + 1)]
    others = [Thread(target=kernel, args=(*ends[i : i + 2], *given)) for i in range(1, threads)]
    for thread in others:
        thread.start()
    try:
        kernel(*ends[:2], *given)
    finally:  # also after Ctrl-C: the others write to memory that is freed behind this function
        for thread in others:
            thread.join()
