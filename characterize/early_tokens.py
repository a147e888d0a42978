"""Measure how far eviction by accumulated attention freezes a cache on its earliest tokens.

    python -m characterize.early_tokens [--keys "synthetic,built-in 2k,SmolLM2 2k,SmolLM2 8k"]

Synthetic streams have 2,000 tokens with normal keys and queries (d = 32, scale 1/sqrt(d), GQA group of 1). In such a
stream no early token is better than a late one. 32 streams come from one seed. Real streams are those of
`characterize.lib.real_keys`: all layers of the built-in model, 4 of SmolLM2's 30. Every token evicts one, as in the
paper (block=1), or every 16th token evicts 16 (block=16); at 8k tokens only the latter is affordable. The budget is a
tenth of the tokens, without sinks. Each rule gets the share of the final cache that is among the first tenth of all
tokens, as a mean over the streams with its 95 % interval, and the median age of the held tokens. The rule "future" is
no method: it keeps the tokens with the most attention by the last 64 queries of exact attention, so it shows how many
early tokens are worth keeping. The synthetic streams take two minutes on one core, the real ones three.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from characterize.lib.real_keys import KEYS, SYNTHETIC, Streams, chosen, real
from characterize.lib.table import ResultTable, mean_interval
from kvfloor import parse
from kvfloor.core.bounded import Bounded

TOKENS, STREAMS, WIDTH, NEWEST = 2000, 32, 32, 64
LAYERS = 4  # of real streams
BLOCKS = {SYNTHETIC: (1,), "built-in 2k": (1, 16), "SmolLM2 2k": (1, 16), "SmolLM2 8k": (16,)}
FIELDS = ("keys", "rule", "method", "tokens", "streams", "early", "low", "high", "median_age")
RULES = {
    "sum, none recent": "h2o(sinks=0,recent=0)",
    "sum, 16 recent": "h2o(sinks=0,recent=16)",
    "sum, half recent": "h2o(sinks=0)",
    "mean, none recent": "h2o(score=mean,sinks=0,recent=0)",
    "mean, half recent": "h2o(score=mean,sinks=0)",
    "decay, half recent": "h2o(score=decay,sinks=0)",
    "last query": "tova(sinks=0,recent=0)",
    "random": "random",
    "window": "window",
}


def synthetic() -> Streams:
    """Draw the streams without content."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(STREAMS, TOKENS, WIDTH, generator=source) for _ in range(3))
    return Streams(q.unsqueeze(1), k, v, WIDTH**-0.5)


def method(rule: str, budget: int, block: int) -> Bounded:
    """Return the rule with its budget in tokens, evicting after every `block`-th token."""
    parsed = parse(f"{rule}@{budget}")
    assert isinstance(parsed, Bounded)
    return replace(parsed, block=block)


def held(streams: Streams, rule: Bounded, budget: int) -> Tensor:
    """Return the positions (rows, budget) of the tokens that the rule holds after the last eviction."""
    state = rule.open(streams.spec())
    end = streams.k.shape[1] // rule.block * rule.block
    state.step(streams.q[:, :, :end], streams.k[:, :end], streams.v[:, :end])
    return state.slots.view().position[:, :budget]  # type: ignore[attr-defined]


def wanted(streams: Streams, budget: int) -> Tensor:
    """Return the positions (rows, budget) of the tokens with the most attention by the newest queries."""
    n = streams.k.shape[1]
    logits = streams.scale * streams.q[:, :, -NEWEST:].double() @ streams.k.double().mT.unsqueeze(1)
    later = torch.arange(n) > torch.arange(n - NEWEST, n).unsqueeze(1)
    mass = logits.masked_fill(later, -torch.inf).softmax(-1).sum((1, 2))
    return mass.topk(budget, dim=1).indices


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__)
    table = ResultTable(__file__, FIELDS, names, KEYS)
    for name in names:
        streams = synthetic() if name == SYNTHETIC else real(name).together(LAYERS)
        count, n, _ = streams.k.shape
        budget = n // 10
        found = [("future", "", wanted(streams, budget))] if name != SYNTHETIC else []
        for block in BLOCKS[name]:
            made = [(rule, method(text, budget, block)) for rule, text in RULES.items()]
            found += [(rule, str(one), held(streams, one, budget)) for rule, one in made]
        for rule, text, positions in found:
            early = (positions < budget).double().mean(1).tolist()
            age = (n - 1 - positions).double().median(1).values.mean()
            table.add(name, rule, text, n, count, *mean_interval(early), int(age))
    table.save()


if __name__ == "__main__":
    main()
