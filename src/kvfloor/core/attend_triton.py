"""Compute attention of few queries over a long state on a GPU, split over the state: a Triton kernel.

The state's slots are split into parts. One kernel computes for each part the mean of values and the log-mass
(log-sum-exp of logits), another merges the parts. The module `attend` defines the same function in torch. Import this
module only where triton is installed.
A row is one (batch item, kv head) stream, a slot the place of one held token. In shapes, r are rows, m queries of each,
s slots, d and dv the widths of a key and a value.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TILE_BYTES = 16384
"""Most bytes of keys, or of values, in float32 that a program loads at a time, unless 16 slots take more."""

PROGRAMS = 4 * 132
"""Kernel programs to aim at: four for each multiprocessor of an H100 or H200."""


def attend_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None = None,
    log_weight: Tensor | None = None,
    count: Tensor | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention of q over keys k and values v: outputs (r, m, dv) and log-masses (r, m), float32.

    q, k, v     (r, m, d), (r, s, d), (r, s, dv) of one dtype: float32, bfloat16 or float16. The entries of a key must
                lie together, as must those of a value
    softcap     c: scale q.k is replaced by c tanh(scale q.k / c); None: no cap
    log_weight  (r, s), added to the logits; None: nothing is added
    count       (r,) integers on the device: the queries of a row see its first count[r] slots, and the others are not
                read, so they may contain NaN; None: all are seen. A row without a slot has output 0 and log-mass -inf
    parts       number of parts that the slots are split into; None: as many as keep a GPU busy
    Sums are in float32, and so are products of float32 inputs. Inputs of 16 bits are multiplied in TF32, which holds
    them exactly but rounds the softmax weights to 10 bits of mantissa.
    Raises ValueError for entries that lie apart.
    """
    (r, m, d), s, dv = q.shape, k.shape[1], v.shape[-1]
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError(f"the entries of a key must lie together, got strides {k.stride()} and {v.stride()}")
    fixed = constants(m, d, dv, q.dtype, softcap is not None, log_weight is not None, count is not None)
    tiles = max(1, -(-s // fixed["TILE"]))
    parts = min(tiles, max(1, -(-PROGRAMS // max(1, r))) if parts is None else parts)
    each = -(-tiles // parts) * fixed["TILE"]
    q, weight = q.contiguous(), None if log_weight is None else log_weight.to(torch.float32)
    part_mean, part_mass = room(r, parts, m, dv, q.device)
    attend_part[(r, parts)](  # pyright: ignore[reportIndexIssue]
        *(q, k, v, part_mean if weight is None else weight, part_mass if count is None else count),
        *(part_mean, part_mass),
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1), 0 if weight is None else weight.stride(0)),
        *(s, each, scale, softcap or 0.0),
        **fixed,
    )
    return merged(part_mean, part_mass)


def room(r: int, parts: int, m: int, dv: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return memory for the results of parts: means (r, parts, m, dv) and log-masses (r, parts, m), float32."""
    mean = torch.empty(r, parts, m, dv, dtype=torch.float32, device=device)
    return mean, torch.empty(r, parts, m, dtype=torch.float32, device=device)


def merged(part_mean: Tensor, part_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Merge means (r, parts, m, dv) and log-masses (r, parts, m) of the parts: return (r, m, dv) and (r, m)."""
    r, parts, m, dv = part_mean.shape
    if parts == 1:
        return part_mean.squeeze(1), part_mass.squeeze(1)
    mean, mass = room(r, 1, m, dv, part_mean.device)
    wide = {"PARTS": triton.next_power_of_2(parts), "DV": tile_width(dv)}
    merge_parts[(r * m,)](part_mean, part_mass, mean, mass, m, parts, dv, **wide)  # pyright: ignore[reportIndexIssue]
    return mean.squeeze(1), mass.squeeze(1)


def constants(
    m: int, d: int, dv: int, dtype: torch.dtype, capped: bool, weighted: bool, counted: bool
) -> dict[str, Any]:
    """Return the compile-time arguments of `attend_part`, by name; M, D and DV are m, d and dv as a tile has them."""
    own = {"m": m, "WEIGHTED": weighted, "COUNTED": counted, "M": tile_width(m)}
    return own | tile_constants(d, dv, dtype, capped)


def tile_constants(d: int, dv: int, dtype: torch.dtype, capped: bool) -> dict[str, Any]:
    """Return the compile-time arguments that follow from the widths of keys and values, their dtype and a softcap."""
    wide_d, wide_dv = tile_width(d), tile_width(dv)
    return {
        "d": d,
        "dv": dv,
        "CAPPED": capped,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "D": wide_d,
        "DV": wide_dv,
        "TILE": max(16, min(128, TILE_BYTES // (max(wide_d, wide_dv) * torch.float32.itemsize))),
    }


def tile_width(n: int) -> int:
    """Return the size of a tile's axis that holds n entries: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def cap(logits, softcap):
    """Return softcap * tanh(logits / softcap): by a series near 0, where the quotient of exponentials cancels."""
    x = logits / softcap
    square = x * x
    series = x * (
        1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * 62.0 / 2835.0)))
    )
    wide = 1.0 - 2.0 / (tl.exp(tl.minimum(2.0 * x, 80.0)) + 1.0)  # 80 keeps the exponential finite
    return softcap * tl.where(square < 0.0625, series, wide)


@triton.jit
def weighed(logits, top):
    """Return the largest logits so far (M,), the weights (M, TILE) relative to them, and what older weights shrink by.

    top (M,): the largest logits of the tiles before, -inf where no slot was seen.
    """
    higher = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    return higher, tl.exp(logits - shift[:, None]), tl.exp(top - shift)


@triton.jit
def store_part(mean_at, mass_at, result, query, wide_v, top, mass, total, m, dv):
    """Store the mean and the log-mass of one row's m queries over one part, from index `result` on."""
    some = mass > 0.0
    mean = total / tl.where(some, mass, 1.0)[:, None]
    own = (query[:, None] < m) & (wide_v[None, :] < dv)
    tl.store(mean_at + (result + query[:, None]) * dv + wide_v[None, :], mean, mask=own)
    log_mass = tl.where(some, top + tl.log(tl.where(some, mass, 1.0)), -float("inf"))
    tl.store(mass_at + result + query, log_mass, mask=query < m)


@triton.jit
def attend_part(
    q_at,
    k_at,
    v_at,
    weight_at,
    count_at,
    mean_at,
    mass_at,
    k_row,
    k_slot,
    v_row,
    v_slot,
    weight_row,
    slots,
    each,
    scale,
    softcap,
    m: tl.constexpr,
    d: tl.constexpr,
    dv: tl.constexpr,
    CAPPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute attention of one row's queries over one part of its slots, with an online softmax over tiles.

    Program (r, p) handles the slots from p * each on, at most `each` of row r. Arguments ending in `_at` point to the
    first entry of a tensor, and k_row, k_slot, ... are strides in entries. The results go to means (r, parts, m, dv)
    and log-masses (r, parts, m).
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    result = (row * tl.num_programs(1) + part) * m
    held = slots
    if COUNTED:
        held = tl.load(count_at + row).to(tl.int32)
    query, wide, wide_v, slot = tl.arange(0, M), tl.arange(0, D), tl.arange(0, DV), tl.arange(0, TILE)
    own = query[:, None] < m
    q = tl.load(q_at + (row * m + query[:, None]) * d + wide[None, :], mask=own & (wide[None, :] < d), other=0.0)
    q = q.to(tl.float32)
    k_at += row * k_row
    v_at += row * v_row
    top = tl.full((M,), -float("inf"), tl.float32)
    mass = tl.zeros((M,), tl.float32)
    total = tl.zeros((M, DV), tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, held), TILE):
        at = (start + slot).to(tl.int64)
        live = at < held
        k = tl.load(k_at + at[None, :] * k_slot + wide[:, None], mask=live[None, :] & (wide[:, None] < d), other=0.0)
        logits = tl.dot(q, k.to(tl.float32), input_precision=PRECISION) * scale
        if CAPPED:
            logits = cap(logits, softcap)
        if WEIGHTED:
            logits += tl.load(weight_at + row * weight_row + at, mask=live, other=0.0)[None, :]
        logits = tl.where(live[None, :], logits, -float("inf"))
        higher, weights, fade = weighed(logits, top)
        mass = mass * fade + tl.sum(weights, 1)
        v = tl.load(
            v_at + at[:, None] * v_slot + wide_v[None, :], mask=live[:, None] & (wide_v[None, :] < dv), other=0.0
        )
        total = total * fade[:, None] + tl.dot(weights, v.to(tl.float32), input_precision=PRECISION)
        top = higher
    store_part(mean_at, mass_at, result, query, wide_v, top, mass, total, m, dv)


@triton.jit
def merge_parts(
    part_mean_at,
    part_mass_at,
    mean_at,
    mass_at,
    m,
    parts,
    dv,
    PARTS: tl.constexpr,
    DV: tl.constexpr,
):
    """Merge the parts' results of one query of one row: program r * m + j merges means and log-masses of query j."""
    program = tl.program_id(0).to(tl.int64)
    row, query = program // m, program % m
    part, wide = tl.arange(0, PARTS), tl.arange(0, DV)
    at = (row * parts + part) * m + query
    mass = tl.load(part_mass_at + at, mask=part < parts, other=-float("inf"))
    top = tl.max(mass, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    share = tl.exp(mass - shift)
    whole = tl.sum(share, 0)
    mean = tl.load(
        part_mean_at + at[:, None] * dv + wide[None, :],
        mask=(part[:, None] < parts) & (wide[None, :] < dv),
        other=0.0,
    )
    some = whole > 0.0
    mean = tl.sum(mean * share[:, None], 0) / tl.where(some, whole, 1.0)
    tl.store(mean_at + program * dv + wide, mean, mask=wide < dv)
    tl.store(mass_at + program, tl.where(some, shift + tl.log(tl.where(some, whole, 1.0)), -float("inf")))
