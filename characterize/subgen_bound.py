"""Compare SubGen's error with its bound, over the cluster radius and the numbers of samples.

    python -m characterize.subgen_bound [--keys "synthetic,built-in 2k,SmolLM2 2k,SmolLM2 8k"]

Synthetic: 1,024 tokens lie in 32 clusters on the unit sphere of 8 dimensions, each key 0.1 from its centre. Values are
normal, 8 queries have length 2, and 300 independent seeds of the method answer each.
Real: 3 layers of `characterize.lib.real_keys` (at 8k tokens 2); the queries are those of the last 4 tokens, and 8 seeds
answer each (at 8k tokens 4).
  delta     the cluster radius in units of the keys' root mean square distance from their mean (1 for the synthetic)
  clusters  clusters as a share of the tokens, median over the streams
  radius    the longest query times the scale, median over the streams
  quantile  the 0.9-quantile of |answer - attention|_2 / (|softmax|_2 ||V||_op), the theorem's error, over queries and
            seeds; for real keys the median over the streams with its bootstrap 95 % interval
  epsilon   the bound that SubGen states for a failure probability of 0.1, median over the streams
  relative  the median of |answer - attention|_2 / |attention|_2 over queries and seeds, median over the streams
  uniform   likewise, for as many bytes of uniformly drawn tokens; 0 where these are all tokens
  stored    the state's bytes as a share of all keys and values; above 1 nothing is saved
The synthetic streams take four minutes on one core, the real ones six.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from characterize.lib.real_keys import KEYS, SYNTHETIC, chosen, real
from characterize.lib.table import ResultTable, median_interval
from kvfloor import Spec, parse

TOKENS, WIDTH, CLUSTERS, SEEDS, QUERIES, RADIUS = 1024, 8, 32, 300, 8, 2.0
DELTAS, KEY_SAMPLES, PAIRS = (0.05, 0.25, 0.5, 1.0), (1, 4, 16), (32, 128, 512)
ASKED, FAILURE, SAMPLES, REAL_PAIRS = 4, 0.1, 4, 512
LAYERS = {"built-in 2k": 3, "SmolLM2 2k": 3, "SmolLM2 8k": 2}
REAL_SEEDS = {"built-in 2k": 8, "SmolLM2 2k": 8, "SmolLM2 8k": 4}
REAL_DELTAS = {"built-in 2k": (0.25, 0.5, 0.75, 1.0), "SmolLM2 2k": (0.25, 0.5, 0.75, 1.0), "SmolLM2 8k": (0.5, 1.0)}
FIELDS = ("keys", "tokens", "streams", "delta", "t", "s", "clusters", "radius", "quantile", "low", "high", "epsilon")


@dataclass(frozen=True)
class SubGenFigures:
    """Hold what one stream shows: the fields of the script's table that have no interval are per stream."""

    clusters: float
    quantile: float
    epsilon: float
    relative: float
    uniform: float
    stored: float


def measure(q: Tensor, k: Tensor, v: Tensor, scale: float, size: tuple[float, int, int], seeds: int) -> SubGenFigures:
    """Measure SubGen on keys k (n, d), values v (n, dv) and queries q (m, d); size is (delta, t, s), delta a length."""
    (n, d), dv = k.shape, v.shape[1]
    delta, t, s = size
    radius = scale * float(q.norm(dim=1).max())
    weights = torch.softmax(scale * q.double() @ k.double().T, -1)
    exact = weights @ v.double()
    unit = weights.norm(dim=1) * torch.linalg.matrix_norm(v.double(), 2)
    spec = Spec(seeds, d, dv, scale)

    def answers(text: str) -> tuple[Tensor, int, int]:
        state = parse(text).open(spec)
        state.append(k.expand(seeds, -1, -1), v.expand(seeds, -1, -1))
        held = int(state.clusters[0]) if text.startswith("subgen_sketch") else 0  # type: ignore[attr-defined]
        return (state.read(q.expand(seeds, -1, -1)).mean.double() - exact).norm(dim=2), state.nbytes, held

    method = parse(f"subgen_sketch(delta={delta},t={t},s={s},radius={radius},failure={FAILURE})")
    stated = method.guarantee(spec)
    assert stated is not None
    wrong, size_bytes, clusters = answers(str(method))
    stored = size_bytes / seeds / (n * (d + dv) * 4)
    tokens = round(stored * n)
    uniform = float((answers(f"random(block=4)@{tokens}")[0] / exact.norm(dim=1)).median()) if tokens < n else 0.0
    quantile = float((wrong / unit).flatten().quantile(0.9))
    return SubGenFigures(
        clusters / n, quantile, stated.epsilon, float((wrong / exact.norm(dim=1)).median()), uniform, stored
    )


def synthetic() -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values."""
    source = torch.Generator().manual_seed(0)
    centre = torch.nn.functional.normalize(torch.randn(CLUSTERS, WIDTH, generator=source), dim=1)
    away = torch.nn.functional.normalize(torch.randn(TOKENS, WIDTH, generator=source), dim=1)
    k = centre[torch.randint(CLUSTERS, (TOKENS,), generator=source)] + 0.1 * away
    v = torch.randn(TOKENS, WIDTH, generator=source)
    return RADIUS * torch.nn.functional.normalize(torch.randn(QUERIES, WIDTH, generator=source), dim=1), k, v


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__)
    table = ResultTable(__file__, (*FIELDS, "relative", "uniform", "stored"), names, KEYS)
    for name in names:
        if name == SYNTHETIC:
            q, k, v = synthetic()
            streams, scale, seeds, units = [(q, k, v)], 1.0, SEEDS, [1.0]
            sizes = [(delta, t, s) for delta in DELTAS for t in KEY_SAMPLES for s in PAIRS]
        else:
            layers = list(real(name).streams(LAYERS[name]))
            scale, seeds = layers[0].scale, REAL_SEEDS[name]
            streams = [row for one in layers for row in zip(*one.asked(ASKED), strict=True)]
            units = [float((k - k.mean(0)).square().sum(1).mean().sqrt()) for _, k, _ in streams]
            sizes = [(delta, SAMPLES, REAL_PAIRS) for delta in REAL_DELTAS[name]]
        radius = median(scale * float(q.norm(dim=1).max()) for q, _, _ in streams)
        for delta, t, s in sizes:
            found = [
                measure(*stream, scale, (delta * unit, t, s), seeds)
                for stream, unit in zip(streams, units, strict=True)
            ]
            shown = [
                median(getattr(one, field) for one in found) for field in ("epsilon", "relative", "uniform", "stored")
            ]
            interval = median_interval([one.quantile for one in found])
            clusters = median(one.clusters for one in found)
            table.add(name, len(streams[0][1]), len(found), delta, t, s, clusters, radius, *interval, *shown)
    table.save()


if __name__ == "__main__":
    main()
