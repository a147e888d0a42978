"""Record the queries, keys and values that the attention of a cache's compressed layers receives.

In shapes, B is the batch, H and Hkv the numbers of query heads and kv heads, n the number of tokens, d a key's width.
On a sharded model, heads are those of this process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvfloor.hf.layer import CompressedLayer


@dataclass(frozen=True)
class Recorded:
    """Hold the attention inputs of one layer over all forwards: q (B, H, n, d), k and v (B, Hkv, n, .), after RoPE.

    Where the model gave one tensor as keys and values (latent attention), k and v are one tensor here too (`tied`).
    scale, softcap   the factor on q.k, and the cap on logits or None
    last             number of tokens in the newest forward; n counts those of all forwards
    sink             (H,), one logit per query head that takes its share of the softmax and has no value; None without
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None
    last: int
    sink: Tensor | None = None

    @property
    def by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (rows, g, n, d), k and v (rows, n, .): one row per (batch item, kv head), g query heads each."""
        batch, kv_heads, n, d = self.k.shape
        rows = batch * kv_heads
        k = self.k.reshape(rows, n, d)
        return self.q.reshape(rows, -1, n, d), k, k if self.tied else self.v.reshape(rows, n, -1)

    @property
    def tied(self) -> bool:
        """Return True if every token's value is its key."""
        return self.v is self.k

    @property
    def sink_by_head(self) -> Tensor | None:
        """Return the sink logits (Hkv, g): a line per kv head, with one logit for each query head of its GQA group."""
        return None if self.sink is None else self.sink.reshape(self.k.shape[1], -1)


class Recorder:
    """Copy the attention inputs of the compressed layers `layers` in every forward from now on; `of` returns them.

    A layer has one recorder at a time: a new one replaces the earlier one. A compressed layer is one with attention
    over all tokens, whose keys and values kvfloor compresses.
    """

    def __init__(self, layers: Iterable[CompressedLayer]) -> None:
        self._parts: dict[int, list[tuple[Any, ...]]] = {}
        for layer in layers:
            layer.record = self._into(layer.index)

    def _into(self, index: int):
        parts = self._parts.setdefault(index, [])

        def keep(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, sink: Tensor | None) -> None:
            key = k.clone()
            law = scale, softcap, None if sink is None else sink.detach()
            parts.append((q.clone(), key, key if v is k else v.clone(), *law))

        return keep

    def of(self, index: int) -> Recorded:
        """Return the inputs of the model's layer `index`, all forwards concatenated along the tokens."""
        parts = self._parts[index]
        q, k, v = (torch.cat(given, dim=2) for given in zip(*(part[:3] for part in parts), strict=True))
        v = k if all(part[2] is part[1] for part in parts) else v
        scale, softcap, sink = parts[0][3:]
        return Recorded(q, k, v, scale, softcap, parts[-1][0].shape[2], sink)
