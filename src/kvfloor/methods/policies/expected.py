"""Expected attention: the tokens that future queries are expected to attend to stay, if their values are large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.policy import Guarded, Held, PolicyMemory, Queries
from kvfloor.core.spec import Spec
from kvfloor.validation import literals


@dataclass(frozen=True)
class Expected(Guarded):
    """Queries are taken to be Gaussian, and a token's expected weight times its value's length decides.

    Law (Devoto et al. 2025, ExpectedAttention): for q ~ N(mu, Sigma), E exp(scale q.k) is
    z(k) = exp(scale mu.k + scale^2 k' Sigma k / 2); score(token) = (z / sum of z over held + epsilon) ||v||, and the
    lowest score leaves. mu and Sigma are the mean and the covariance of the row's queries so far, as they come: after
    RoPE, those of past positions standing for those to come. The first `sinks` tokens' queries are left out of them.
    heads     "pool": one Gaussian per row, for all queries of its GQA group together (d + d^2 numbers);
              "each": one per query head, the mean of whose weights counts, as in the paper (g times as many)
    epsilon   how much a value's length counts for a token that is not attended to
    sinks, recent   first and newest tokens that never leave: 4, and 16 or a quarter of a smaller budget than 64
    A stream without queries has z = 1: the shortest values leave. Where the spec has a softcap, logits are taken
    without it. Statistics and scores are float32 (float64 for a float64 cache).
    """

    name: ClassVar[str] = "expected"
    paper: ClassVar[str] = "Devoto et al. 2025, ExpectedAttention (arXiv 2510.00636)"
    weighs_values: ClassVar[bool] = True

    heads: Literal["pool", "each"] = "pool"
    epsilon: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        literals(self)
        if not (isinstance(self.epsilon, (int, float)) and 0 <= self.epsilon < float("inf")):
            raise ValueError(f"expected: epsilon must be a number >= 0, got {self.epsilon!r}")

    def open(self, spec: Spec, shared: dict[str, Tensor]) -> QueryMoments:
        del shared
        return QueryMoments(spec, pooled=self.heads == "pool")

    def wants_queries(self, sealed: bool) -> bool:
        del sealed
        return True

    def on_queries(self, held: Held, queries: Queries) -> dict[str, Tensor]:
        held.memory.take(held.rows, queries.q, queries.made & (queries.position >= self.sinks))
        return {}

    def priority(self, held: Held) -> Tensor:
        dtype, scale = held.spec.compute_dtype, held.spec.scale
        k, v = held.k.to(dtype), held.v.to(dtype)
        mean, covariance = held.memory.gaussian(held.rows)
        share = torch.zeros(k.shape[:2], dtype=dtype, device=k.device)
        for head in range(mean.shape[1]):
            turned = mean[:, head].unsqueeze(1) + 0.5 * scale * torch.matmul(k, covariance[:, head])
            log_z = (scale * (turned * k).sum(-1)).masked_fill(~held.live, -torch.inf)
            share = share + torch.softmax(log_z, -1) / mean.shape[1]
        return (share + self.epsilon) * torch.linalg.vector_norm(v, dim=-1)


class QueryMoments(PolicyMemory):
    """Mean and covariance of the queries so far, updated block by block without cancellation (Chan et al. 1979).

    count (rows,), mean (rows, h, d), spread (rows, h, d, d): the sum of (q - mean)(q - mean)'; h is 1 if pooled,
    otherwise the group's g.
    """

    def __init__(self, spec: Spec, pooled: bool) -> None:
        self.spec = spec
        self.pooled = pooled
        self.count = torch.zeros(spec.rows, dtype=torch.int64, device=spec.device)
        self._reserve(1)

    def _reserve(self, heads: int) -> None:
        rows, d, like = self.spec.rows, self.spec.d, {"dtype": self.spec.compute_dtype, "device": self.spec.device}
        self.mean, self.spread = torch.zeros(rows, heads, d, **like), torch.zeros(rows, heads, d, d, **like)

    def group(self, g: int) -> None:
        if not self.pooled:
            self._reserve(g)

    def take(self, rows: Tensor | None, q: Tensor, wanted: Tensor) -> None:
        """Queries q (r, g, b, d) of these rows, those marked in wanted (r, b)."""
        mine = slice(None) if rows is None else rows.to(self.count.device)
        x, mark = q.to(self.mean.dtype), wanted[:, None, :, None]
        if self.pooled:
            x, mark = x.flatten(1, 2).unsqueeze(1), mark.repeat(1, 1, q.shape[1], 1)
        fresh, before = mark.sum(2, keepdim=True).to(x.dtype), self.count[mine].view(-1, 1, 1, 1).to(x.dtype)
        mean = (x * mark).sum(2, keepdim=True) / fresh.clamp_min(1.0)
        apart = (x - mean) * mark
        total = (before + fresh).clamp_min(1.0)
        move = mean - self.mean[mine].unsqueeze(2)
        between = move.transpose(-1, -2) * move * (before * fresh / total)
        self.spread[mine] = self.spread[mine] + torch.matmul(apart.transpose(-1, -2), apart) + between
        self.mean[mine] = self.mean[mine] + (move * fresh / total).squeeze(2)
        self.count[mine] = self.count[mine] + fresh.view(-1).to(torch.int64)

    def gaussian(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean (r, h, d) and covariance (r, h, d, d) of the queries; zeros before the first one."""
        mine = slice(None) if rows is None else rows.to(self.count.device)
        count = self.count[mine].clamp_min(1).view(-1, 1, 1, 1).to(self.mean.dtype)
        return self.mean[mine], self.spread[mine] / count
