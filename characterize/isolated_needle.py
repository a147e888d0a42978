"""Count how often selectors find the one key that answers a query, with and without a hint in its neighbours.

    python -m characterize.isolated_needle [--keys "synthetic,built-in 2k,SmolLM2 2k,SmolLM2 8k"]

Synthetic: 1,024 keys of width 64 come from a random walk (near tokens have near keys).
  isolated  one key, at a uniformly drawn place, is replaced by a long vector of a new direction, and the query has that
            direction: the key's neighbours give no hint
  smooth    the query is a key of the unchanged walk: the key's neighbours are like it
Real: all layers of the built-in model and 7 of SmolLM2's 30 (`characterize.lib.real_keys`). A needle is a token that
gets more than half of a query's softmax mass and is neither one of the first 4 nor one of the newest 64. Among the
queries of the last 512 tokens that have one, up to 16 per stream are drawn; "share" is how many have one.
"neighbours" is the median share of all keys that have a smaller logit than a key next to the needle: 0.5 is no hint.
"length" is the median share of all keys that are shorter than the needle.
Each selector gets the number of queries for which it reads the key of largest logit, with Wilson's 95 % interval, and
the bytes that a query reads, its index included, as a share of all keys and values. As many tokens drawn at random
would find the key in that share of the queries. The script takes two minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from characterize.lib.real_keys import KEYS, SYNTHETIC, RealKeys, Streams, chosen, real
from characterize.lib.recall import recall
from characterize.lib.table import ResultTable
from kvfloor import Spec, parse
from kvfloor.core.exact import Exact
from kvfloor.statistics import wilson_interval

TOKENS, WIDTH, STREAMS, AT_ONCE = 1024, 64, 400, 50
LAYERS, LAST, SINKS, NEWEST, PER_STREAM, HALF = 7, 512, 4, 64, 16, 0.5
FIELDS = (
    "keys",
    "needle",
    "selector",
    "found",
    "queries",
    "low",
    "high",
    "bytes_read",
    "share",
    "neighbours",
    "length",
)
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


def drawn(isolated: bool) -> tuple[Tensor, Tensor]:
    """Draw one query (STREAMS, 1, d) per stream of keys (STREAMS, n, d)."""
    source = torch.Generator().manual_seed(0)
    k = torch.randn(STREAMS, TOKENS, WIDTH, generator=source).cumsum(1) / TOKENS**0.5
    place = torch.randint(64, TOKENS - 64, (STREAMS,), generator=source)  # neither among the sinks nor the newest
    row = torch.arange(STREAMS)
    if not isolated:
        return k[row, place].unsqueeze(1), k
    away = torch.nn.functional.normalize(torch.randn(STREAMS, WIDTH, generator=source), dim=1)
    k[row, place] = away * 2.0 * k.norm(dim=2).max()
    return away.unsqueeze(1), k


def needles(streams: Streams) -> Tensor:
    """Return the mask (rows, g, LAST) of the newest queries that give more than half of their mass to a needle."""
    n = streams.k.shape[1]
    place, position = torch.arange(n), torch.arange(n - LAST, n).unsqueeze(1)
    logits = streams.scale * streams.q[:, :, -LAST:] @ streams.k.mT.unsqueeze(1)
    largest, key = logits.masked_fill(place > position, -torch.inf).softmax(-1).max(-1)
    return (largest > HALF) & (key >= SINKS) & (key <= position.squeeze(1) - NEWEST)


def real_queries(source: RealKeys) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Return queries (1, 1, d) with their keys (1, n, d), and the share of all queries that have a needle."""
    generator, found, masks = torch.Generator().manual_seed(0), [], []
    for streams in source.streams(LAYERS):
        mask, n = needles(streams), streams.k.shape[1]
        masks.append(mask.double().mean())
        for row in range(len(mask)):
            have = mask[row].nonzero()
            for head, i in have[torch.randperm(len(have), generator=generator)[:PER_STREAM]].tolist():
                at = n - LAST + i
                found.append((streams.q[row : row + 1, head, at : at + 1], streams.k[row : row + 1, : at + 1]))
    return found, float(torch.stack(masks).mean())


def hints(asked: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the median share of keys with a smaller logit than a needle's neighbours, and of keys shorter than it."""
    near, short = [], []
    for q, k in asked:
        logits, length = (q @ k.mT).squeeze(1), k.norm(dim=2)  # (rows, n)
        best = logits.argmax(1, keepdim=True)
        for step in (-1, 1):
            beside = logits.gather(1, (best + step).clamp(0, k.shape[1] - 1))
            near.append((logits < beside).double().mean(1))
        short.append((length < length.gather(1, best)).double().mean(1))
    return float(torch.cat(near).median()), float(torch.cat(short).median())


def kinds(name: str) -> Iterator[tuple[str, list[tuple[Tensor, Tensor]], float | str]]:
    """Yield each kind of needle with its queries, keys, and how many of all queries have one."""
    if name == SYNTHETIC:
        for kind in ("isolated", "smooth"):
            q, k = drawn(kind == "isolated")
            yield kind, [(q[i : i + AT_ONCE], k[i : i + AT_ONCE]) for i in range(0, STREAMS, AT_ONCE)], ""
    else:
        yield "real", *real_queries(real(name))


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__)
    table = ResultTable(__file__, FIELDS, names, KEYS)
    for name in names:
        for kind, asked, share in kinds(name):
            count, told = sum(len(q) for q, _ in asked), hints(asked)
            for text in SELECTORS:
                method = parse(f"exact|{text}")
                assert isinstance(method, Exact)
                right = sum(int(recall(method.selector, q, k, 1).sum()) for q, k in asked)
                n, d = asked[0][1].shape[1:]
                state = method.open(Spec(1, d, d))
                state.append(torch.zeros(1, n, d), torch.zeros(1, n, d))
                state.seal()
                read = state.bytes_read / (n * 2 * d * 4)
                table.add(name, kind, text, right, count, *wilson_interval(right, count), read, share, *told)
    table.save()


if __name__ == "__main__":
    main()
