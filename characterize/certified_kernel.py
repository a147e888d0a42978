"""Compare the bounds of the kernel of certified reads with those of torch, on real models' keys; needs a C compiler.

    python -m characterize.certified_kernel [--keys "SmolLM2 2k,SmolLM2 chat 2k"]

Reads the first text of sources of `characterize.certified_reads`: every fourth of the last 64 tokens' queries attends
to all tokens before them, in bfloat16. Each line is one epsilon:
  kernel, torch    share of queries that each of the two certifies without an exact token
  median, most     the kernel's bound over that of torch: the median, the 90th percentile (`most90`), the largest
  unread           mean share of the mass whose values the kernel leaves unread for this epsilon
  violations       answers of the kernel that err more than their bound, for this epsilon or with all values read
Rows of other sources stay in the table. Three minutes a source on one core, once recorded.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from characterize.certified_reads import ASKED, SOURCES, rows_of, truth
from characterize.lib.real_keys import chosen
from characterize.lib.table import ResultTable, Row
from kvfloor.methods.tiered import kernel
from kvfloor.methods.tiered.tiered import Tiered

FIELDS = ("keys", "queries", "epsilon", "kernel", "torch", "median", "most90", "most", "unread", "violations")
KEYS = ("SmolLM2 2k", "SmolLM2 chat 2k")
EPSILONS = (0.01, 0.02, 0.05)


def measure(name: str) -> list[Row]:
    """Return one row per epsilon for the first text of a source of keys."""
    source, layers = SOURCES[name]
    theirs: list[Tensor] = []
    ratios: list[Tensor] = []
    sure: list[list[Tensor]] = [[] for _ in EPSILONS]
    unread: list[list[Tensor]] = [[] for _ in EPSILONS]
    violations = [0 for _ in EPSILONS]
    for streams in replace(source, texts=source.texts[:1]).streams(layers):
        for stream in rows_of(streams):
            q, exact = truth(stream)
            state = Tiered().open(stream.spec())
            state.append(stream.k[:, :-ASKED], stream.v[:, :-ASKED])
            assert state.hot is not None
            if not kernel.serves(state.hot):
                raise SystemExit("the kernel does not serve these keys, or there is no C compiler: install gcc")
            for token in range(0, ASKED, 4):
                asked, right = q[:, :, token].contiguous(), exact[:, :, token]
                found = kernel.read(state.hot, asked, None)
                wanted, _ = state.hot.glimpse(asked, None)[0].answer()
                wrong = int(((found.partial.mean.double() - right).norm(dim=-1) > found.bound).sum())
                ratios.append((found.bound / wanted.bound).flatten())
                theirs.append(wanted.relative.flatten())
                for i, epsilon in enumerate(EPSILONS):
                    given = kernel.arguments(state.hot, asked, None, epsilon)
                    kernel.run(given, 1)
                    some = kernel.found(given)
                    error = (some.partial.mean.double() - right).norm(dim=-1)
                    violations[i] += wrong + int((error > some.bound).sum())
                    sure[i].append(some.within(epsilon).flatten().double())
                    unread[i].append(given["unread"].flatten().double())
    ratio, torchs = torch.cat(ratios), torch.cat(theirs)
    larger = [float(ratio.quantile(share)) for share in (0.5, 0.9, 1.0)]
    return [
        (name, len(ratio), epsilon, float(torch.cat(sure[i]).mean()), float((torchs <= epsilon).double().mean()))
        + (*larger, float(torch.cat(unread[i]).mean()), violations[i])
        for i, epsilon in enumerate(EPSILONS)
    ]


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__, KEYS)
    results = ResultTable(__file__, FIELDS, names, KEYS)
    for name in names:
        for row in measure(name):
            results.add(*row)
    results.save()


if __name__ == "__main__":
    main()
