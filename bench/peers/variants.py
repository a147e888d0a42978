"""Define kvpress's variants of two laws as policies, to show that the law is all that differs between the two sides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfloor import parse
from kvfloor.core.bounded import Bounded
from kvfloor.core.policy import Held, Queries
from kvfloor.methods.policies.expected import Expected
from kvfloor.methods.policies.last_query import LastQuery


@dataclass(frozen=True)
class SharesWithoutSinks(Expected):
    """Take a token's share of the attention to all held tokens but the sinks, in float64, as ExpectedAttentionPress."""

    def priority(self, held: Held) -> Tensor:
        mean, covariance = (moment.double() for moment in self.future(held))
        k, scale = held.k.double().unsqueeze(1), held.spec.scale
        logits = scale * (k @ mean.unsqueeze(3)).squeeze(3) + scale**2 / 2 * ((k @ covariance) * k).sum(3)
        hidden = (held.position < self.sinks) | ~held.live
        share = torch.softmax(logits.masked_fill(hidden.unsqueeze(1), -torch.inf), -1).mean(1)
        return (share + self.epsilon) * held.v.double().norm(dim=-1)


@dataclass(frozen=True)
class MeanOverLayer(LastQuery):
    """Average the last query's attention over all query heads of a layer, as TOVAPress; for a batch of one prompt."""

    def on_weights(self, held: Held, weights: Tensor, queries: Queries) -> dict[str, Tensor]:
        if held.rows is not None:
            raise ValueError("all kv heads of the layer are needed at once")
        return super().on_weights(held, weights.mean(0, keepdim=True).expand_as(weights), queries)


VARIANTS = {kind.__name__: kind for kind in (SharesWithoutSinks, MeanOverLayer)}


def method_of(text: str, variant: str = "") -> Bounded:
    """Return the method of this text, its policy replaced by the variant of that name, if any."""
    method = parse(text)
    if not isinstance(method, Bounded):
        raise ValueError(f"{text} evicts no whole tokens")
    if not variant:
        return method
    kind, policy = VARIANTS[variant], method.policy
    return replace(method, policy=kind(**vars(policy)))
