"""Search for queries of bounded length that each put as much softmax weight as possible on one key.

The queries are proposals for `readable_within`, which computes a lower bound on the memory of attention. That bound is
valid for any queries; better queries only raise it.
    rivals   the keys that take softmax weight away from a query's own key: all other keys of the stream, or a sample
    beyond   log-sum-exp of a query's logits on further tokens outside the stream, the same for every query; None: there
             are no such tokens
    lead     logit of the query's own key, less the log-sum-exp of its logits on the rivals and the further tokens
    radius   the greatest length |q| of a query
    scale, softcap   define the logits: scale q.k, then softcap tanh(logit / softcap) unless softcap is None
Without a softcap, the log of the softmax weight of key k_i under query q is scale q.k_i - log sum_j exp(scale q.k_j).
It is concave in q, so every local maximum over a ball is global. If the rivals were Gaussian with mean mu and
covariance C, the maximum would lie at
    q = (scale C + lambda I)^-1 (k_i - mu),   with the least lambda >= 0 that gives |q| <= radius.
The search starts at this q. Each refinement is an approximate Newton step: mu becomes the mean of the rivals weighted
by their softmax weights under the current query, and C is kept in place of the true curvature.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvfloor.floors.measured.limit import unwatched
from kvfloor.floors.measured.products import logits, rough_dtype
from kvfloor.logits import capped

FEW = 4096  # up to so many keys, every key is compared with all others
SAMPLE = 1024  # if there are more rival keys, a sample of this size replaces them
_KEYS_AT_ONCE = 512
_STEPS, _STEPS_LONG = 6, 2  # refinements of each query
_SECULAR_STEPS = 8  # Newton steps for lambda; the equation in 1/|q| is nearly linear
_FLAT = 1e-6  # least eigenvalue of the metric, as a share of the largest
_INSIDE = 1.0 - 1e-6  # queries keep this share of the radius, so that rounding never leaves the ball


class Ball:
    """Search for queries of length at most `radius` that each put much softmax weight on one key, despite rival keys.

    The name means the ball of all such queries. `rivals` (c, d) are the keys that take softmax weight away from a
    query's own key. scale and softcap define the logits. `beyond` is the log-sum-exp of every query's logits on further
    tokens, or None. `few` is True if there are few keys: the rivals are then kept in float32, else in bfloat16 where
    that is faster. `look` is called before every 512 keys, and may raise an error to end the search.
    """

    def __init__(
        self, rivals: Tensor, radius: float, scale: float, softcap: float | None, beyond: float | None, few: bool,
        look: Callable[[], None] = unwatched,
    ) -> None:  # fmt: skip
        self.scale, self.softcap, self._look = scale, softcap, look
        self.beyond = -torch.inf if beyond is None else beyond
        self._rivals = rivals.to(rough_dtype(rivals.device, few))
        self.radius = radius * _INSIDE
        wide = rivals.double()
        self.mean = wide.mean(0).to(rivals.dtype)
        spread = (wide - wide.mean(0)).T @ (wide - wide.mean(0)) * (scale**2 / len(rivals))
        values, vectors = torch.linalg.eigh(spread)
        self._values = values.clamp_min(_FLAT * float(values[-1]) + 1e-30).to(rivals.dtype)
        self._vectors = vectors.to(rivals.dtype)

    def towards(self, keys: Tensor, place: Tensor, steps: int, first: Tensor | None = None) -> Tensor:
        """Search for each key of `keys` (n, d) a query that puts much softmax weight on it; return the queries (n, d).

        place (n,) is the key's index among the rivals, or -1 if it is not one. The search starts from the best of
        several queries:
            of length `radius`, in the direction from the rivals' mean to the key
            the query that would be best if the rivals were Gaussian
            `first` (n, d), if given
            of length `radius`, in the direction of the key, if there are tokens `beyond`
        It is refined `steps` times, and the best query found is returned.
        """
        parts = []
        for low in range(0, len(keys), _KEYS_AT_ONCE):
            self._look()
            part = slice(low, low + _KEYS_AT_ONCE)
            begin = None if first is None else first[part]
            parts.append(self._towards(keys[part], place[part], steps, begin))
        return torch.cat(parts)

    def _towards(self, keys: Tensor, place: Tensor, steps: int, first: Tensor | None) -> Tensor:
        away = keys - self.mean
        best = self._stretched(away)
        lead = self.lead(best, keys, place)
        starts = [self._longest(self.scale * away)]
        starts += [] if first is None else [first]
        starts += [self._stretched(keys)] if self.beyond > -torch.inf else []
        for query in starts:
            best, lead = _better(best, lead, query, self.lead(query, keys, place))
        stride = torch.ones_like(lead)
        for _ in range(steps):
            weights = torch.softmax(self._rival_logits(best, place), 1)
            curve = ((best @ self._vectors) * self._values) @ self._vectors.T
            mean = (weights.to(self._rivals.dtype) @ self._rivals).to(keys.dtype)
            aim = self._longest(self.scale * (keys - mean) + curve)
            query = best + stride.unsqueeze(1) * (aim - best)  # between two points of the ball, hence inside it
            found = self.lead(query, keys, place)
            stride = torch.where(found > lead, stride, 0.5 * stride)
            best, lead = _better(best, lead, query, found)
        return best

    def _stretched(self, aim: Tensor) -> Tensor:
        return aim * (self.radius / aim.norm(dim=1, keepdim=True).clamp_min(1e-30))

    def _longest(self, aim: Tensor) -> Tensor:
        """Return for each row a of `aim` (n, d) the vector q = (C + lambda I)^-1 a of length at most `radius`: (n, d).

        C is the covariance of the rivals times scale^2. Each row has its own lambda: the least lambda >= 0 for which
        |q| <= radius.
        """
        along = aim @ self._vectors
        shift = torch.zeros_like(along[:, :1])
        for _ in range(_SECULAR_STEPS):
            query = along / (self._values + shift)
            length = query.norm(dim=1, keepdim=True)
            fall = (query.square() / (self._values + shift)).sum(1, keepdim=True).clamp_min(1e-30)
            shift = (shift + length.square() / fall * (length / self.radius - 1.0)).clamp_min(0.0)
        query = along / (self._values + shift)
        length = query.norm(dim=1, keepdim=True).clamp_min(1e-30)
        return (query * (self.radius / length).clamp_max(1.0)) @ self._vectors.T

    def _rival_logits(self, query: Tensor, place: Tensor) -> Tensor:
        raw = logits(query, self._rivals, self.scale, self.softcap)
        own = place >= 0
        raw[own.nonzero()[:, 0], place[own]] = -torch.inf
        return raw

    def lead(self, query: Tensor, keys: Tensor, place: Tensor) -> Tensor:
        """Return each key's logit under its query, less the log-sum-exp over the rivals and the tokens `beyond`: (n,).

        query and keys are (n, d); place (n,) is the key's index among the rivals, or -1 if it is not one. A key is no
        rival of itself.
        """
        own = capped((query * keys).sum(1) * self.scale, self.softcap)
        rivals = torch.logsumexp(self._rival_logits(query, place), 1)
        return own - torch.logaddexp(rivals, torch.full_like(rivals, self.beyond))


def _better(best: Tensor, lead: Tensor, query: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    won = found > lead
    return torch.where(won.unsqueeze(1), query, best), torch.where(won, found, lead)


def towards_each(
    k: Tensor, radius: float, scale: float, softcap: float | None, beyond: float | None = None,
    look: Callable[[], None] = unwatched,
) -> Tensor:  # fmt: skip
    """Search for every key of k (n, d) a query that puts much softmax weight on it; return the queries (n, d).

    A key's rivals, which take weight away from it, are all other keys, or a sample of them where there are more than
    4,096. Queries have length at most `radius`. scale and softcap define the logits. `beyond` is the log-sum-exp of
    every query's logits on further tokens, or None. `look` is called again and again, and may raise an error to end
    the search.
    """
    everything = torch.arange(len(k), device=k.device)
    return with_rivals(k, everything, radius, scale, softcap, beyond, look=look)


def with_rivals(
    k: Tensor, rivals: Tensor, radius: float, scale: float, softcap: float | None, beyond: float | None,
    first: Tensor | None = None, look: Callable[[], None] = unwatched,
) -> Tensor:  # fmt: skip
    """Search for every key of k (n, d) a query that puts much weight on it, despite the rival keys k[rivals].

    Returns the queries (n, d), of length at most `radius`.
    rivals   (c,), indices into k of the keys that take softmax weight away from a query's own key. If k has more than
             4,096 keys, a sample of at most 1,024 rivals is used
    beyond   log-sum-exp of every query's logits on further tokens, or None
    first    (n, d), queries to improve on, or None
    scale, softcap   define the logits
    look     is called again and again, and may raise an error to end the search
    """
    ball, place, steps = ball_among(k, rivals, radius, scale, softcap, beyond, look)
    return ball.towards(k, place, steps, first)


def ball_among(
    k: Tensor, rivals: Tensor, radius: float, scale: float, softcap: float | None, beyond: float | None,
    look: Callable[[], None] = unwatched,
) -> tuple[Ball, Tensor, int]:  # fmt: skip
    """Return what searches queries for keys of k (n, d), as `with_rivals` does, for as many of them as are wanted.

    Returns the ball, the index (n,) of each key among its rivals (-1 if it is none), and how often to refine a query.
    """
    few = len(k) <= FEW
    if not few:
        rivals = thinned(rivals)
    place = torch.full((len(k),), -1, device=k.device)
    place[rivals] = torch.arange(len(rivals), device=k.device)
    return Ball(k[rivals], radius, scale, softcap, beyond, few, look), place, _STEPS if few else _STEPS_LONG


def thinned(tokens: Tensor) -> Tensor:
    """Return at most 1,024 of the token indices, evenly spaced."""
    return tokens[:: max(1, -(-len(tokens) // SAMPLE))]
