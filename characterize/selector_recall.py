"""Measure the recall of selectors for the 32 tokens with the largest logits, and the bytes that they read.

    python -m characterize.selector_recall

2,048 keys of four kinds and 200 queries of normal numbers (around the clusters, if there are any), float32, one seed:
  unit     random directions of equal length, so that the largest logits are those of the nearest keys
  normal   normal numbers
  cluster  keys around 64 normal centres, with a standard deviation of 0.1
  walk     a random walk: near tokens have near keys, as halving assumes
The script prints, and writes beside this file, one line per kind and width: each selector's mean recall of the true 32
tokens, and the share of the pages that best_first reads to find them all (20 queries). The last line has the bytes that
one query reads, as a share of all keys and values. The script takes less than a minute on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from characterize.lib.recall import recall
from characterize.lib.table import save
from kvfloor import Spec, parse
from kvfloor.core.exact import Exact
from kvfloor.core.selector import Selector

KEYS, QUERIES, TOP, WIDTHS = 2048, 200, 32, (3, 8, 32, 64, 128)
SELECTORS = ("zeta", "zeta(curves=8)", "pages(pages=8)", "hip(k=128)")


def drawn(kind: str, d: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw queries (1, QUERIES, d) and keys (1, KEYS, d)."""
    q, k = torch.randn(1, QUERIES, d, generator=source), torch.randn(1, KEYS, d, generator=source)
    if kind == "unit":
        return q, k / k.norm(dim=-1, keepdim=True)
    if kind == "walk":
        return q, k.cumsum(1) / KEYS**0.5
    if kind == "cluster":
        centre = torch.randn(1, 64, d, generator=source)
        of = torch.randint(64, (QUERIES,), generator=source)
        return centre[:, of] + 0.1 * q, centre.repeat(1, KEYS // 64, 1) + 0.1 * k
    return q, k


def looked_into(q: Tensor, k: Tensor) -> float:
    """Return the mean share of the pages that the exact search reads."""
    state = parse("exact|best_first(k=32)").open(Spec(1, k.shape[2], 1))
    state.append(k, k[..., :1])
    visible = torch.full((1, 20), KEYS)
    _, looked = state.selection.search(q[:, :20], state.slots, visible)  # type: ignore[attr-defined]
    return float(looked.double().mean()) / (KEYS // 16)


def share_read(text: str, d: int) -> float:
    """Return the bytes that a decoded token reads, as a share of those of all keys and values."""
    state = parse(f"exact|{text}").open(Spec(1, d, d))
    state.append(torch.zeros(1, KEYS, d), torch.zeros(1, KEYS, d))
    state.seal()
    return state.bytes_read / (KEYS * 2 * d * 4)


def main() -> None:
    torch.set_num_threads(1)
    source = torch.Generator().manual_seed(0)
    rows = []
    for kind in ("unit", "normal", "cluster", "walk"):
        for d in WIDTHS:
            q, k = drawn(kind, d, source)
            shares = [float(recall(_selector(text), q, k, TOP).mean()) for text in SELECTORS]
            rows.append((kind, d, *(f"{share:.3f}" for share in (*shares, looked_into(q, k)))))
    reads = [f"{share_read(text, 64):.3f}" for text in SELECTORS]
    rows.append(("bytes read", 64, *reads, ""))
    save(__file__, ("keys", "d", *SELECTORS, "best_first looks into"), rows)


def _selector(text: str) -> Selector:
    method = parse(f"exact|{text}")
    assert isinstance(method, Exact)
    return method.selector


if __name__ == "__main__":
    main()
