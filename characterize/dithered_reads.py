"""Compare what codes certify with and without dither, at several numbers of bits, on real models' keys.

    python -m characterize.dithered_reads [--keys "SmolLM2 2k,SmolLM2 chat 2k"]

Reads three layers on the first text of sources of `characterize.certified_reads`: the queries of the last 64 tokens
attend to all tokens before them, keys and values in bfloat16. They do not depend on the dither, as attention was exact
when they were recorded.
Each stream (a kv head of a layer) has a dither of its own. Each line is one `tiered(keys=B,values=B,delta=D)`:
  bits, delta    B and D; delta 0: no dither, and bounds that always hold
  certified      share of queries whose error the codes alone bound by 1 %, relative to the largest value norm
  low, high      its 95 % interval over streams
  certified2     the same to 2 %, with `low2` and `high2`; `certified02` and `certified05`: to 0.2 % and to 0.5 %
  bound          median relative bound of the answers from the codes alone, and its 90th percentile (`bound90`)
  over_true      median of bound over true error, of these answers; truth is computed in float64
  violations     answers from the codes alone whose true error exceeds their bound, and 95 % upper limit of their share
                 (`limit`, Clopper and Pearson; as if the queries' errors were independent, which those of one stream
                 are not)
  fetched        share of all tokens that a group of queries fetches exactly for 1 %, the mean over groups
  read           bytes read for 1 %, with those of fetched tokens, over those of all tokens in 16 bits
  hot            bytes of codes, sums and ranges over the bytes of the tokens in 16 bits
Rows of other sources stay in the table. A minute a source on one core, once recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import Tensor

from characterize.certified_reads import ASKED, SOURCES, rows_of, truth
from characterize.lib.real_keys import Streams, chosen
from characterize.lib.table import ResultTable, mean_interval
from kvfloor.methods.tiered.tiered import Tiered
from kvfloor.statistics import clopper_pearson_limit

FIELDS = (
    *("keys", "bits", "delta", "streams", "queries", "certified02", "certified05", "certified", "low", "high"),
    *("certified2", "low2", "high2", "bound", "bound90", "over_true", "violations", "limit", "fetched", "read", "hot"),
)
KEYS = ("SmolLM2 2k", "SmolLM2 chat 2k")
LAYERS = 3
TRIED = ((8, 0.0), (8, 1e-3), (6, 0.0), (6, 1e-3))
STATED = 0.01
SEED = 0x5EED


@dataclass
class Dithered:
    """Collect the reads of many streams by one method; each list has one entry per stream."""

    relative: list[Tensor] = field(default_factory=list)
    over_true: list[Tensor] = field(default_factory=list)
    violations: int = 0
    fetched: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)

    def add(self, method: Tiered, stream: Streams, number: int) -> None:
        """Read the last queries of one stream, the `number`-th."""
        spec, (q, exact) = stream.spec(seed=SEED, row_ids=(number,)), truth(stream)
        state = method.open(spec)
        state.append(stream.k[:, :-ASKED], stream.v[:, :-ASKED])
        assert state.hot is not None
        found, _ = state.hot.glimpse(q.flatten(1, 2), None)[0].answer(method.delta)
        coded = state.hot.upright(found)
        error = (coded.partial.mean.double() - exact.flatten(1, 2)).norm(dim=-1)
        state.read_certified(q, STATED)
        tally, tokens = state.tally, int(state.seen)
        self.relative.append(coded.relative.flatten())
        self.over_true.append((coded.bound / error).flatten())
        self.violations += int((error > coded.bound).sum())
        self.fetched.append(tally.tokens / (tally.queries * tokens))
        self.read.append((state.bytes_read + tally.bytes / tally.queries) / (tokens * spec.token_bytes))
        self.hot.append(state.hot.nbytes / (tokens * spec.token_bytes))

    def line(self) -> Iterator[object]:
        """Yield the fields of a line from `streams` on."""
        bounds, over = torch.cat(self.relative), torch.cat(self.over_true)
        yield from (len(self.relative), len(bounds))
        for epsilon in (0.002, 0.005):
            yield float((bounds <= epsilon).double().mean())
        for epsilon in (STATED, 0.02):
            yield from mean_interval([float((one <= epsilon).double().mean()) for one in self.relative])
        yield from (float(bounds.quantile(0.5)), float(bounds.quantile(0.9)), float(over.quantile(0.5)))
        yield from (self.violations, clopper_pearson_limit(self.violations, len(bounds), 0.05))
        yield from (fmean(self.fetched), fmean(self.read), fmean(self.hot))


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__, KEYS)
    rows = ResultTable(__file__, FIELDS, names, KEYS)
    for name in names:
        source, _ = SOURCES[name]
        found = {tried: Dithered() for tried in TRIED}
        number = 0
        for streams in replace(source, texts=source.texts[:1]).streams(LAYERS):
            for stream in rows_of(streams):
                for (bits, delta), one in found.items():
                    one.add(Tiered(keys=bits, values=bits, delta=delta), stream, number)
                number += 1
        for (bits, delta), one in found.items():
            rows.add(name, bits, delta, *one.line())
    rows.save()


if __name__ == "__main__":
    main()
