"""Measure how many bytes certified reads take when codes lie in planes of 4 bits and are read plane by plane.

    python -m characterize.certified_planes [--keys "SmolLM2 8k"]

The keys, values and queries of `characterize.certified_reads`, of SmolLM2 on two texts and on a chat of 8,192 tokens,
ten of 30 layers, in bfloat16: two tokens' queries, of the last 64, over all tokens before these, through
`tiered(planes=True)`. A stream is one kv head of one layer on one text. The bytes are those that a query reads: upper
planes, radii, ranges, centres and sums, the newest and the first tokens, and what it refines and fetches, as
`state.tally` counts them. Each line is one epsilon, for queries that are read alone or for the three of a kv head and
token, which share what they read:
  asked        alone, or group
  streams, reads
  median       bytes read, over those of all tokens in 16 bits: the median over reads, with the ends of its 95 %
               interval, from 1,000 seeded draws of as many streams with repetition
  p90          the 90th percentile, with its interval
  base         bytes that every query reads, likewise
  exact        share of tokens that are fetched exactly, the mean over reads
  later        `median` and `p90` without the first of the ten layers, layer 0, which attends most broadly
  violations   answers whose true error, computed in float64, exceeds their bound
Eight minutes of one core, once recorded; the table has the texts alone so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from statistics import fmean

import torch
from torch import Tensor

from characterize.certified_reads import SOURCES, truth
from characterize.lib.real_keys import Streams, chosen
from characterize.lib.table import ResultTable
from kvfloor.methods.tiered.cold import Cold
from kvfloor.methods.tiered.plane_reader import PlaneReader
from kvfloor.methods.tiered.tiered import Tiered

NAMES = ("SmolLM2 8k", "SmolLM2 chat 8k")
EPSILONS = (0.01, 0.02, 0.05, 0.1)
TOKENS = [31, 63]
"""Which of the last 64 tokens' queries are read."""
DRAWS = 1000
FIELDS = (
    *("keys", "asked", "epsilon", "streams", "reads", "median", "median_low", "median_high"),
    *("p90", "p90_low", "p90_high", "base", "exact", "later_median", "later_p90", "violations"),
)


@dataclass
class Reads:
    """Hold the reads of one stream: each one's bytes and exact tokens over all there are, and how many were wrong."""

    layer: int
    read: list[float]
    exact: list[float]
    base: float
    violations: int


def measure(streams: Streams) -> Iterator[tuple[tuple[str, float], Reads]]:
    """Read some queries of each stream, alone and as groups, at each epsilon: yield what was found by both."""
    spec, (q, exact) = streams.spec(), truth(streams)
    (rows, g), n = q.shape[:2], streams.k.shape[1] - q.shape[2]
    state = Tiered(planes=True).open(spec)
    state.append(streams.k[:, :n], streams.v[:, :n])
    hot, slots = state.hot, state.slots
    assert hot is not None and isinstance(slots, Cold)
    plain = n * spec.token_bytes
    q, exact, base = q[:, :, TOKENS], exact[:, :, TOKENS], hot.bytes_read / rows / plain
    for asked, epsilon in product(("alone", "group"), EPSILONS):
        given = q if asked == "group" else q.flatten(1, 2).unsqueeze(1)
        found, tokens, planes = PlaneReader(spec, hot, slots, epsilon).read(given, None, None)
        error = (found.partial.mean.double().view(exact.shape) - exact).norm(dim=-1)
        wrong = ~(error <= found.bound.view(rows, g, -1))
        read = base + (tokens * spec.token_bytes + planes) / plain
        for row in range(rows):
            told = (read[row].tolist(), (tokens[row] / n).tolist(), base, int(wrong[row].sum()))
            yield (asked, epsilon), Reads(streams.places[row][0], *told)


def quantiles(streams: list[Reads]) -> Tensor:
    """Return the median and the 90th percentile of the bytes read over all reads of these streams."""
    every = torch.tensor([share for one in streams for share in one.read], dtype=torch.float64)
    return every.quantile(torch.tensor([0.5, 0.9], dtype=torch.float64))


def line(streams: list[Reads]) -> tuple[object, ...]:
    """Return the fields of a line from `streams` on."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(streams), (DRAWS, len(streams)), generator=draw).tolist()
    tried = torch.stack([quantiles([streams[i] for i in index]) for index in drawn])
    ends = tried.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
    (median, p90), (low, low90), (high, high90) = (x.tolist() for x in (quantiles(streams), *ends))
    later = quantiles([one for one in streams if one.layer > 0]).tolist()
    return (
        *(len(streams), sum(len(one.read) for one in streams), median, low, high, p90, low90, high90),
        *(fmean(one.base for one in streams), fmean(share for one in streams for share in one.exact), *later),
        sum(one.violations for one in streams),
    )


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__, NAMES)
    table = ResultTable(__file__, FIELDS, names, NAMES)
    for name in names:
        source, layers = SOURCES[name]
        found: dict[tuple[str, float], list[Reads]] = {}
        for streams in source.streams(layers):
            q, k, v = (x.bfloat16() for x in (streams.q, streams.k, streams.v))
            for key, reads in measure(Streams(q, k, v, streams.scale, streams.places, streams.texts)):
                found.setdefault(key, []).append(reads)
        for (asked, epsilon), every in found.items():
            table.add(name, asked, epsilon, *line(every))
    table.save()


if __name__ == "__main__":
    main()
