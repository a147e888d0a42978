"""Decide which drafted tokens are accepted, so that the exact model's output or distribution is kept.

In shapes, B is the batch, k the number of drafts per batch item, V the vocabulary. Target distributions are those of
the exact cache, draft distributions those that the drafts were drawn from. Draft i comes before target i + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def greedy(drafts: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many drafts of each batch item are the exact model's own choices (B,), and its next choice (B,).

    drafts  (B, k) token ids
    scores  (B, k + 1, V): entry i scores the token after the first i drafts
    """
    best = scores.argmax(-1)
    count = (best[:, :-1] == drafts).to(torch.int64).cumprod(1).sum(1)
    return count, best.gather(1, count.unsqueeze(1)).squeeze(1)


def sampled(drafts: Tensor, drawn_from: Tensor, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return how many drafts of each batch item are accepted (B,), and the token drawn after them (B,).

    The accepted drafts and the token after them are distributed as if each were drawn from the target (Leviathan et al.
    2023, arXiv 2211.17192): draft x is accepted with probability min(1, p(x) / q(x)); the first one that is not is
    replaced by a draw from max(p - q, 0), normalised.
    drafts      (B, k) token ids, each drawn from its distribution in `drawn_from`
    drawn_from  (B, k, V) probabilities q
    target      (B, k + 1, V) probabilities p; entry i is for the token after the first i drafts
    """
    k, at = drafts.shape[1], drafts.unsqueeze(-1)
    p, q = target[:, :k].gather(-1, at).squeeze(-1), drawn_from.gather(-1, at).squeeze(-1)
    luck = torch.rand(drafts.shape, generator=generator, device=generator.device, dtype=torch.float64).to(p.device)
    count = (luck * q < p).to(torch.int64).cumprod(1).sum(1)
    nothing = torch.zeros_like(target[:, :1])
    place = count.view(-1, 1, 1).expand(-1, 1, target.shape[-1])
    p, q = (x.gather(1, place).squeeze(1) for x in (target, torch.cat([drawn_from, nothing], 1)))
    return count, draw(residual(p, q), generator)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Return max(p - q, 0) (B, V), unnormalised: what to draw from after a draft from q was rejected for p.

    Where p and q are equal up to rounding, a rejection has probability 0 up to rounding, and p is returned.
    """
    rest = (p - q).clamp_min(0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token id of each batch item (B,), in proportion to `weights` (B, V), on the generator's device."""
    drawn = torch.multinomial(weights.to(generator.device), 1, generator=generator)
    return drawn.squeeze(1).to(weights.device)
