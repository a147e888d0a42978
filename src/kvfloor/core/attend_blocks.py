"""Compute a decode step's attention over the tokens in the requests' blocks of memory: the definition, in torch.

A decode step gives one new token to each of n requests. A block is the memory of one request's KV cache in one layer. A
slot is the place of one held token in it; some slots may hold no token. The module `attend_blocks_triton` computes the
same function by a Triton kernel.
In shapes, H are kv heads, g query heads per kv head (GQA group), d and dv the widths of a key and a value.
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
    """Return attention outputs (n, H, g, dv), in the dtype of q, of each request over its held tokens.

    q        (n, H, g, d), queries of the new token of each request, which attend to the new token too
    k, v     (blocks, H, slots, d) and (blocks, H, slots, dv), keys and values of all blocks. Those of the new tokens
             must be stored already. Slots that hold no token may contain any finite numbers
    batch    the requests' block indices, and how many tokens each request held before the new one
    scale    factor on q.k
    softcap  c: scale q.k is replaced by c tanh(scale q.k / c); None: no cap
    backend  "auto": the Triton kernel where it applies (`kernel_applies`); "torch": never the kernel
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
    """Return True if the Triton kernel can be used for queries q.

    It needs q on a CUDA device, in float32, bfloat16 or float16, and an installed triton.
    """
    return q.device.type == "cuda" and q.dtype in _NARROW and find_spec("triton") is not None
