"""Compare successors of the seed papers with `balance`, samples and clusters, at equal bytes.

    python -m characterize.successors [--keys synthetic,"SmolLM2 2k"]

A stream of tokens is held in `size` units of a token's bytes: the first 4 tokens and the newest ones in full, and the
others as weighted tokens, which take the rest. Methods, in the column `method`:
    recent               only the newest tokens, in the whole size
    uniform              a uniform sample, weights n / s
    thinformer           halved by walks with the kernel of Thinformer and Express (arXiv 2606.10944)
    balance              halved by walks with the kernel of kvfloor's `balance`
    wildcat(h)           randomly pivoted Cholesky and Nystrom's weights (arXiv 2602.10056), h = 1 / tau^2
    clusters             Ward's clusters with summed values and counts, as in the product
    nystrom(h)           the same clusters with projected values and masses, as in the product; h = 1/2 unless given
    uniform+taylor(g), balance+taylor(g)   Taylor sums of degree g beside a coreset of the remainder (arXiv 2606.07205);
                         the sums of degree 1 take 33 units at d = dv = 64
All but `nystrom` and `clusters` see the whole stream at once, which favours them; weights (4 bytes) are not counted.
Rows of `balance(product)` are the real `balance@size`, which streams with a budget.

Real keys (`characterize.lib.real_keys`, 4 layers of SmolLM2): the queries of the text's last 16 tokens; a stream's
error is |answer - exact| / |exact| over them. Synthetic ones: 1,024 unit keys and unit values in d dimensions, either
uniform or around 16 centres, no tokens in full, scale 1, and 64 queries of length rho, half of them along a key; the
error is the largest |answer - exact| over the queries. Columns: mean, median with its bootstrap 95 % interval, and
largest error over the streams. The script takes a quarter of an hour on one core.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from characterize.lib import coresets
from characterize.lib.coresets import Coreset, Sums, answer
from characterize.lib.real_keys import SYNTHETIC, chosen, real
from characterize.lib.table import ResultTable, median_interval
from kvfloor import parse
from kvfloor.methods.summaries.clusters import ClusterMeans
from kvfloor.methods.summaries.nystrom import Nystrom

LAYERS, ASKED, SINKS = 4, 16, 4
SIZE, RECENT = 256, 60
TOKENS, ROWS, CENTRES, QUERIES = 1024, 8, 16, 64
GRID = tuple((d, rho, size) for d in (8, 64) for rho in (1.0, 4.0, 8.0) for size in (32, 128))
SOURCES = (SYNTHETIC, "SmolLM2 2k")
FIELDS = ("keys", "kind", "d", "rho", "size", "recent", "method", "streams", "mean", "median", "low", "high", "largest")
Part = tuple[Tensor, Tensor, Tensor, float]


def compressed(method: str, k: Tensor, v: Tensor, size: int, scale: float, seed: int) -> Coreset | None:
    """Return tokens k (r, n, d), v (r, n, dv) in `size` units by a method of the table; None where it does not fit."""
    name, _, argument = method.rstrip(")").partition("(")
    if name == "uniform":
        return coresets.sampled(k, v, size, seed)
    if name in ("thinformer", "balance"):
        return coresets.walked(k, v, size, scale, seed, name)
    if name == "wildcat":
        return coresets.nystrom(k, v, size, scale, seed, float(argument))
    if name in ("clusters", "nystrom"):
        part = Nystrom(m=size, sharpness=float(argument or 0.5)) if name == "nystrom" else ClusterMeans(m=size)
        return coresets.absorbed(part, k, v, scale)
    sums = Sums.over(k, v, int(argument))
    rest = size - -(-sums.numbers // (k.shape[2] + v.shape[2]))
    if rest < 1:
        return None
    if name == "uniform+taylor":
        return coresets.sampled(k, v, rest, seed, sums)
    return coresets.walked(k, v, rest, scale, seed, "balance", int(argument))


METHODS = (
    "uniform",
    "thinformer",
    "balance",
    "wildcat(1)",
    "wildcat(0.25)",
    "clusters",
    "nystrom",
    "uniform+taylor(0)",
    "uniform+taylor(1)",
    "balance+taylor(0)",
    "balance+taylor(1)",
)
ON_REAL_KEYS = ("nystrom(1)", "nystrom(0.25)")  # beside the default sharpness of 1/2


def real_errors(name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield each method with its relative errors (rows,) on one part of the streams after another."""
    for seed, one in enumerate(real(name).streams(LAYERS)):
        q, k, v = (x.double() for x in one.asked(ASKED))
        exact = torch.softmax(one.scale * q @ k.transpose(1, 2), -1) @ v

        def wrong(found: Tensor, exact: Tensor = exact) -> Tensor:
            return (found.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))

        def full(newest: int, k: Tensor = k, v: Tensor = v) -> tuple[Tensor, Tensor]:
            held = [torch.cat([x[:, :SINKS], x[:, -newest:]], 1) for x in (k, v)]
            return held[0], held[1]

        yield "recent", wrong(answer(q, *full(SIZE - SINKS), one.scale, None))
        state = parse(f"balance@{SIZE}").open(one.spec(dtype=torch.float32, seed=seed))
        state.append(k.float(), v.float())
        yield "balance(product)", wrong(state.read(q.float()).mean)
        old_k, old_v = k[:, SINKS:-RECENT], v[:, SINKS:-RECENT]
        for method in (*METHODS, *ON_REAL_KEYS):
            held = compressed(method, old_k, old_v, SIZE - SINKS - RECENT, one.scale, seed)
            yield method, wrong(answer(q, *full(RECENT), one.scale, held))


def drawn(kind: str, d: int, rho: float) -> Part:
    """Draw queries (ROWS, QUERIES, d) of length rho, unit keys and unit values (ROWS, TOKENS, d), and the scale 1."""
    source = torch.Generator().manual_seed(d)
    k, v = (torch.randn(ROWS, TOKENS, d, generator=source, dtype=torch.float64) for _ in range(2))
    q = torch.randn(ROWS, QUERIES, d, generator=source, dtype=torch.float64)
    if kind == "centres":
        of = torch.randint(CENTRES, (ROWS, TOKENS, 1), generator=source).expand(-1, -1, d)
        middle = [torch.randn(ROWS, CENTRES, d, generator=source, dtype=torch.float64).gather(1, of) for _ in range(2)]
        k, v = middle[0] + 0.3 * k, middle[1] + 0.3 * v
    k, v = (x / x.norm(dim=-1, keepdim=True) for x in (k, v))
    q[:, ::2] = k[:, : QUERIES // 2]
    return rho * q / q.norm(dim=-1, keepdim=True), k, v, 1.0


def drawn_errors(part: Part, size: int) -> Iterator[tuple[str, Tensor]]:
    """Yield each method with the largest error (rows,) of its answers."""
    q, k, v, scale = part
    exact = torch.softmax(scale * q @ k.transpose(1, 2), -1) @ v
    for method in METHODS:
        held = compressed(method, k, v, size, scale, 0)
        if held is not None:
            found = answer(q, k[:, :0], v[:, :0], scale, held)
            yield method, (found - exact).norm(dim=2).amax(1)


def summary(found: dict[str, list[Tensor]]) -> Iterator[tuple[object, ...]]:
    """Yield (method, streams, mean, median, its interval, largest) for the errors of each method."""
    for method, parts in found.items():
        errors = torch.cat(parts)
        yield method, len(errors), float(errors.mean()), *median_interval(errors.tolist()), float(errors.max())


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__, SOURCES)
    table = ResultTable(__file__, FIELDS, names, SOURCES)
    for name in names:
        if name == SYNTHETIC:
            for kind in ("uniform", "centres"):
                for d, rho, size in GRID:
                    found = {method: [errors] for method, errors in drawn_errors(drawn(kind, d, rho), size)}
                    for row in summary(found):
                        table.add(name, kind, d, rho, size, 0, *row)
            continue
        gathered: dict[str, list[Tensor]] = {}
        for method, errors in real_errors(name):
            gathered.setdefault(method, []).append(errors)
        for row in summary(gathered):
            table.add(name, "real", 64, "-", SIZE, RECENT, *row)
    table.save()


if __name__ == "__main__":
    main()
