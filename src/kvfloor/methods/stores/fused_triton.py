"""Compute attention over packed codes in place on a GPU, where triton is installed.

`CodedView.unpacked` defines this attention in torch. The kernel reads coded tokens alone; uncoded ones are attended to
by torch, and the results are merged. Neither lets the host wait for the device. Import this module only where triton is
installed.
A row is one (batch item, kv head) stream, a slot the place of one held token. In shapes, r are rows, m queries of each,
s slots, d and dv the widths of a key and a value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from kvfloor.core.attend_triton import PROGRAMS, cap, merged, room, store_part, tile_width, weighed
from kvfloor.core.device import sent
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.methods.stores.codes import ChannelCodes, SlotCodes, TokenCodes
from kvfloor.methods.stores.levels import levels
from kvfloor.methods.stores.turn import matrix

if TYPE_CHECKING:
    from kvfloor.methods.stores.coded import CodedSlots, CodedView

TILE = 32
"""Slots that a program decodes at a time: a divisor of every group of tokens that are coded together."""

BITS = (4, 8)
"""Bits per number that the kernel reads: whole codes or pairs of them in a byte."""


def serves(slots: CodedSlots) -> bool:
    """Return True if the kernel can read these slots: float32 attention, 4 or 8 bits, values beside the keys.

    Keys that are coded per channel must be in their order, in groups of whole tiles from position 0 on.
    """
    keys, values, spec = slots.key_codes, slots.value_codes, slots.spec
    if spec.compute_dtype != torch.float32 or spec.tied or type(values) is not TokenCodes or values.centred:
        return False
    if keys.bits not in BITS or values.bits not in BITS or keys.dithered or values.dithered:
        return False
    if type(keys) is ChannelCodes:
        return slots.ordered and slots.group % TILE == 0 and slots.lead == 0
    return type(keys) is TokenCodes


def attention(view: CodedView, q: Tensor, spec: Spec, parts: int | None = None) -> Partial:
    """Compute attention of q (r, m, d) over all held tokens of a view of all rows: a `Partial` (r, m).

    parts: number of parts that the slots are split into; None: as many as keep a GPU busy
    """
    return over_all(view, q.to(torch.float32), spec, clocks(view), parts)


def clocks(view: CodedView) -> tuple[Tensor, Tensor, Tensor]:
    """Return, on the device, each row's first place, held tokens of the view, and tokens before those without codes."""
    slots = view.owner
    offset, held, coded = (sent(x, slots.fresh_k.device) for x in (slots.offset, slots.held, slots.coded))
    return offset, held.clamp_max(view.width), coded


def over_all(
    view: CodedView, q: Tensor, spec: Spec, clocks: tuple[Tensor, Tensor, Tensor], parts: int | None = None
) -> Partial:
    """Do the work of `attention`, on the device alone, for q in float32 and the view's `clocks`."""
    slots, (_offset, held, coded) = view.owner, clocks
    part = over_codes(slots, q, spec, view.width, clocks, parts)
    part = Partial(part.mean @ matrix(spec.dv, q.dtype, str(q.device)), part.log_mass)
    hide = ~_uncoded(slots, view.width, held, coded).unsqueeze(1)
    return part.merge(Partial.over(q, slots.fresh_k.to(q.dtype), slots.fresh_v.to(q.dtype), spec, hide=hide))


def _uncoded(slots: CodedSlots, width: int, held: Tensor, coded: Tensor) -> Tensor:
    """Return a mask (r, first + ring), True for the entries of `fresh_k` that are held tokens without a code."""
    position = slots.positions(None, width)
    entries = slots.fresh_k.shape[1]
    live = torch.arange(width, device=position.device) < held.unsqueeze(1)
    fresh = live & ((position >= coded.unsqueeze(1)) | (position < slots.first))
    ring = slots.first + position % slots.ring
    index = torch.where(fresh, torch.where(position < slots.first, position, ring), entries)
    mask = torch.zeros(len(held), entries + 1, dtype=torch.bool, device=position.device)
    return mask.scatter_(1, index, True)[:, :entries]


def over_codes(
    slots: CodedSlots,
    q: Tensor,
    spec: Spec,
    width: int,
    clocks: tuple[Tensor, Tensor, Tensor],
    parts: int | None = None,
) -> Partial:
    """Compute attention of q (r, m, d), float32, over the coded tokens alone, whose values stay rotated.

    width   number of slots of each row that are read
    clocks  what `clocks` returns
    parts   number of parts that the slots are split into; None: as many as keep a GPU busy
    """
    keys, values, (r, m, d), device = slots.key_codes, slots.value_codes, q.shape, q.device
    offset, held, coded = clocks
    assert isinstance(values, TokenCodes)
    if isinstance(keys, ChannelCodes) and not keys.low.shape[1]:  # no group of tokens is whole yet
        return Partial.empty(r, m, dv=spec.dv, dtype=q.dtype, device=device)
    asked, bias = q * spec.scale, torch.zeros(r, m, device=device)
    if isinstance(keys, TokenCodes):
        if keys.centred:
            bias = (asked @ keys.centre.to(q.dtype).unsqueeze(-1)).squeeze(-1)
        asked = asked @ matrix(d, q.dtype, str(device)).T
    tiles = max(1, -(-width // TILE))
    parts = min(tiles, max(1, -(-PROGRAMS // r)) if parts is None else parts)
    part_mean, part_mass = room(r, parts, m, spec.dv, device)
    unused = part_mass
    key_level, key_scale = _numbers(keys, device)
    value_level, value_scale = _numbers(values, device)
    shared = (keys.low, keys.high, keys.range) if isinstance(keys, ChannelCodes) else (unused, unused, unused)
    attend_codes[(r, parts)](  # pyright: ignore[reportIndexIssue]
        *(asked.contiguous(), bias.contiguous(), offset, held, coded),
        *(unused if slots.ordered else slots.position, keys.packed, key_scale, key_level, *shared),
        *(values.packed, value_scale, value_level, part_mean, part_mass),
        *(width, -(-tiles // parts) * TILE, shared[0].shape[1], float(spec.softcap or 0.0)),
        **constants(slots, m),
    )
    return Partial(*merged(part_mean, part_mass))


def _numbers(codes: SlotCodes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what each code stands for, (2^bits,) float32, and the scale of each slot; for channels, any tensors."""
    if isinstance(codes, TokenCodes):
        return levels(codes.bits, codes.width, str(device)), codes.scale
    return codes.packed, codes.packed


def constants(slots: CodedSlots, m: int) -> dict[str, Any]:
    """Return the compile-time arguments of `attend_codes` for m queries per row, by name."""
    keys, values, spec = slots.key_codes, slots.value_codes, slots.spec
    assert values is not None
    return {
        "m": m,
        "d": spec.d,
        "dv": spec.dv,
        "KEY_BITS": keys.bits,
        "VALUE_BITS": values.bits,
        "KEY_BYTES": keys.packed.shape[1],
        "VALUE_BYTES": values.packed.shape[1],
        "CHANNELS": isinstance(keys, ChannelCodes),
        "ORDERED": slots.ordered,
        "CAPPED": spec.softcap is not None,
        "FIRST": slots.first,
        "GROUP": slots.group,
        "M": tile_width(m),
        "D": tile_width(spec.d),
        "DV": tile_width(spec.dv),
        "TILE": TILE,
    }


@triton.jit
def attend_codes(
    q_at,
    bias_at,
    offset_at,
    held_at,
    coded_at,
    position_at,
    k_at,
    k_scale_at,
    k_level_at,
    low_at,
    high_at,
    range_at,
    v_at,
    v_scale_at,
    v_level_at,
    mean_at,
    mass_at,
    slots,
    each,
    groups,
    softcap,
    m: tl.constexpr,
    d: tl.constexpr,
    dv: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ORDERED: tl.constexpr,
    CAPPED: tl.constexpr,
    FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute attention of one row's queries over the coded tokens in one part of its slots, tile by tile.

    Program (r, p) handles the slots from p * each on, at most `each` of row r. Arguments ending in `_at` point to the
    first entry of a tensor: queries (r, m, d), scaled and, for keys coded by token, rotated; what is added to their
    logits (r, m); the first place of each row; held and coded tokens (r,); positions, codes and scales by place; the
    number that a code stands for; low, high and range of `ChannelCodes`. The results go to means (r, parts, m, dv),
    rotated, and log-masses (r, parts, m).
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    result = (row * tl.num_programs(1) + part) * m
    place = tl.load(offset_at + row)
    held, coded = tl.load(held_at + row).to(tl.int32), tl.load(coded_at + row).to(tl.int32)
    held = tl.minimum(held, slots)
    query, wide, wide_v, slot = tl.arange(0, M), tl.arange(0, D), tl.arange(0, DV), tl.arange(0, TILE)
    own = query[:, None] < m
    q = tl.load(q_at + (row * m + query[:, None]) * d + wide[None, :], mask=own & (wide[None, :] < d), other=0.0)
    bias = tl.load(bias_at + row * m + query, mask=query < m, other=0.0)
    top = tl.full((M,), -float("inf"), tl.float32)
    mass = tl.zeros((M,), tl.float32)
    total = tl.zeros((M, DV), tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, held), TILE):
        index = start + slot
        at = place + index
        live = index < held
        position = index
        if not ORDERED:
            position = tl.load(position_at + at, mask=live, other=0)
        live = live & (position < coded) & (position >= FIRST)
        here = live[None, :] & (wide[:, None] < d)
        if KEY_BITS == 8:
            code = tl.load(k_at + at[None, :] * KEY_BYTES + wide[:, None], mask=here, other=0).to(tl.int32)
        else:
            byte = tl.load(k_at + at[None, :] * KEY_BYTES + wide[:, None] // 2, mask=here, other=0).to(tl.int32)
            code = (byte >> (wide[:, None] % 2 * 4)) & 15
        if CHANNELS:  # all tokens of a tile are of one group
            group = row * groups + tl.minimum(start // GROUP, groups - 1)
            known = wide < d
            low = tl.load(low_at + group * d + wide, mask=known, other=0).to(tl.float32)
            high = tl.load(high_at + group * d + wide, mask=known, other=0).to(tl.float32)
            lowest = tl.load(range_at + group * 4) + low * tl.load(range_at + group * 4 + 1)
            highest = tl.load(range_at + group * 4 + 2) + high * tl.load(range_at + group * 4 + 3)
            step = tl.maximum(highest - lowest, 0.0) / (2**KEY_BITS - 1)
            k = lowest[:, None] + step[:, None] * code.to(tl.float32)
            logits = tl.dot(q, tl.where(here, k, 0.0), input_precision="tf32x3")
        else:
            k = tl.load(k_level_at + code, mask=here, other=0.0)
            logits = tl.dot(q, k, input_precision="tf32x3")
            logits = logits * tl.load(k_scale_at + at, mask=live, other=0.0).to(tl.float32)[None, :]
        logits += bias[:, None]
        if CAPPED:
            logits = cap(logits, softcap)
        logits = tl.where(live[None, :], logits, -float("inf"))
        higher, weights, fade = weighed(logits, top)
        mass = mass * fade + tl.sum(weights, 1)
        inside = live[:, None] & (wide_v[None, :] < dv)
        if VALUE_BITS == 8:
            code = tl.load(v_at + at[:, None] * VALUE_BYTES + wide_v[None, :], mask=inside, other=0).to(tl.int32)
        else:
            byte = tl.load(v_at + at[:, None] * VALUE_BYTES + wide_v[None, :] // 2, mask=inside, other=0).to(tl.int32)
            code = (byte >> (wide_v[None, :] % 2 * 4)) & 15
        v = tl.load(v_level_at + code, mask=inside, other=0.0)
        weights = weights * tl.load(v_scale_at + at, mask=live, other=0.0).to(tl.float32)[None, :]
        total = total * fade[:, None] + tl.dot(weights, v, input_precision="tf32x3")
        top = higher
    store_part(mean_at, mass_at, result, query, wide_v, top, mass, total, m, dv)
