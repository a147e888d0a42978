"""How many of the 32 tokens with the largest logits do selectors read, and at what price?

    python -m characterize.selector_recall

2,048 keys of four kinds, 200 queries of normal numbers (near the clusters where there are some), float32, one seed:
  unit     random directions of equal length, so nothing but nearness decides
  normal   normal numbers
  cluster  around 64 normal centres, a tenth as wide
  walk     a random walk: near tokens have near keys, as halving assumes
Prints, and writes beside this file, one line per kind and width: mean recall of the true 32 per selector, and the share
of the pages that best_first looks into to find them all (20 queries); last, the bytes that one query reads, as a share
of all keys and values. Under a minute on one core.
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
    """Queries (1, QUERIES, d) and keys (1, KEYS, d)."""
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
    """Mean share of the pages that the exact search looks into."""
    state = parse("exact|best_first(k=32)").open(Spec(1, k.shape[2], 1))
    state.append(k, k[..., :1])
    visible = torch.full((1, 20), KEYS)
    _, looked = state.selection.search(q[:, :20], state.slots, visible)  # type: ignore[attr-defined]
    return float(looked.double().mean()) / (KEYS // 16)


def share_read(text: str, d: int) -> float:
    """Bytes that a decoded token reads, of those of all keys and values."""
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
