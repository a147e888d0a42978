"""Sketch non-causal attention in one pass over V, K and Q, read once in this order; a reference, not a cache.

In the setting of Addanki, Li, Song and Yang 2023 (arXiv 2311.14652), n values come first, then n keys, then n queries,
and no row is kept. Every query attends to every key. The result is, for each output column, the few tokens whose
entries are large. In a cache k_i and v_i arrive together, so the product U2^T V is an exact sum there (`taylor`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor.core.randomness import row_keys, uniform
from kvfloor.methods.summaries.taylor import monomials
from kvfloor.validation import count, positives


@dataclass(frozen=True)
class OnePass:
    """Hold the sizes of a sketch of non-causal attention, and open it.

    n, d, dv   number of tokens, widths of keys and values
    scale      factor of q.k (the paper's is 1/d)
    degree     g of the truncated exponential, even; it has t = C(d+g, g) features, U1 of queries and U2 of keys
    products   m2, the rows of Psi: random signs / sqrt(m2) that shorten the token axis in U2^T V; None: k and v come
               together (`take_pairs`), and the product is kept exactly
    sparsity   k, the number of large entries to find in each output column
    buckets, depth   sizes of Phi, a count sketch: `depth` (odd) hash tables of `buckets`; each bucket holds the signed
               sum and one such sum per bit of the token's number, from which that number is read back

    Law: with D = diag(U1 U2^T 1), y a column of D^-1 U1 U2^T V, and E the l2 norm of y without its k largest entries,
    `decode` gives at most 2k entries T with |T - y|_2 <= (1 + epsilon) E, provided that every estimate is within
    m = sqrt(epsilon / (5k)) E of its entry and every entry above 2m is read off in some table. (Among 2k kept entries
    those that displace a larger one cost at most 8 k m^2, estimates 2 k m^2: |T - y|^2 <= (1 + 2 epsilon) E^2.) With
    the buckets and depth of `sizes` both hold with probability 1 - failure. The error against attention itself adds the
    polynomial's error and, with Psi, the product's: |U2^T Psi^T Psi V - U2^T V|_F^2 has mean at most
    2/m2 |U2|_F^2 |V|_F^2.
    Numbers kept: m2 (dv + t) + t for the first two streams (t dv + t without Psi), depth buckets (1 + log2 n) t.
    """

    n: int
    d: int
    dv: int
    scale: float = 1.0
    degree: int = 4
    products: int | None = 64
    sparsity: int = 8
    buckets: int = 64
    depth: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        count("one_pass", least=1, n=self.n, d=self.d, dv=self.dv, sparsity=self.sparsity, buckets=self.buckets)
        count("one_pass", least=1, depth=self.depth, **({} if self.products is None else {"products": self.products}))
        count("one_pass", degree=self.degree)
        positives("one_pass", scale=self.scale)
        if self.degree % 2:
            raise ValueError(f"one_pass: degree must be even, so that every weight is positive, got {self.degree}")
        if self.depth % 2 == 0:
            raise ValueError(f"one_pass: depth must be odd, so that there is a middle estimate, got {self.depth}")

    @staticmethod
    def sizes(n: int, dv: int, sparsity: int, epsilon: float, failure: float) -> tuple[int, int]:
        """Return (buckets, depth) that satisfy the law with probability 1 - failure.

        In one table an estimate misses its entry by more than m with probability <= 1/4 (a collision with one of the k
        largest entries, or Markov's inequality on the rest), so the median of `depth` tables misses it with probability
        exp(-depth / 7). A table fails to read an entry with probability <= 3/4 (Markov over the halves by each bit).
        """
        bits = max(1, (n - 1).bit_length())
        depth = math.ceil(7.0 * math.log(2.0 * n * dv / failure))
        return math.ceil(max(40, 10 * bits) * sparsity / epsilon) + 4 * sparsity, depth + 1 - depth % 2

    def open(self) -> OnePassSketch:
        return OnePassSketch(self)


class OnePassSketch:
    """Keep the sketches of the three streams: all values, then all keys, then all queries, in pieces of any size."""

    def __init__(self, plan: OnePass) -> None:
        self.plan = plan
        self.table = monomials(plan.d, plan.degree)
        t, wide = len(self.table.degree), torch.float64
        rows = t if plan.products is None else plan.products
        self.bits = max(1, (plan.n - 1).bit_length())
        self.sketched_v = torch.zeros(rows, plan.dv, dtype=wide)  # Psi V; U2^T V where k and v come together
        self.sketched_keys = torch.zeros(rows, t, dtype=wide) if plan.products is not None else None  # Psi U2
        self.total = torch.zeros(t, dtype=wide)  # U2^T 1
        self.sketched_queries = torch.zeros(plan.depth, plan.buckets, 1 + self.bits, t, dtype=wide)  # Phi D^-1 U1
        self.taken = {"values": 0, "keys": 0, "queries": 0}

    @property
    def numbers(self) -> int:
        """Return how many numbers the sketch keeps."""
        parts = (self.sketched_v, self.sketched_keys, self.total, self.sketched_queries)
        return sum(x.numel() for x in parts if x is not None)

    # ---- the three streams ---------------------------------------------------------------------------------

    def take_values(self, v: Tensor) -> None:
        """Add the next rows of V (a, dv) to the sketch."""
        if self.plan.products is None:
            raise ValueError("one_pass: without a sketched product k and v come together: use take_pairs")
        self.sketched_v += self._signs(self._next("values", v, self.plan.dv)).T @ v.to(torch.float64)

    def take_keys(self, k: Tensor) -> None:
        """Add the next rows of K (a, d) to the sketch, after all of V."""
        if self.sketched_keys is None:
            raise ValueError("one_pass: without a sketched product k and v come together: use take_pairs")
        self._require("values", "keys")
        token = self._next("keys", k, self.plan.d)
        u2 = self.table.features(k)
        self.sketched_keys += self._signs(token).T @ u2
        self.total += u2.sum(0)

    def take_pairs(self, k: Tensor, v: Tensor) -> None:
        """Add the next rows of K and V together to a sketch that keeps their product exactly."""
        if self.plan.products is not None:
            raise ValueError("one_pass: with a sketched product values come first, then keys")
        self._next("values", v, self.plan.dv)
        self._next("keys", k, self.plan.d)
        u2 = self.table.features(k)
        self.sketched_v += u2.T @ v.to(torch.float64)
        self.total += u2.sum(0)

    def take_queries(self, q: Tensor) -> None:
        """Add the next rows of Q (a, d) to the sketch, after all of K."""
        self._require("keys", "queries")
        token = self._next("queries", q, self.plan.d)
        u1 = self.table.features(q.to(torch.float64) * self.plan.scale)
        rows = u1 / (u1 @ self.total).unsqueeze(1)  # D^-1 U1
        bucket, sign = self._hashes(token)  # (depth, a)
        marks = torch.cat([torch.ones_like(token).unsqueeze(1), token.unsqueeze(1) >> torch.arange(self.bits) & 1], 1)
        signed = (sign.unsqueeze(2) * marks).unsqueeze(3) * rows.unsqueeze(1)  # (depth, a, 1 + bits, t)
        place = torch.arange(self.plan.depth).unsqueeze(1) * self.plan.buckets + bucket
        self.sketched_queries.view(-1, *signed.shape[2:]).index_add_(0, place.flatten(), signed.flatten(0, 1))

    # ---- reading back --------------------------------------------------------------------------------------

    def product(self) -> Tensor:
        """Return U2^T V (t, dv), exact or estimated through Psi."""
        return self.sketched_v if self.sketched_keys is None else self.sketched_keys.T @ self.sketched_v

    def decode(self) -> list[tuple[Tensor, Tensor]]:
        """Return, for each output column, (index, value) of the at most 2k tokens with the largest estimates."""
        self._require("queries", "decoding")
        sums = self.sketched_queries @ self.product()  # (depth, buckets, 1 + bits, dv)
        whole, parts = sums[:, :, 0], sums[:, :, 1:]
        # A token that outweighs the rest of its bucket is read off bit by bit: a bit is 1 if its sum is most of it.
        bit = (parts.abs() > (whole.unsqueeze(2) - parts).abs()).to(torch.int64)
        named = (bit << torch.arange(self.bits).view(-1, 1)).sum(2)  # (depth, buckets, dv)
        found = []
        for column in range(self.plan.dv):
            candidates = named[:, :, column].flatten().unique()
            candidates = candidates[candidates < self.plan.n]
            bucket, sign = self._hashes(candidates)
            estimates = (sign * whole[:, :, column].gather(1, bucket)).median(0).values
            best = estimates.abs().topk(min(2 * self.plan.sparsity, len(candidates))).indices
            best = best[estimates[best] != 0]
            found.append((candidates[best], estimates[best]))
        return found

    def dense(self) -> Tensor:
        """Return the result of `decode` as a matrix (n, dv), zero at all other entries."""
        out = torch.zeros(self.plan.n, self.plan.dv, dtype=torch.float64)
        for column, (index, value) in enumerate(self.decode()):
            out[index, column] = value
        return out

    # ---- public randomness ---------------------------------------------------------------------------------

    def _signs(self, token: Tensor) -> Tensor:
        """Draw rows (a, m2) of Psi^T for these tokens: random signs / sqrt(m2), fixed by (seed, token)."""
        m2 = self.plan.products
        assert m2 is not None
        draws = self._draws("one pass psi", token.unsqueeze(1) * m2 + torch.arange(m2))
        return torch.where(draws < 0.5, -1.0, 1.0).to(torch.float64) / math.sqrt(m2)

    def _hashes(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Draw (bucket, sign), each (depth, a), of tokens (a,)."""
        lane = token * self.plan.depth + torch.arange(self.plan.depth).unsqueeze(1)
        bucket = (self._draws("one pass buckets", lane) * self.plan.buckets).to(torch.int64)
        sign = torch.where(self._draws("one pass signs", lane) < 0.5, -1.0, 1.0).to(torch.float64)
        return bucket, sign

    def _draws(self, purpose: str, counter: Tensor) -> Tensor:
        return uniform(row_keys(self.plan.seed, torch.zeros(1, dtype=torch.int64), purpose), counter)

    # ---- order ---------------------------------------------------------------------------------------------

    def _next(self, stream: str, x: Tensor, width: int) -> Tensor:
        """Check the next rows x (a, width) of a stream, count them, and return their numbers."""
        start, a = self.taken[stream], x.shape[0]
        if x.ndim != 2 or x.shape[1] != width:
            raise ValueError(f"one_pass: {stream} must be (rows, {width}), got {tuple(x.shape)}")
        if start + a > self.plan.n:
            raise ValueError(f"one_pass: {start + a} {stream} came, the sketch is for {self.plan.n}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"one_pass: {stream} have NaN or infinite entries")
        self.taken[stream] = start + a
        return torch.arange(start, start + a)

    def _require(self, before: str, after: str) -> None:
        if self.taken[before] < self.plan.n:
            raise ValueError(
                f"one_pass: {after} come after all {self.plan.n} {before}; {self.taken[before]} came so far"
            )
