"""Cap logits by the tanh law of models with a softcap."""

from __future__ import annotations

from torch import Tensor


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(logits / softcap), or the logits unchanged where there is no cap."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def cap_(logits: Tensor, softcap: float | None) -> Tensor:
    """Cap the logits in place, and return them."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
