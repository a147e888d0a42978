"""Measure over how many keys each layer spreads its attention, which is what a pyramid of budgets bets on.

    python -m characterize.attention_spread [--keys "built-in 2k,SmolLM2 2k,SmolLM2 8k"]

All layers of recorded models (`characterize.lib.real_keys`); the queries of a text's last 16 tokens attend to all
tokens before them. Each line has one layer, and the medians over its kv heads on all texts of
  keys95     the number of keys that carry 95 % of a query's softmax mass, the mean over the head's queries; with its
             bootstrap 95 % interval, and the least and the largest of the layer's heads, each the median of its texts
  effective  the exponential of the softmax weights' entropy, the mean over the queries
  error      ||answer - exact|| / ||exact|| of the attention output for `sinks(4)` at a sixteenth of the tokens,
             and the newest 16 of an open block
and the layer's share of a budget under PyramidKV's rule. The last line of each source has Spearman's rank correlation
of depth with keys95 and with the error, over all kv heads and texts. The script takes two minutes on one core.
"""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor

from characterize.lib.mass import effective_keys, keys_for_mass, softmax_weights
from characterize.lib.real_keys import REAL, Streams, chosen, real
from characterize.lib.table import ResultTable, median_interval
from kvfloor import parse
from kvfloor.hf.allocate import pyramid

ASKED, SHARE = 16, 16
FIELDS = ("keys", "layer", "streams", "keys95", "low", "high", "least", "most", "effective", "error", "pyramid")


def error(streams: Streams, budget: int) -> Tensor:
    """Return the relative error (rows,) of the attention output for the first 4 and the newest tokens."""
    q, k, v = streams.asked(ASKED)
    state = parse(f"sinks(4)@{budget}").open(streams.spec())
    state.append(k, v)
    exact = softmax_weights(q, k, streams.scale) @ v.double()
    return (state.read(q).mean.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two lists of numbers (n,); equal numbers share their mean rank."""
    ranks = [(x.unsqueeze(1) > x).sum(1) + ((x.unsqueeze(1) == x).sum(1) - 1) / 2 for x in (a, b)]
    return float(torch.corrcoef(torch.stack([rank.double() for rank in ranks]))[0, 1])


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__, sources := tuple(source.name for source in REAL))
    table = ResultTable(__file__, FIELDS, names, sources)
    for name in names:
        found: dict[int, list[Tensor]] = {}  # per layer: (texts) of (rows, 3)
        for streams in real(name).streams():
            q, k, _ = streams.asked(ASKED)
            weights = softmax_weights(q, k, streams.scale)
            each = [keys_for_mass(weights, 0.95).double().mean(1), effective_keys(weights).mean(1)]
            each.append(error(streams, k.shape[1] // SHARE))
            found.setdefault(streams.places[0][0], []).append(torch.stack(each, 1))
        shares = pyramid(len(found))
        for layer, texts in found.items():
            values = torch.cat(texts)
            heads = torch.stack(texts)[..., 0].median(0).values.tolist()
            medians = [median(values[:, i].tolist()) for i in (1, 2)]
            interval = median_interval(values[:, 0].tolist())
            table.add(name, layer, len(values), *interval, min(heads), max(heads), *medians, shares[layer][0])
        depth = torch.cat([torch.full((len(torch.cat(texts)),), layer) for layer, texts in found.items()])
        values = torch.cat([torch.cat(texts) for texts in found.values()])
        ranks = [correlation(depth, values[:, i]) for i in (0, 2)]
        table.add(name, "correlation with depth", len(depth), ranks[0], *[""] * 5, ranks[1], "")
    table.save()


if __name__ == "__main__":
    main()
