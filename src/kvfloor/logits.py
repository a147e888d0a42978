"""Cap attention logits by softcap * tanh(logits / softcap), as Gemma 2 and other models do."""

from __future__ import annotations

from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(logits / softcap), or the logits unchanged where there is no cap."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def cap_(logits: Tensor, softcap: float | None) -> Tensor:
    """Replace the logits in place by softcap * tanh(logits / softcap), unless softcap is None, and return them."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
