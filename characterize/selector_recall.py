"""Measure what selectors find: the tokens with the largest logits, and the softmax mass of the tokens that they read.

    python -m characterize.selector_recall [--keys "synthetic,built-in 2k,SmolLM2 2k,SmolLM2 8k"]

Synthetic: 2,048 keys of four kinds and 200 queries of normal numbers (around the clusters, if there are any), float32,
scale d^-1/2, one seed:
  unit     random directions of equal length, so that the largest logits are those of the nearest keys
  normal   normal numbers
  cluster  keys around 64 normal centres, with a standard deviation of 0.1
  walk     a random walk: near tokens have near keys, as halving assumes
Real: the queries of the last 16 tokens of a text, over the keys before them (`characterize.lib.real_keys`), in all
layers of the built-in model and in 7 of SmolLM2's 30.
Each line has one selector's mean recall of the 32 and the 64 tokens of largest logit, and the mean softmax mass of what
it reads, with 95 % intervals (over the queries of synthetic keys, over the streams of real ones). "read" is the mean
number of tokens read, 128 or about 512 on real keys. `newest` reads the first 4 and the newest, whatever the query;
"gain" is the mass beyond that of `newest` with as many tokens, the mean of the streams' differences, and "more" the
number of streams in which it is positive.
"bytes" is what one query reads, its index included, as a share of all keys and values. "visited" is the share of the
pages that best_first looks into to find the k best tokens (20 queries). The script takes four minutes on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from characterize.lib.mass import mass_of
from characterize.lib.real_keys import KEYS, SYNTHETIC, Streams, chosen, real
from characterize.lib.recall import share_of_best, tokens_read
from characterize.lib.table import ResultTable, mean_interval
from kvfloor import Spec, parse
from kvfloor.core.exact import Exact

COUNT, QUERIES, WIDTHS, KINDS = 2048, 200, (3, 8, 32, 64, 128), ("unit", "normal", "cluster", "walk")
LAYERS, ASKED, SEARCHED = 7, 16, 20
FOR_SYNTHETIC = ("zeta", "zeta(curves=8)", "hip(k=128)", "pages(pages=8)", "best_first(k=32)")
FOR_REAL = {  # what reads as many tokens as `newest`
    "newest(128)": ("top_k(k=128)", "zeta(k=128)", "zeta(k=128,curves=8)", "hip(k=92)", "pages(pages=7)"),
    "newest(512)": ("top_k(k=512)", "zeta(k=512,curves=16)", "hip(k=476)", "pages(pages=31)"),
    "newest(32)": ("best_first(k=32)",),
}
INTERVALS = tuple(f"{name}{end}" for name in ("recall32", "recall64", "mass") for end in ("", "_low", "_high"))
FIELDS = (
    "keys",
    "kind",
    "d",
    "selector",
    "streams",
    "read",
    "bytes",
    *INTERVALS,
    "gain",
    "gain_low",
    "gain_high",
    "more",
    "visited",
)


def drawn(kind: str, d: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw queries (1, QUERIES, d) and keys (1, COUNT, d)."""
    q, k = torch.randn(1, QUERIES, d, generator=source), torch.randn(1, COUNT, d, generator=source)
    if kind == "unit":
        return q, k / k.norm(dim=-1, keepdim=True)
    if kind == "walk":
        return q, k.cumsum(1) / COUNT**0.5
    if kind == "cluster":
        centre = torch.randn(1, 64, d, generator=source)
        of = torch.randint(64, (QUERIES,), generator=source)
        return centre[:, of] + 0.1 * q, centre.repeat(1, COUNT // 64, 1) + 0.1 * k
    return q, k


def read_by(text: str, q: Tensor, k: Tensor) -> Tensor:
    """Return the mask (rows, m, n) of the keys that the selector reads, or that `newest` does."""
    if not text.startswith("newest"):
        method = parse(f"exact|{text}")
        assert isinstance(method, Exact)
        return tokens_read(method.selector, q, k)
    n = k.shape[1]
    place = torch.arange(n)
    return ((place < 4) | (place >= n + 4 - int(text[7:-1]))).expand(*q.shape[:2], n)


def pages_visited(text: str, q: Tensor, k: Tensor) -> float:
    """Return the mean share of the pages that the exact search reads."""
    rows, n, d = k.shape
    state = parse(f"exact|{text}").open(Spec(rows, d, 1))
    state.append(k, k[..., :1])
    visible = torch.full((rows, SEARCHED), n)
    _, visited = state.selection.search(q[:, :SEARCHED], state.slots, visible)  # type: ignore[attr-defined]
    return float(visited.double().mean()) / -(-n // 16)


def share_read(text: str, n: int, d: int) -> float:
    """Return the bytes that a decoded token reads, as a share of those of all n keys and values."""
    if text.startswith("newest"):
        return int(text[7:-1]) / n
    state = parse(f"exact|{text}").open(Spec(1, d, d))
    state.append(torch.zeros(1, n, d), torch.zeros(1, n, d))
    state.seal()
    return state.bytes_read / (n * 2 * d * 4)


def found(text: str, parts: list[tuple[Tensor, Tensor]], scale: float, by_query: bool) -> Tensor:
    """Return (streams or queries, 4): tokens read, recall of the best 32 and 64, mass; parts are queries and keys."""
    measured: list[Tensor] = []
    for q, k in parts:
        mask = read_by(text, q, k)
        shares = (share_of_best(mask, q, k, 32), share_of_best(mask, q, k, 64), mass_of(mask, q, k, scale))
        each = torch.stack([mask.sum(-1).double(), *shares], -1)  # (rows, queries, 4)
        measured.append(each.flatten(0, 1) if by_query else each.mean(1))
    return torch.cat(measured)


def line(text: str, parts: list[tuple[Tensor, Tensor]], values: Tensor, base: Tensor | None) -> list[object]:
    """Return the fields of one selector from "streams" on; base: the values of `newest` with as many tokens."""
    n, d = parts[0][1].shape[1:]
    intervals = [number for i in (1, 2, 3) for number in mean_interval(values[:, i].tolist())]
    gain: list[object] = [""] * 4
    if base is not None:
        difference = values[:, 3] - base[:, 3]
        gain = [*mean_interval(difference.tolist()), int((difference > 0).sum())]
    visited = [pages_visited(text, q, k) for q, k in parts] if text.startswith("best_first") else []
    shown = sum(visited) / len(visited) if visited else ""
    streams = sum(len(k) for _, k in parts)
    return [streams, float(values[:, 0].mean()), share_read(text, n, d), *intervals, *gain, shown]


def asked(streams: Streams) -> tuple[Tensor, Tensor]:
    q, k, _ = streams.asked(ASKED)
    return q, k


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__)
    table = ResultTable(__file__, FIELDS, names, KEYS)
    for name in names:
        if name == SYNTHETIC:
            source = torch.Generator().manual_seed(0)
            for kind in KINDS:
                for d in WIDTHS:
                    parts = [drawn(kind, d, source)]
                    for text in FOR_SYNTHETIC:
                        table.add(name, kind, d, text, *line(text, parts, found(text, parts, d**-0.5, True), None))
        else:
            streams = list(real(name).streams(LAYERS))
            parts, scale = [asked(one) for one in streams], streams[0].scale
            d = parts[0][0].shape[2]
            for newest, texts in FOR_REAL.items():
                base = found(newest, parts, scale, False)
                table.add(name, "real", d, newest, *line(newest, parts, base, None))
                for text in texts:
                    table.add(name, "real", d, text, *line(text, parts, found(text, parts, scale, False), base))
    table.save()


if __name__ == "__main__":
    main()
