"""Convert tensors from a model's layout (batch, heads) to a state's layout: rows, with g queries per token.

A state is what a compression method stores for the rows of one layer. A row is the stream of one (batch item, kv head);
g is the number of query heads in a GQA group. In shapes, B is the batch, H and Hkv the numbers of query heads and kv
heads, n the number of slots (columns of the padded batch), d and dv the widths of a key and of a value. On a sharded
model, heads are those of this process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.partial import Partial
from kvfloor.core.state import State


def present_rows(padding: Tensor | None, slots: slice, kv_heads: int) -> Tensor | None:
    """Return a bool tensor (B * Hkv, n), True where a row's slot holds a real token; None if all do.

    padding: the attention mask (B, all slots so far), None without one; slots: the n slots of this forward; kv_heads:
    Hkv. Raises ValueError if the mask does not end with these slots.
    """
    if padding is not None and padding.shape[1] != slots.stop:
        raise ValueError(
            f"the attention mask has {padding.shape[1]} slots and the cache {slots.stop} with this forward's: give one "
            f"that covers the cache (transformers 5.2 makes a short one when it feeds chunks to a cache not empty)"
        )
    present = None if padding is None else padding[:, slots].to(torch.bool)
    return None if present is None or bool(present.all()) else present.repeat_interleave(kv_heads, 0)


def step_rows(
    state: State, query: Tensor, key: Tensor, value: Tensor, present: Tensor | None, sink: Tensor | None
) -> Tensor:
    """Append n tokens to a state, and return attention of their queries (B, H, n, d) as (B, n, H, dv), contiguous.

    The result is 0 in slots of pads.
    key, value: (B, Hkv, n, .), of the n tokens alone. present: (B * Hkv, n), True for real tokens; None: all are real.
    sink: (H,), one logit per query head that takes its share of the softmax and has no value; None without.
    """
    (batch, heads, n, d), kv_heads, dv = query.shape, key.shape[1], value.shape[-1]
    g = heads // kv_heads
    keys = key.reshape(batch * kv_heads, n, d)
    values = keys if value is key else value.reshape(batch * kv_heads, n, dv)
    folded = (query.reshape(batch * kv_heads, g, n, d), keys, values, present)
    if sink is None:
        out = state.step(*folded)
    else:
        out = beside_sink(state.step_partial(*folded), sink.detach().view(kv_heads, g)).mean.to(query.dtype)
    if n > 1:
        out = out.view(batch, kv_heads, g, n, dv).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, n, heads, dv).contiguous()


def beside_sink(part: Partial, sink: Tensor) -> Partial:
    """Return outputs `part` (rows, g, n) with the share of the softmax that sinks take; a sink has no value.

    sink: (Hkv, g), one logit per query head. Rows are in the order of the batch items, and then of the kv heads.
    """
    rows, g, n = part.log_mass.shape
    logits = sink.to(part.log_mass.dtype).repeat(rows // sink.shape[0], 1).unsqueeze(-1)
    return part.merge(Partial(torch.zeros_like(part.mean), logits.expand(rows, g, n)))
