"""Check a method that promises to rotate keys and queries (RoPE) by ranks instead of positions in the stream.

A method is the configuration of a cache; its promise is `Traits.turns`. A row is the stream of one kv head of one
sequence. The rank of a token is its index among the held tokens of its row, the oldest at 0. An answer is the attention
output for a query. A `Setting` is the conditions of a check: the cache's dtype, the size of the GQA group and the seed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfloor.check.law import Setting
from kvfloor.check.plain_attention import attention
from kvfloor.check.reference import unread
from kvfloor.check.streams import play, probes, spec_for, stream_for
from kvfloor.check.tolerance import require_accuracy
from kvfloor.core.method import Method
from kvfloor.core.rotation import Rotation
from kvfloor.core.spec import Spec


def check_turns(method: Method, at: Setting) -> None:
    """Require that answers are attention over the held tokens, with keys and queries rotated (RoPE) by rank.

    A query has the rank of the newest held token. Raises Broken if an answer is wrong by more than rounding.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    rotation = Rotation(tuple(5.0**-i for i in range(max(1, spec.d // 4))))
    spec = replace(spec, rotation=rotation)
    state, q = method.open(spec), probes(spec)

    def look(i: int) -> None:
        part, hide = state.read(q), unread(method, state, q)
        slots: Any = state.slots
        for row, (offset, held) in enumerate(zip(slots.offset.tolist(), slots.held.tolist(), strict=True)):
            position = slots.position[offset : offset + held]
            rank = torch.empty_like(position)
            rank[position.argsort()] = torch.arange(held)
            gone = torch.ones(i, dtype=torch.bool)
            gone[position] = False
            left = stream.v[row, :i][gone] if method.traits.reference == "unmasked" else None
            keys = rotation.turned(stream.k[row, position].double(), rotation.circle(rank, torch.float64))
            place = torch.full((q.shape[1],), held - 1)
            asked = rotation.turned(q[row].double(), rotation.circle(place, torch.float64))
            skip = None if hide is None else hide[row, :, :held]
            kept = (asked, keys, stream.v[row, position], left)
            truth, plain = (_attention(kept, spec, skip, dtype) for dtype in (torch.float64, at.dtype))
            where = f"row {row} after {i} tokens ({held} held), against attention over what it holds, turned"
            require_accuracy(part.mean[row], truth[0], plain[0], at.dtype, f"the answers of {where}")
            require_accuracy(part.log_mass[row], truth[1], plain[1], at.dtype, f"the log-masses of {where}")

    play(state, stream, cuts=range(0, stream.n, 17), after=look)


def _attention(
    kept: tuple[Tensor, Tensor, Tensor, Tensor | None], spec: Spec, hide: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute plain attention of one row in `dtype`: return outputs (m, dv), and the log-sum-exp of the logits, (m,).

    kept  queries (m, d), keys (h, d), values (h, dv), and values (e, dv) of evicted tokens that keep logit 0, or None
    spec  gives the scale and the softcap of the logits
    hide  (m, h) mask, True for the keys that a query does not see; None: it sees all
    """
    q, k, v, left = kept
    zero_logits = None if left is None else left.to(dtype)
    return attention(q.to(dtype), k.to(dtype), v.to(dtype), spec, zero_logits, hide)
