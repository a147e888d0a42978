"""Compare SubGen's error with its bound, over the cluster radius and the numbers of samples.

    python -m characterize.subgen_bound

1,024 tokens lie in 32 clusters on the unit sphere of 8 dimensions, each key 0.1 from its centre. Values are normal,
queries have length 2. The error is |answer - attention|_2 / (|softmax|_2 ||V||_op), as in the theorem.
  quantile  the 0.9-quantile of the error over 300 independent seeds of the method for each of 8 queries (2,400 errors)
  epsilon   the bound that SubGen states for a failure probability of 0.1
  stored    the state's bytes as a share of all keys and values; above 1 nothing is saved
The script takes four minutes on one core.
"""

from __future__ import annotations

import torch

from characterize.lib.table import save
from kvfloor import Spec, parse

TOKENS, WIDTH, CLUSTERS, SEEDS, QUERIES, RADIUS = 1024, 8, 32, 300, 8, 2.0
DELTAS, KEY_SAMPLES, PAIRS = (0.05, 0.25, 0.5, 1.0), (1, 4, 16), (32, 128, 512)


def main() -> None:
    torch.set_num_threads(1)
    source = torch.Generator().manual_seed(0)
    centre = torch.nn.functional.normalize(torch.randn(CLUSTERS, WIDTH, generator=source), dim=1)
    away = torch.nn.functional.normalize(torch.randn(TOKENS, WIDTH, generator=source), dim=1)
    k = centre[torch.randint(CLUSTERS, (TOKENS,), generator=source)] + 0.1 * away
    v = torch.randn(TOKENS, WIDTH, generator=source)
    q = RADIUS * torch.nn.functional.normalize(torch.randn(QUERIES, WIDTH, generator=source), dim=1)
    weights = torch.softmax(q.double() @ k.double().T, -1)
    unit = weights.norm(dim=1) * torch.linalg.matrix_norm(v.double(), 2)
    spec = Spec(SEEDS, WIDTH, WIDTH)
    rows = []
    for delta in DELTAS:
        for t in KEY_SAMPLES:
            for s in PAIRS:
                method = parse(f"subgen(delta={delta},t={t},s={s},radius={RADIUS})")
                state = method.open(spec)
                state.append(k.expand(SEEDS, -1, -1), v.expand(SEEDS, -1, -1))
                answer = state.read(q.expand(SEEDS, -1, -1)).mean.double()
                error = ((answer - weights @ v.double()).norm(dim=2) / unit).flatten()
                stated = method.guarantee(spec)
                assert stated is not None
                share = state.nbytes / SEEDS / (TOKENS * 2 * WIDTH * 4)
                clusters = int(state.clusters[0])  # type: ignore[attr-defined]
                rows.append((delta, t, s, clusters, float(error.quantile(0.9)), stated.epsilon, share))
    save(__file__, ("delta", "t", "s", "clusters", "quantile", "epsilon", "stored"), rows)


if __name__ == "__main__":
    main()
