"""Measure the error of a truncated exponential by its degree and the largest logit, and count the numbers it holds.

    python -m characterize.taylor_error

  bound     the relative error that `window+taylor` guarantees for values >= 0
  measured  the largest relative error over 64 queries on 4,096 evicted keys of width 3: the largest |logit| is exactly
            the bound's radius, values are uniform in [0, 1], float64, one seed
  numbers   C(d+g, g) (dv + 1) at d = dv
The script takes seconds on one core.
"""

from __future__ import annotations

import math

import torch

from characterize.lib.table import save
from kvfloor import Spec, parse
from kvfloor.methods.summaries.taylor import relative_error

RADII, DEGREES, WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0), (2, 4, 8, 16, 24), (3, 8, 64)
TOKENS, QUERIES = 4096, 64


def measured(degree: int, radius: float) -> float:
    source = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 3, generator=source, dtype=torch.float64) for n in (QUERIES, TOKENS))
    v = torch.rand(1, TOKENS, 3, generator=source, dtype=torch.float64)
    q = q * (radius / (q @ k.transpose(1, 2)).abs().max())
    spec = Spec(1, 3, 3, dtype=torch.float64)
    state = parse(f"window(block=512)+taylor(degree={degree})@1").open(spec)
    state.append(k, v)
    wanted = torch.softmax(q @ k.transpose(1, 2), -1) @ v
    return float(((state.read(q).mean - wanted).abs() / wanted).max())


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for degree in DEGREES:
        numbers = [math.comb(d + degree, degree) * (d + 1) for d in WIDTHS]
        for radius in RADII:
            rows.append((degree, radius, relative_error(degree, radius), measured(degree, radius), *numbers))
    save(__file__, ("degree", "largest_logit", "bound", "measured", *(f"numbers_d{d}" for d in WIDTHS)), rows)


if __name__ == "__main__":
    main()
