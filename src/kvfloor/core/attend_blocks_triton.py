"""Compute a decode step's attention over the tokens in the requests' blocks of memory: a Triton kernel.

A decode step gives one new token to each of n requests. A block is the memory of one request's KV cache in one layer. A
slot is the place of one held token in it; some slots may hold no token. The module `attend_blocks` defines the same
function in torch. It copies blocks that are not consecutive; the kernel reads all blocks in place. Import this module
only where triton is installed.
In shapes, H are kv heads, g query heads per kv head (GQA group), d and dv the widths of a key and a value.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from kvfloor.core.attend_triton import cap, tile_constants, tile_width, weighed
from kvfloor.core.decoding import DecodeBatch


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: DecodeBatch,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Return attention outputs (n, H, g, dv), in the dtype of q, of each request over its held tokens.

    q        (n, H, g, d), queries of the new token of each request, which attend to the new token too
    k, v     (blocks, H, slots, d) and (blocks, H, slots, dv), keys and values of all blocks. Those of the new tokens
             must be stored already. Slots that hold no token are not read, so they may contain NaN
    batch    the requests' block indices, and how many tokens each request held before the new one
    scale    factor on q.k
    softcap  c: scale q.k is replaced by c tanh(scale q.k / c); None: no cap
    Sums are in float32, and so are products of float32 inputs. Inputs of 16 bits are multiplied in TF32, which holds
    them exactly but rounds the softmax weights to 10 bits of mantissa. Raises ValueError if the last axis of k or v has
    a stride other than 1.
    """
    (n, heads, g, d), dv = q.shape, v.shape[-1]
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError(f"the entries of a key must lie together, got strides {k.stride()} and {v.stride()}")
    q, out = q.contiguous(), torch.empty(n, heads, g, dv, dtype=q.dtype, device=q.device)
    attend_kernel[(n * heads,)](  # pyright: ignore[reportIndexIssue]
        q,
        k,
        v,
        out,
        batch.rows,
        batch.held,
        *(k.stride(0), k.stride(1), k.stride(2)),
        *(v.stride(0), v.stride(1), v.stride(2)),
        scale,
        softcap or 0.0,
        **constants(heads, g, d, dv, q.dtype, softcap is not None),
    )
    return out


def constants(heads: int, g: int, d: int, dv: int, dtype: torch.dtype, capped: bool) -> dict[str, Any]:
    """Return the compile-time arguments of `attend_kernel`, by name.

    Each of g, d and dv also gets an entry G, D and DV: its `tile_width`.
    heads   H, number of kv heads
    dtype   that of q
    capped  True if logits have a softcap
    """
    return {"heads": heads, "g": g, "G": tile_width(g)} | tile_constants(d, dv, dtype, capped)


@triton.jit
def attend_kernel(
    q_at,
    k_at,
    v_at,
    out_at,
    rows_at,
    held_at,
    k_block,
    k_head,
    k_slot,
    v_block,
    v_head,
    v_slot,
    scale,
    softcap,
    heads: tl.constexpr,
    g: tl.constexpr,
    d: tl.constexpr,
    dv: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute the attention outputs of one request and kv head, with an online softmax over tiles of TILE slots.

    Each kernel program handles one of the n H pairs. Arguments ending in `_at` point to the first entry of a tensor:
    q (n, H, g, d), k, v, the output (n, H, g, dv), `rows` and `held` of the `DecodeBatch`. `k_block`, `k_head`,
    `k_slot` are k's strides in entries, and `v_block`, `v_head`, `v_slot` those of v. The arguments that are
    `tl.constexpr` come from `constants`.
    """
    program = tl.program_id(0).to(tl.int64)
    request, head = program // heads, program % heads
    block = tl.load(rows_at + request).to(tl.int64)
    held = tl.load(held_at + request) + 1  # with the newest token
    group, wide, wide_v, slot = tl.arange(0, G), tl.arange(0, D), tl.arange(0, DV), tl.arange(0, TILE)
    own = group[:, None] < g
    q = tl.load(
        q_at + (program * g + group[:, None]) * d + wide[None, :], mask=own & (wide[None, :] < d), other=0.0
    ).to(tl.float32)
    k_at += block * k_block + head * k_head
    v_at += block * v_block + head * v_head
    top = tl.full((G,), -float("inf"), tl.float32)
    mass = tl.zeros((G,), tl.float32)
    total = tl.zeros((G, DV), tl.float32)
    for start in range(0, held, TILE):
        at = (start + slot).to(tl.int64)
        live = at < held
        k = tl.load(k_at + at[None, :] * k_slot + wide[:, None], mask=live[None, :] & (wide[:, None] < d), other=0.0)
        logits = tl.dot(q, k.to(tl.float32), input_precision=PRECISION) * scale
        if CAPPED:
            logits = cap(logits, softcap)
        logits = tl.where(live[None, :], logits, -float("inf"))
        higher, weights, fade = weighed(logits, top)
        mass = mass * fade + tl.sum(weights, 1)
        v = tl.load(
            v_at + at[:, None] * v_slot + wide_v[None, :], mask=live[:, None] & (wide_v[None, :] < dv), other=0.0
        )
        total = total * fade[:, None] + tl.dot(weights, v.to(tl.float32), input_precision=PRECISION)
        top = higher
    answer = (total / mass[:, None]).to(out_at.dtype.element_ty)
    tl.store(out_at + (program * g + group[:, None]) * dv + wide_v[None, :], answer, mask=own & (wide_v[None, :] < dv))
