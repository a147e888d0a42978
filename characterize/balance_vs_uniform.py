"""Compare the error of BalanceKV with that of as many uniformly drawn tokens, over six kinds of keys.

    python -m characterize.balance_vs_uniform

Every seed draws a stream of 1,024 tokens and 16 queries; the scale is d^-1/2:
  normal(x)  keys are x times normal numbers: at x = 1 and d = 64 a key weighs e^8 on itself and about 1 on others
  cluster    keys and values lie around 16 normal centres, with a standard deviation of 0.3
  walk       keys and values are random walks of unit length at the end: near tokens are alike
Queries and all other values are normal numbers. No method spares sinks or recent tokens:
  tree       the default walk in batches of 512, halved twice, as the paper's code does at 25 %
  budget     the default at @256 and @128, token by token
  paper      the smaller class of the paper's walk, no centring, sharpness 1, c = 1/8 as in its code; halved once, as
             classes of less than 256 tokens do not fill the next level
  safe       as "paper", with the safe c
Each line gives the median over the seeds of the error's norm over the queries, for uniform draws and for the method,
and the median ratio of the two in one stream with its bootstrap 95 % interval. "held" is the mean number of tokens
held. The script takes four minutes on one core.
"""

from __future__ import annotations

import torch
from torch import Tensor

from characterize.lib.table import save
from kvfloor import Spec, parse

TOKENS, QUERIES, SEEDS, AT_ONCE, RESAMPLES = 1024, 16, 96, 16, 2000
ALONE = "sinks=0,recent=0"
PAPER = f"batch=512,keep=smaller,centre=False,sharpness=1.0,{ALONE}"
METHODS = {
    "tree": (f"balance(batch=512,{ALONE})", 256),
    "budget 256": (f"balance({ALONE})@256", 256),
    "budget 128": (f"balance({ALONE})@128", 128),
    "paper": (f"balance({PAPER})", 496),
    "safe": (f"balance({PAPER},c=None,horizon={TOKENS})", 496),
}
KEYS = (("normal(0.25)", 64), ("normal(0.5)", 64), ("normal(1)", 64), ("normal(1)", 4), ("cluster", 64), ("walk", 64))


def drawn(kind: str, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries (AT_ONCE, QUERIES, d), keys and values (AT_ONCE, TOKENS, d)."""
    source = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(AT_ONCE, TOKENS, d, generator=source) for _ in range(2))
    q = torch.randn(AT_ONCE, QUERIES, d, generator=source)
    if kind == "walk":
        return q, k.cumsum(1) / TOKENS**0.5, v.cumsum(1) / TOKENS**0.5
    if kind == "cluster":
        of = torch.randint(16, (AT_ONCE, TOKENS, 1), generator=source).expand(-1, -1, d)
        centres = [torch.randn(AT_ONCE, 16, d, generator=source).gather(1, of) for _ in range(2)]
        return q, centres[0] + 0.3 * k, centres[1] + 0.3 * v
    return q, float(kind[7:-1]) * k, v


def errors(text: str, q: Tensor, k: Tensor, v: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the relative errors (AT_ONCE,) of the answers after the stream, and the tokens held (AT_ONCE,)."""
    spec = Spec(AT_ONCE, k.shape[2], v.shape[2], scale=k.shape[2] ** -0.5, seed=seed)
    state = parse(text).open(spec)
    state.append(k, v)
    truth = torch.softmax(spec.scale * q @ k.mT, -1) @ v
    return (state.read(q).mean - truth).norm(dim=(1, 2)) / truth.norm(dim=(1, 2)), state.held.double()


def median_interval(values: Tensor) -> tuple[float, float, float]:
    """Return the median and its bootstrap 95 % interval."""
    source = torch.Generator().manual_seed(0)
    picked = torch.randint(len(values), (RESAMPLES, len(values)), generator=source)
    low, high = values[picked].quantile(0.5, 1).quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return float(values.quantile(0.5)), low, high


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for kind, d in KEYS:
        found: dict[str, list[Tensor]] = {name: [] for name in METHODS}
        held: dict[str, list[Tensor]] = {name: [] for name in METHODS}
        uniform: dict[int, list[Tensor]] = {496: [], 256: [], 128: []}
        for seed in range(SEEDS // AT_ONCE):
            stream = drawn(kind, d, seed)
            for size, so_far in uniform.items():
                so_far.append(errors(f"random@{size}", *stream, seed)[0])
            for name, (text, _) in METHODS.items():
                for so_far, new in zip((found[name], held[name]), errors(text, *stream, seed), strict=True):
                    so_far.append(new)
        for name, (_, size) in METHODS.items():
            mine, theirs = torch.cat(found[name]), torch.cat(uniform[size])
            medians = (float(theirs.quantile(0.5)), float(mine.quantile(0.5)))
            kept = float(torch.cat(held[name]).mean())
            rows.append((kind, d, name, size, kept, SEEDS, *medians, *median_interval(mine / theirs)))
    fields = (
        "keys",
        "d",
        "method",
        "uniform_tokens",
        "held",
        "seeds",
        "uniform_error",
        "error",
        "ratio",
        "low",
        "high",
    )
    save(__file__, fields, rows)


if __name__ == "__main__":
    main()
