"""Keep the tokens of largest score: expected attention from future queries times the norm of the value.

In this file a row is one (batch item, kv head) stream; its queries are those of the g query heads of the GQA group.
N(mu, Sigma) is the Gaussian that is fitted to the row's past queries; k' is the transpose of k. A rotation is a rotary
embedding (RoPE), which rotates pairs of a key's entries. A state is the memory of a method. A spec (`Spec`) has its
sizes and constants. It may have one of two rotations. By `applied`, keys and queries are already rotated when given,
each by its position in the stream. By `rotation`, the state rotates them itself, by rank among the held tokens. `Held`
is what a policy may read about the held tokens of a call's rows. In shapes, rows are all
rows of a state, r those of one call, h the Gaussians per row, d is the width of a key, pairs the number of rotated
pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvfloor.core.device import sent
from kvfloor.core.fields import Field
from kvfloor.core.policy import Guarded, Held, PolicyMemory, Queries
from kvfloor.core.rotation import Rotation
from kvfloor.core.rowwise import length, row_by_row, total
from kvfloor.core.spec import Spec
from kvfloor.validation import count, literals


@dataclass(frozen=True)
class Expected(Guarded):
    """Evict the token with the least expected attention times value norm, for queries modelled as Gaussian.

    Law (Devoto et al. 2025, ExpectedAttention): for q ~ N(mu, Sigma), E exp(scale q.k) is
    z(k) = exp(scale mu.k + scale^2 k' Sigma k / 2); score(token) = (z / sum of z over held + epsilon) ||v||. The token
    of lowest score is evicted. mu and Sigma are the mean and the covariance of the row's queries so far, taken before
    their rotation. They are then rotated by the mean rotation of the next `horizon` positions. Queries of the first
    `sinks` tokens are left out. The rotation is that of the spec (`applied` or `rotation`). A cache of kvfloor.hf
    measures the model's rotation if the model is given when the cache is made. If no rotation is known, mu and Sigma
    are those of the queries as given. For a rotary model the scores are then worse, because queries rotated to past
    positions stand for future queries.
    heads     "pool": one Gaussian per row, for all queries of its GQA group together (d + d^2 numbers);
              "each": one per query head, whose weights are averaged, as in the paper (g times as many numbers)
    epsilon   number added to each token's share of attention, z / sum of z: 0 by default, as in the authors' code. The
              paper has 0.01. As shares sum to 1, most of several hundred tokens have shares below 0.01, and with the
              paper's epsilon their values' norms decide. The predictions of the model SmolLM2 then diverge from those
              with the full cache about twice as far as with epsilon = 0
    horizon   future positions whose rotations are averaged
    sinks     first tokens that are never evicted: 4 by default
    recent    newest tokens that are never evicted; by default 16, or a quarter of a budget below 64 tokens
    Without queries, z = 1 for every token, so the tokens with the smallest value norms are evicted. The spec's softcap
    on logits is ignored. Statistics and scores are float32 (float64 for a float64 cache).
    """

    name: ClassVar[str] = "expected"
    paper: ClassVar[str] = "Devoto et al. 2025, ExpectedAttention (arXiv 2510.00636)"
    weighs_values: ClassVar[bool] = True
    wants_rotation: ClassVar[bool] = True

    heads: Literal["pool", "each"] = "pool"
    epsilon: float = 0.0
    horizon: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        literals(self)
        count(self.name, least=1, horizon=self.horizon)
        if not (isinstance(self.epsilon, (int, float)) and 0 <= self.epsilon < float("inf")):
            raise ValueError(f"expected: epsilon must be a number >= 0, got {self.epsilon!r}")

    def shared(self, spec: Spec) -> dict[str, Tensor]:
        """Return the mean cosine and sine, (pairs,) each, of the rotation over the positions 0 .. horizon - 1.

        The result maps "horizon_cos" and "horizon_sin" to them; it is empty if no rotation is known.
        """
        rotation = _rotation(spec)
        if rotation is None:
            return {}
        places = torch.arange(self.horizon, device=spec.device)
        cos, sin = (total(x, 0) / self.horizon for x in rotation.circle(places, spec.compute_dtype))
        return {"horizon_cos": cos, "horizon_sin": sin}

    def open(self, spec: Spec, shared: dict[str, Tensor]) -> QueryMoments:
        del shared
        return QueryMoments(spec, pooled=self.heads == "pool")

    def wants_queries(self, sealed: bool) -> bool:
        del sealed
        return True

    def on_queries(self, held: Held, queries: Queries) -> dict[str, Tensor]:
        q, applied, dtype = queries.as_they_came, held.spec.applied, held.spec.compute_dtype
        if applied is not None:
            q = applied.turned(q.to(dtype), applied.circle(queries.position.unsqueeze(1), dtype), back=True)
        held.memory.take(held.rows, q, queries.made & (queries.position >= self.sinks))
        return {}

    def future(self, held: Held) -> tuple[Tensor, Tensor]:
        """Return the mean (r, h, d) and covariance (r, h, d, d) of the next queries, rotated as the held keys are.

        The next queries are those of the next `horizon` positions. Law: R mu and R Sigma R', where R is the mean of
        the rotations at these positions. As rotations of one pair commute, R is the rotation at the first of these
        positions times the mean of the rotations at 0 .. horizon - 1.
        """
        mean, covariance = held.memory.gaussian(held.rows)
        rotation = _rotation(held.spec)
        if rotation is None:
            return mean, covariance
        following = held.seen if held.spec.rotation is None else held.count
        cos, sin = rotation.circle(following, held.spec.compute_dtype)  # (r, 1, pairs)
        over_cos, over_sin = held.shared["horizon_cos"], held.shared["horizon_sin"]
        circle = cos * over_cos - sin * over_sin, sin * over_cos + cos * over_sin
        square = circle[0].unsqueeze(1), circle[1].unsqueeze(1)
        half = rotation.turned(covariance, square).transpose(-1, -2)
        return rotation.turned(mean, circle), rotation.turned(half, square)

    def priority(self, held: Held) -> Tensor:
        dtype, scale = held.spec.compute_dtype, held.spec.scale

        def share(k: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
            whole = k.new_zeros(k.shape[:2])
            for head in range(mean.shape[1]):
                turned = mean[:, head].unsqueeze(1) + 0.5 * scale * torch.matmul(k, covariance[:, head])
                whole = whole + torch.softmax(scale * (turned * k).sum(-1), -1) / mean.shape[1]
            return whole

        expected = row_by_row(share, held.k.to(dtype), beside=self.future(held), held=held.filled)
        return (expected + self.epsilon) * length(held.v.to(dtype))


def _rotation(spec: Spec) -> Rotation | None:
    """Return the rotation by which the keys in the cache are rotated; None if there is none or it is unknown."""
    return spec.applied if spec.rotation is None else spec.rotation


class QueryMoments(PolicyMemory):
    """Hold the mean and covariance of each row's queries so far, updated by one block of new tokens at a time.

    count   (rows,) number of queries in each mean
    mean    (rows, h, d); h is 1 if the query heads of a GQA group are pooled, otherwise their number g
    spread  (rows, h, d, d) sum of (q - mean)(q - mean)', i.e. the covariance times `count`
    The update (Chan et al. 1979) avoids cancellation: it never subtracts one large sum from another.
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

    def fields(self) -> dict[str, Any]:
        rows, d, wide = self.spec.rows, self.spec.d, self.spec.compute_dtype
        return {"mean": Field(wide, (rows, "heads", d)), "spread": Field(wide, (rows, "heads", d, d))}

    def require_fitting(self, fields: dict[str, Any], g: int | None, sealed: bool) -> None:
        heads = fields["mean"].shape[1]
        if heads != (1 if self.pooled else g or heads) or heads < 1:
            raise ValueError(f"moments of the queries of {heads} heads, in a group of {g}")

    def take(self, rows: Tensor | None, q: Tensor, wanted: Tensor) -> None:
        """Update mean and covariance of `rows` (r,) (None: of all rows) by the queries q (r, g, b, d) of b new tokens.

        wanted (r, b) is True for the tokens whose queries are included.
        """
        mine = slice(None) if rows is None else sent(rows, self.count.device)
        x, mark = q.to(self.mean.dtype), wanted[:, None, :, None]
        if self.pooled:
            x, mark = x.flatten(1, 2).unsqueeze(1), mark.repeat(1, 1, q.shape[1], 1)
        fresh, before = mark.sum(2, keepdim=True).to(x.dtype), self.count[mine].view(-1, 1, 1, 1).to(x.dtype)
        mean = total(x * mark, 2).unsqueeze(2) / fresh.clamp_min(1.0)
        apart = (x - mean) * mark
        after = (before + fresh).clamp_min(1.0)
        move = mean - self.mean[mine].unsqueeze(2)
        between = move.transpose(-1, -2) * move * (before * fresh / after)
        spread = row_by_row(lambda x: torch.matmul(x.transpose(-1, -2), x), apart)
        self.spread[mine] = self.spread[mine] + spread + between
        self.mean[mine] = self.mean[mine] + (move * fresh / after).squeeze(2)
        self.count[mine] = self.count[mine] + fresh.view(-1).to(torch.int64)

    def gaussian(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean (r, h, d) and covariance (r, h, d, d) of all queries so far, for each of `rows`.

        rows (r,): indices of these rows, None: all. Mean and covariance are zero before the first query.
        """
        mine = slice(None) if rows is None else sent(rows, self.count.device)
        count = self.count[mine].clamp_min(1).view(-1, 1, 1, 1).to(self.mean.dtype)
        return self.mean[mine], self.spread[mine] / count
