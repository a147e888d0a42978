"""Compute attention of one new token of each request over the slots in its block: the definition, in torch.

A slot is the place of one held token. In shapes, n are the requests of a step, H kv heads, g query heads per kv head
(GQA group), d and dv the widths of a key and a value. `attend_blocks_triton` has the same function as a kernel.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfloor.core.attend import attend, fused
from kvfloor.core.decoding import DecodeBatch

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: DecodeBatch,
    scale: float,
    softcap: float | None,
    backend: Literal["auto", "torch"] = "auto",
) -> Tensor:
    """Return attention (n, H, g, dv) of q (n, H, g, d) over the slots that each request holds, its newest too.

    k, v     (blocks, H, slots, d) and (blocks, H, slots, dv), with the newest token's entry in place; slots that hold
             no token have any finite numbers
    batch    the requests' blocks, and the numbers of tokens that they held before the newest
    scale    the factor on q.k; softcap: the cap on logits, or None
    backend  "auto": the kernel where it applies (`kernel_applies`); "torch": never
    The result has the dtype of q.
    """
    if backend == "auto" and kernel_applies(q):
        from kvfloor.core import attend_blocks_triton

        return attend_blocks_triton.attend_blocks(q, k, v, batch, scale, softcap)
    n, heads, g, _d = q.shape
    at = batch.index  # blocks that follow one another are read in place, others are copied together first
    keys, values = (x[:, :, : batch.width] for x in (k, v))
    keys, values = (x[at] if isinstance(at, slice) else x.index_select(0, at) for x in (keys, values))
    if fused(q.flatten(0, 1), keys[0], values[0], softcap):
        return scaled_dot_product_attention(q, keys, values, attn_mask=batch.visible, scale=scale)
    hide = None if batch.visible is None else ~batch.visible.expand(n, heads, 1, -1).flatten(0, 1)
    out, _ = attend(q.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), scale, softcap, None, hide)
    return out.view(n, heads, g, v.shape[-1]).to(q.dtype)


def kernel_applies(q: Tensor) -> bool:
    """Return True if the kernel can serve queries like these: on a CUDA device, no float64, with triton installed."""
    return q.device.type == "cuda" and q.dtype in _NARROW and find_spec("triton") is not None
