"""Read the k held tokens of largest logit, found by a scan of all keys; other selectors try to scan fewer keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfloor.core.selector import Selector
from kvfloor.core.slots import View
from kvfloor.core.spec import Spec
from kvfloor.validation import count


@dataclass(frozen=True)
class TopK(Selector):
    """Read the k held tokens of largest logit, after a scan of every key.

    All keys are read, so the selector saves reads of values only. k: tokens read per query. If several tokens have the
    k-th largest logit, all of them are read.
    """

    name: ClassVar[str] = "top_k"
    paper: ClassVar[str] = "Gupta et al. 2021 (arXiv 2106.06899)"
    k: int = 64

    def __post_init__(self) -> None:
        count("top_k", least=1, k=self.k)

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        if view.k.shape[1] <= self.k:
            return hide
        logits = torch.matmul(q.to(spec.compute_dtype), view.k.to(spec.compute_dtype).transpose(-1, -2)) * spec.scale
        if hide is not None:
            logits = logits.masked_fill(hide, -torch.inf)
        threshold = logits.topk(self.k, dim=-1).values[..., -1:]
        unread = logits < threshold
        return unread if hide is None else unread | hide

    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        keys = int(held.sum()) * spec.d
        values = int(held.clamp_max(self.k).sum()) * spec.dv
        return (keys + values) * spec.dtype.itemsize
