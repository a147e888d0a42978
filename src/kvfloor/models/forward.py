"""The trainer's forward pass: the same function as the transformers model, but only where an answer is read.

The last layer's queries, its feed-forward part and the output head are needed only at the positions that
predict an answer token; short sequences use two matrix products for attention, which is faster there than the
fused kernel. What stands before and after attention works on flat tokens, so that one compiled graph serves
every batch shape and every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

SHORT = 96  # tokens up to which plain attention is the faster one on a CPU


@dataclass(frozen=True)
class Parts:
    """The two token-wise halves of a layer, as they are or compiled."""

    project: Callable[..., torch.Tensor]
    finish: Callable[..., torch.Tensor]


def turned(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    """RMS norm of (n, hidden), projection to heads, rotary embedding: (n, heads, dim)."""
    h = F.rms_norm(x, x.shape[-1:], scale, 1e-6)
    y = F.linear(h, weight).view(x.shape[0], -1, cos.shape[-1])
    a, b = y.chunk(2, -1)
    return y * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)
