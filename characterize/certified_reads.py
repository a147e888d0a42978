"""Measure how many answers 8-bit codes certify on a real model's keys, and how many exact tokens the others fetch.

    python -m characterize.certified_reads [--keys "SmolLM2 2k"]

All layers of recorded SmolLM2 (`characterize.lib.real_keys`, two texts); the queries of a text's last 64 tokens attend
to all tokens before them, through `tiered`. A stream is one kv head of one layer on one text, a group the three queries
of a token that share a kv head and what they fetch. Each line is one epsilon:
  certified      share of queries whose error the codes alone bound by epsilon, relative to the largest value norm
  low, high      its 95 % interval over streams
  groups         share of groups that fetch nothing
  fetched        share of all tokens that a group fetches exactly, the mean over groups
  bound          median relative bound of the answers from the codes alone, and its 90th percentile (`bound90`)
  over_true      median of bound over true error, of these answers; truth is computed in float64
  violations     answers, of all reads of the line, whose true error exceeds their bound
  hot            bytes of codes, sums and ranges over the bytes of the tokens in 16 bits
Lines of `layers` first have the streams of layer 0 alone. Four minutes on one core, once recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from characterize.lib.real_keys import RealKeys, Streams, chosen
from characterize.lib.table import ResultTable, mean_interval
from kvfloor.audit.texts import SHIPPED
from kvfloor.methods.tiered.tally import Tally
from kvfloor.methods.tiered.tiered import Tiered

ASKED = 64
EPSILONS = (0.01, 0.02, 0.05)
FIELDS = (
    *("keys", "layers", "epsilon", "streams", "queries", "certified", "low", "high", "groups", "fetched"),
    *("bound", "bound90", "over_true", "violations", "hot"),
)
SOURCES = tuple(RealKeys(f"SmolLM2 {n // 1024}k", "smollm2", SHIPPED[:2], n, n) for n in (2048, 4096))


@dataclass
class Tried:
    """Collect the reads of many streams at one epsilon; each list has one entry per stream, or per query."""

    certified: list[float] = field(default_factory=list)
    bounds: list[Tensor] = field(default_factory=list)
    over_true: list[Tensor] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    tokens: int = 0
    violations: int = 0
    hot: list[float] = field(default_factory=list)


def truth(streams: Streams) -> tuple[Tensor, Tensor]:
    """Return the queries (rows, g, 64, d) and, in float64, their true outputs (rows, g, 64, dv)."""
    q = streams.q[:, :, -ASKED:]
    k, v = (x[:, None, :-ASKED].double() for x in (streams.k, streams.v))
    logits = torch.matmul(q.double() * streams.scale, k.transpose(2, 3))
    return q, torch.matmul(torch.softmax(logits, -1), v)


def measure(streams: Streams, tried: Mapping[float, Tried]) -> None:
    """Read the last queries of these streams at each epsilon of `tried`, and add what was found to it."""
    spec, (q, exact) = streams.spec(), truth(streams)
    state = Tiered().open(spec)
    state.append(streams.k[:, :-ASKED], streams.v[:, :-ASKED])
    coded = state.read_certified(q, 1e6)
    assert state.hot is not None and not state.tally.tokens
    error = (coded.partial.mean.double() - exact).norm(dim=-1)
    hot = state.hot.nbytes / (2 * (spec.d + spec.dv) * int(state.seen.sum()))
    for epsilon, found in tried.items():
        state.tally = Tally()
        answers = state.read_certified(q, epsilon)
        fetched_error = (answers.partial.mean.double() - exact).norm(dim=-1)
        found.violations += int((error > coded.bound).sum() + (fetched_error > answers.bound).sum())
        found.certified += (coded.relative <= epsilon).double().mean((1, 2)).tolist()
        found.bounds.append(coded.relative.flatten())
        found.over_true.append((coded.bound / error).flatten())
        found.tokens += state.tally.queries * int(state.seen[0])
        for name in ("queries", "unfetched", "tokens"):
            setattr(found.tally, name, getattr(found.tally, name) + getattr(state.tally, name))
        found.hot.append(hot)


def line(tried: Tried) -> tuple[object, ...]:
    """Return the fields of a line from `streams` on."""
    bounds, over = torch.cat(tried.bounds), torch.cat(tried.over_true)
    tally = tried.tally
    return (
        *(len(tried.certified), len(bounds), *mean_interval(tried.certified)),
        *(tally.unfetched / tally.queries, tally.tokens / tried.tokens),
        *(float(bounds.quantile(0.5)), float(bounds.quantile(0.9)), float(over.quantile(0.5))),
        *(tried.violations, sum(tried.hot) / len(tried.hot)),
    )


def main() -> None:
    torch.set_num_threads(1)
    order = tuple(source.name for source in SOURCES)
    names = chosen(__doc__, order)
    table = ResultTable(__file__, FIELDS, names, order)
    for source in (source for source in SOURCES if source.name in names):
        everywhere, first = ({epsilon: Tried() for epsilon in EPSILONS} for _ in range(2))
        for streams in source.streams():
            measure(streams, everywhere)
            if streams.places[0][0] == 0:
                measure(streams, first)
        for layers, tried in (("all", everywhere), ("first", first)):
            for epsilon, found in tried.items():
                table.add(source.name, layers, epsilon, *line(found))
    table.save()


if __name__ == "__main__":
    main()
