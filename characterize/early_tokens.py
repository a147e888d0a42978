"""Measure how far eviction by accumulated attention freezes a cache on its earliest tokens.

    python -m characterize.early_tokens

Streams have 2,000 tokens with normal keys and queries (d = 32, scale 1/sqrt(d), GQA group of 1). In such a stream no
early token is better than a late one. The budget is 200 tokens without sinks, and every token evicts one; 32 streams
come from one seed. Each rule gets the share of the final cache that is among the first 200 tokens (a tenth of all), as
a mean over the streams with its 95 % interval, and the median age of the held tokens. The script takes one to two
minutes on one core.
"""

from __future__ import annotations

import torch

from characterize.lib.table import mean_interval, save
from kvfloor import Spec, parse

TOKENS, BUDGET, STREAMS, WIDTH = 2000, 200, 32, 32
RULES = {
    "sum, none recent": "h2o(sinks=0,recent=0,block=1)",
    "sum, 16 recent": "h2o(sinks=0,recent=16,block=1)",
    "sum, half recent": "h2o(sinks=0,block=1)",
    "mean, none recent": "h2o(score=mean,sinks=0,recent=0,block=1)",
    "mean, half recent": "h2o(score=mean,sinks=0,block=1)",
    "decay, half recent": "h2o(score=decay,sinks=0,block=1)",
    "last query": "tova(sinks=0,recent=0,block=1)",
    "random": "random(block=1)",
    "window": "window(block=1)",
}


def main() -> None:
    torch.set_num_threads(1)
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(STREAMS, TOKENS, WIDTH, generator=source) for _ in range(3))
    rows = []
    for name, rule in RULES.items():
        state = parse(f"{rule}@{BUDGET}").open(Spec(STREAMS, WIDTH, WIDTH, scale=WIDTH**-0.5))
        state.step(q.unsqueeze(1), k, v)
        held = state.slots.view().position[:, :BUDGET]  # type: ignore[attr-defined]
        early = (held < BUDGET).double().mean(1).tolist()
        ages = (TOKENS - 1 - held).double().median(1).values.mean()
        rows.append((name, f"{rule}@{BUDGET}", STREAMS, *mean_interval(early), int(ages)))
    save(__file__, ("rule", "method", "streams", "early", "low", "high", "median_age"), rows)


if __name__ == "__main__":
    main()
