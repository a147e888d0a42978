"""Count how often selectors find the one key that answers a query, with and without a hint in its neighbours.

    python -m characterize.isolated_needle

1,024 keys of width 64 come from a random walk (near tokens have near keys).
  isolated  one key, at a uniformly drawn place, is replaced by a long vector of a new direction, and the query has that
            direction: the key's neighbours give no hint
  smooth    the query is a key of the unchanged walk: the key's neighbours are like it
Each selector gets the number of 400 streams in which it reads the key of largest logit, with Wilson's 95 % interval,
and the bytes that a query reads, its index included, as a share of all keys and values. As many tokens drawn at random
would find the key in that share of the streams. The script takes half a minute on one core.
"""

from __future__ import annotations

import torch

from characterize.lib.recall import recall
from characterize.lib.table import save
from kvfloor import Spec, parse
from kvfloor.core.exact import Exact
from kvfloor.statistics import wilson_interval

TOKENS, WIDTH, STREAMS = 1024, 64, 400
SELECTORS = (
    "hip(k=64)",
    "hip(k=128)",
    "hip(k=256)",
    "hip(k=512)",
    "hip(k=1024)",
    "pages(pages=8)",
    "zeta(k=64)",
    "best_first(k=64)",
    "top_k(k=64)",
)


def streams(isolated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    k = torch.randn(STREAMS, TOKENS, WIDTH, generator=source).cumsum(1) / TOKENS**0.5
    place = torch.randint(64, TOKENS - 64, (STREAMS,), generator=source)  # neither among the sinks nor the newest
    row = torch.arange(STREAMS)
    if not isolated:
        return k[row, place].unsqueeze(1), k
    away = torch.nn.functional.normalize(torch.randn(STREAMS, WIDTH, generator=source), dim=1)
    k[row, place] = away * 2.0 * k.norm(dim=2).max()
    return away.unsqueeze(1), k


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for kind in ("isolated", "smooth"):
        q, k = streams(kind == "isolated")
        for text in SELECTORS:
            method = parse(f"exact|{text}")
            assert isinstance(method, Exact)
            right = sum(
                int(recall(method.selector, q[i : i + 50], k[i : i + 50], 1).sum()) for i in range(0, STREAMS, 50)
            )
            state = method.open(Spec(1, WIDTH, WIDTH))
            state.append(k[:1], k[:1])
            state.seal()
            share = state.bytes_read / (TOKENS * 2 * WIDTH * 4)
            rows.append((kind, text, right, STREAMS, *wilson_interval(right, STREAMS), share))
    save(__file__, ("needle", "selector", "found", "streams", "low", "high", "bytes_read"), rows)


if __name__ == "__main__":
    main()
