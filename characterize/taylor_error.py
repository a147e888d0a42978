"""Measure the error of a truncated exponential by its degree and the size of the logits, and count what it holds.

    python -m characterize.taylor_error [--keys "synthetic,built-in 2k,SmolLM2 2k,SmolLM2 8k"]

Synthetic: 64 queries on 4,096 evicted keys of width 3, the largest |logit| set exactly, values uniform in [0, 1],
float64, one seed, answered by `window+taylor`; "measured" is the largest relative error of a coordinate.
Real: the queries of the last 16 tokens (`characterize.lib.real_keys`), in all layers of the built-in model and in 7 of
SmolLM2's 30. Each line has the median over the streams of the queries' median, with its bootstrap 95 % interval, of
  largest_logit  the largest |logit| of a query on the keys that are approximated
  measured       ||answer - exact|| / ||exact|| of the attention output, the polynomial's weights written out, so that
                 degrees are measured that no state can hold
"logits" says which keys are approximated, and around which number the exponential is expanded:
  all       all keys, around 0
  dropped   none: the first 4 and the newest 60 tokens are kept and exact, all others left out
  evicted   likewise, all others approximated around 0
  centred   likewise, around the logit of the mean key, which a state can hold
  middle    likewise, around the middle of each query's own logits: the best that any shift can do, and known to none
"shift" is that number, the median over the streams. Degree 0 is the mean of the values.
  bound         the relative error that `window+taylor` guarantees at this largest logit, for values >= 0
  least_degree  the least even degree whose guarantee is below 1 at this largest logit
  numbers       C(d+g, g) (dv + 1) at d = dv
The script takes two minutes on one core.
"""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

from characterize.lib.real_keys import KEYS, SYNTHETIC, Streams, chosen, real
from characterize.lib.table import ResultTable, median_interval
from kvfloor import Spec, parse
from kvfloor.methods.summaries.taylor import relative_error

RADII, DEGREES, WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0), (2, 4, 8, 16, 24), (3, 8, 64)
TOKENS, QUERIES = 4096, 64
LAYERS, ASKED, SINKS, NEWEST, REAL_DEGREES = 7, 16, 4, 60, (0, 2, 4, 8, 16)
LOGITS = ("dropped", "all", "evicted", "centred", "middle")
NUMBERS = tuple(f"numbers_d{d}" for d in WIDTHS)
SIZE = ("largest_logit", "low", "high", "bound", "least_degree")
FIELDS = ("keys", "logits", "streams", "shift", "degree", *SIZE, "measured", "measured_low", "measured_high", *NUMBERS)


def set_exactly(degree: int, radius: float) -> float:
    """Return the largest relative error of `window+taylor` on drawn keys with this largest |logit|."""
    source = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, n, 3, generator=source, dtype=torch.float64) for n in (QUERIES, TOKENS))
    v = torch.rand(1, TOKENS, 3, generator=source, dtype=torch.float64)
    q = q * (radius / (q @ k.transpose(1, 2)).abs().max())
    spec = Spec(1, 3, 3, dtype=torch.float64)
    state = parse(f"window(block=512)+taylor(degree={degree})@1").open(spec)
    state.append(k, v)
    wanted = torch.softmax(q @ k.transpose(1, 2), -1) @ v
    return float(((state.read(q).mean - wanted).abs() / wanted).max())


def polynomial(degree: int, x: Tensor) -> Tensor:
    """Return the Taylor polynomial of e^x of this degree."""
    total = term = torch.ones_like(x)
    for j in range(1, degree + 1):
        term = term * x / j
        total = total + term
    return total


def approximated(logits: str, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x, shift, kept) for queries q (rows, m, d) and keys k (rows, n, d), all float64.

    x (rows, m, n) are the logits, shift (rows, m, 1) the number around which the exponential is expanded, and kept (n,)
    marks the keys whose weights stay exact.
    """
    x, place, n = scale * q @ k.mT, torch.arange(k.shape[1]), k.shape[1]
    kept = (place < SINKS) | (place >= n - NEWEST)
    if logits == "all":
        kept = torch.zeros_like(kept)
    evicted = x[:, :, ~kept]
    shift = torch.zeros_like(x[:, :, :1])
    if logits == "centred":
        shift = evicted.mean(-1, keepdim=True)
    elif logits == "middle":
        shift = (evicted.amax(-1, keepdim=True) + evicted.amin(-1, keepdim=True)) / 2
    return x, shift, kept


def on(streams: Streams, logits: str, degrees: tuple[int, ...]) -> tuple[list[float], list[float], list[list[float]]]:
    """Return the rows' largest |logit|, their shifts, and per degree their errors; each is the queries' median."""
    q, k, v = (x.double() for x in streams.asked(ASKED))
    x, shift, kept = approximated(logits, q, k, streams.scale)
    y = x - shift
    top = torch.where(kept, y, 0.0).amax(-1, keepdim=True)  # so that no exponential overflows
    exact = x.softmax(-1) @ v
    errors = []
    for degree in degrees:
        others = 0.0 if logits == "dropped" else polynomial(degree, y) * torch.exp(-top)
        weights = torch.where(kept, torch.exp(y - top), others)
        answer = weights @ v / weights.sum(-1, keepdim=True)
        errors.append(((answer - exact).norm(dim=-1) / exact.norm(dim=-1)).median(1).values.tolist())
    largest = y[:, :, ~kept].abs().amax(-1)
    return largest.median(1).values.tolist(), shift.squeeze(-1).median(1).values.tolist(), errors


def least_degree(radius: float) -> int:
    """Return the least even degree whose guaranteed relative error is below 1 for logits up to `radius`."""
    degree = 2
    while relative_error(degree, radius) >= 1:
        degree += 2
    return degree


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__)
    table = ResultTable(__file__, FIELDS, names, KEYS)

    def add(first: tuple[object, ...], degree: int, size: tuple[float, ...], error: tuple[object, ...]) -> None:
        numbers = [math.comb(d + degree, degree) * (d + 1) for d in WIDTHS]
        table.add(*first, degree, *size, relative_error(degree, size[0]), least_degree(size[0]), *error, *numbers)

    for name in names:
        if name == SYNTHETIC:
            for degree in DEGREES:
                for radius in RADII:
                    add((name, "set", 1, 0), degree, (radius,) * 3, (set_exactly(degree, radius), "", ""))
            continue
        streams = list(real(name).streams(LAYERS))
        for logits in LOGITS:
            degrees = REAL_DEGREES if logits != "dropped" else (0,)
            each = [on(one, logits, degrees) for one in streams]
            sizes = [size for found, _, _ in each for size in found]
            shift = median(shift for _, found, _ in each for shift in found)
            for i, degree in enumerate(degrees):
                errors = [error for _, _, found in each for error in found[i]]
                first = (name, logits, len(sizes), shift)
                add(first, degree, median_interval(sizes), median_interval(errors))
    table.save()


if __name__ == "__main__":
    main()
