"""Define evictors and summaries that were tried on SmolLM2 (`characterize/newer_evictors.py`), as third-party parts.

A row is one (batch item, kv head) stream. The seal is the end of the prompt. All policies here keep the whole prompt
until the seal, evict once, and keep every token of the answer, as `snapkv` does. In shapes, r are rows, s slots, d and
dv the widths of a key and a value, g query heads per kv head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvfloor import Held, Partial, Spec
from kvfloor.core.fields import Field
from kvfloor.core.policy import Guarded
from kvfloor.core.randomness import row_keys, uniform
from kvfloor.core.rowwise import length
from kvfloor.core.summary import Summary, SummaryState, lots
from kvfloor.methods.policies.expected import Expected
from kvfloor.methods.policies.observation import Observation
from kvfloor.models.gguf import cache_folder


@dataclass(frozen=True)
class AtTheSeal(Guarded):
    """Protect the first and newest tokens, evict once at the seal, and keep every token of the answer.

    sinks, recent   numbers of first and newest tokens that are never evicted
    """

    @property
    def usual_prefill(self) -> Literal["stream", "dense"]:
        return "dense"

    @property
    def spares(self) -> Literal["nothing", "prompt", "answer"]:
        return "answer"


@dataclass(frozen=True)
class LagRelative(AtTheSeal):
    """Evict the tokens whose keys and values vary least across channels, relative to the next `lag` tokens (LagKV).

    Law (2504.04704): the tokens after the sinks are cut into partitions of `lag`. A token's channels are scaled by the
    least and the largest number of each channel in the next partition. Its score is the softmax over its partition of
    the standard deviation over channels, averaged over keys and values. The best of each partition stay; the last whole
    partition, which has none after it, and the tokens behind it stay.
    """

    name: ClassVar[str] = "lag_relative"
    paper: ClassVar[str] = "LagKV (arXiv 2504.04704)"
    weighs_values: ClassVar[bool] = True

    lag: int = 128

    def priority(self, held: Held) -> Tensor:
        order = held.position.masked_fill(~held.live, 1 << 62).argsort(1)
        n = int(held.count.min())
        parts = (n - self.sinks) // self.lag
        score = torch.full(held.position.shape, 2.0, dtype=torch.float64)
        if parts < 2:
            return score
        inside = order[:, self.sinks : self.sinks + parts * self.lag]
        found = self._scores(held.k.double(), inside) + self._scores(held.v.double(), inside)
        rank = found.argsort(-1).argsort(-1).double() / self.lag
        return score.scatter(1, inside[:, : (parts - 1) * self.lag], rank.flatten(1))

    def _scores(self, x: Tensor, inside: Tensor) -> Tensor:
        parts = x.gather(1, inside.unsqueeze(-1).expand(-1, -1, x.shape[-1])).unflatten(1, (-1, self.lag))
        low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
        scaled = (parts[:, :-1] - low) / (high - low).clamp_min(1e-12)
        return scaled.std(-1).softmax(-1)


@dataclass(frozen=True)
class ChunkVotes(Observation):
    """Evict whole chunks of `chunk` tokens, by the votes of SnapKV summed over each chunk (ChunkKV).

    Law (2502.00299): a chunk's score is the attention that its tokens receive from the last `window` queries. The paper
    keeps the same chunks in all heads of a layer; here each kv head decides for itself.
    """

    name: ClassVar[str] = "chunk_votes"
    paper: ClassVar[str] = "ChunkKV (arXiv 2502.00299)"

    chunk: int = 10

    def _pooled(self, votes: Tensor, held: Held, stop: Tensor) -> Tensor:
        voted = (held.live & (held.position < stop)).unsqueeze(1)
        where = (held.position.clamp_min(0) // self.chunk).unsqueeze(1).expand_as(votes)
        sums = votes.new_zeros(*votes.shape[:2], int(where.max()) + 1)
        return sums.scatter_add(2, where, votes * voted).gather(2, where)


@dataclass(frozen=True)
class Reread(AtTheSeal):
    """Evict the tokens of least score in a file, which a second pass of the model over the text has made.

    scores  the file's name: scores (kv heads, tokens) of each layer
    """

    name: ClassVar[str] = "reread"
    paper: ClassVar[str] = "KVzip (arXiv 2505.23416)"

    scores: str = ""

    def priority(self, held: Held) -> Tensor:
        assert held.spec.places is not None
        table = _scores(self.scores)
        rows = range(held.spec.rows) if held.rows is None else held.rows.tolist()
        mine = torch.stack([table[str(layer)][head] for layer, head in (held.spec.places[row] for row in rows)])
        return mine.double().gather(1, held.position.clamp(0, mine.shape[1] - 1))


@dataclass(frozen=True)
class ExpectedOnce(AtTheSeal, Expected):
    """Evict by expected attention once, at the seal, with parts of the rule left out.

    spread   whether the queries' covariance takes part
    values   whether the share of attention is multiplied by the value's norm
    """

    name: ClassVar[str] = "expected_once"

    spread: bool = True
    values: bool = True

    def future(self, held: Held) -> tuple[Tensor, Tensor]:
        mean, covariance = super().future(held)
        return mean, covariance if self.spread else torch.zeros_like(covariance)

    def priority(self, held: Held) -> Tensor:
        score = super().priority(held)
        return score if self.values else score / length(held.v.to(score.dtype)).clamp_min(1e-12)


@dataclass(frozen=True)
class MergedValues(Observation):
    """Add the values of evicted tokens to those of the next kept tokens, without their mass (CaM).

    Law (Zhang et al. 2024, ICML): an evicted token's value, divided by m, is added to the values of the `m` kept tokens
    that follow it, with probability min(1, its votes / the mean votes of these m). Here the expectation is added, once
    at the seal. Keys stay, so the softmax's denominator lacks the evicted mass.
    """

    name: ClassVar[str] = "merged_values"
    paper: ClassVar[str] = "CaM (Zhang et al. 2024, ICML)"
    weighs_values: ClassVar[bool] = True

    m: int = 32

    def priority(self, held: Held) -> Tensor:
        score = super().priority(held)
        window = (held.budget // 2).clamp_max(self.window)
        score = score.double().masked_fill(held.position >= held.seen - window, torch.inf)
        for row in range(score.shape[0]):  # every row has the whole prompt here
            n, budget = int(held.count[row]), int(held.budget[row])
            if n > budget:
                self._merge(held.v[row, :n], score[row, :n], held.position[row, :n], n - budget)
        return score

    def _merge(self, v: Tensor, score: Tensor, position: Tensor, gone: int) -> None:
        order = position.argsort()
        leaves = torch.zeros(len(v), dtype=torch.bool)
        leaves[torch.argsort(score, stable=True)[:gone]] = True
        leaves = leaves[order]
        kept, lost = order[~leaves], order[leaves]
        first = (~leaves).cumsum(0)[leaves].unsqueeze(1) + torch.arange(self.m)  # kept tokens before a lost one
        there = first < len(kept)
        to = kept[first.clamp_max(len(kept) - 1)]
        votes = score.clamp_max(float(score[torch.isfinite(score)].max()))
        size = there.sum(1).clamp_min(1)
        around = (votes[to] * there).sum(1) / size
        share = (votes[lost] / around.clamp_min(1e-30)).clamp_max(1.0) / size
        moved = share.to(v.dtype).unsqueeze(1) * v[lost]
        v.index_add_(0, to[there], moved.unsqueeze(1).expand(-1, self.m, -1)[there])


@dataclass(frozen=True)
class UniformTokens(Summary):
    """Summarise the evicted tokens by `m` of them, drawn uniformly, each with the weight of all evicted per drawn one.

    Numerator and denominator of attention are sums over the same draws, so the answer is a mean of values. It is the
    baseline that a summary by clusters has to beat.
    """

    name: ClassVar[str] = "uniform_tokens"
    paper: ClassVar[str] = "Vitter 1985 (reservoir sampling)"

    m: int = 64

    def open(self, spec: Spec) -> UniformTokensState:
        return UniformTokensState(self.m, spec)


class UniformTokensState(SummaryState):
    """Hold the drawn tokens of each row: k (rows, m, d), v (rows, m, dv), key (rows, m), and the number of evicted."""

    def __init__(self, m: int, spec: Spec) -> None:
        super().__init__(spec)
        self.k = torch.zeros(spec.rows, m, spec.d, dtype=spec.dtype)
        self.v = torch.zeros(spec.rows, m, spec.dv, dtype=spec.dtype)
        self.key = torch.full((spec.rows, m), torch.inf, dtype=torch.float64)
        self.count = torch.zeros(spec.rows, dtype=torch.int64)

    def fields(self) -> dict[str, Any]:
        shapes = {name: Field(self.spec.dtype, tuple(getattr(self, name).shape), finite=True) for name in ("k", "v")}
        return shapes | {"key": Field(torch.float64, tuple(self.key.shape), least=0)}

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        lanes = row_keys(self.spec.seed, self.spec.ids(), "uniform tokens")
        for at, keys, values, places in lots(row, k, v, position):
            drawn = torch.cat([self.key[at], uniform(lanes[at].unsqueeze(1), places)], 1)
            self.key[at], kept = drawn.topk(self.key.shape[1], largest=False)
            for held, new in ((self.k, keys), (self.v, values)):
                index = kept.unsqueeze(-1).expand(-1, -1, new.shape[-1])
                held[at] = torch.cat([held[at], new], 1).gather(1, index)
            self.count[at] += places.shape[1]

    def read(self, q: Tensor) -> Partial:
        real = torch.isfinite(self.key)
        share = (self.count / real.sum(1).clamp_min(1)).log().to(self.spec.compute_dtype)
        return Partial.over(q, self.k, self.v, self.spec, share.unsqueeze(1).expand_as(self.key), ~real.unsqueeze(1))


def has_scores(name: str) -> bool:
    """Return True if there is a file of scores with this name."""
    return _path(name).exists()


def save_scores(name: str, tables: dict[str, Tensor]) -> None:
    """Save the scores (kv heads, tokens) of each layer, by its index as text, for `Reread(scores=name)`."""
    _path(name).parent.mkdir(parents=True, exist_ok=True)
    save_file({layer: table.contiguous() for layer, table in tables.items()}, _path(name))
    _scores.cache_clear()


@cache
def _scores(name: str) -> dict[str, Tensor]:
    return load_file(_path(name))


def _path(name: str) -> Path:
    return cache_folder() / "scores" / f"{name}.safetensors"
