"""Compare the error of BalanceKV with that of as many uniformly drawn tokens, on drawn keys of six kinds and real ones.

    python -m characterize.balance_vs_uniform [--keys "synthetic,built-in 2k,SmolLM2 2k,SmolLM2 8k"]

Synthetic: every seed draws a stream of 1,024 tokens and 16 queries; the scale is d^-1/2:
  normal(x)  keys are x times normal numbers: at x = 1 and d = 64 a key weighs e^8 on itself and about 1 on others
  cluster    keys and values lie around 16 normal centres, with a standard deviation of 0.3
  walk       keys and values are random walks of unit length at the end: near tokens are alike
Queries and all other values are normal numbers.
Real: the queries of the last 16 tokens of a text, over the tokens before them (`characterize.lib.real_keys`), in all
layers of the built-in model and in 7 of SmolLM2's 30; every stream has one seed.
No method spares sinks or recent tokens, but for the last two:
  tree       the default walk in batches of 512, halved twice (as the paper's code does at 25 %) or as often as fits
  budget     the default at a quarter and an eighth of the tokens, token by token
  paper      the smaller class of the paper's walk, no centring, sharpness 1, c = 1/8 as in its code; on drawn keys
             halved once, as classes of less than 256 tokens do not fill the next level
  safe       as "paper", with the safe c
  protected  an eighth of the tokens; the first 4 and the newest 16 are kept, and the uniform sample keeps them as well
  coin       as "protected", but a fair coin for the walk (c so large that the keys do not matter): newer tokens are
             kept more densely than old ones, as by every tree, and nothing is balanced
Each line gives the median over the streams of the error's norm over the queries, for uniform draws and for the method,
and the median ratio of the two in one stream with its bootstrap 95 % interval. "held" is the mean number of tokens
held. The synthetic streams take four minutes on one core, the real ones three.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from characterize.lib.real_keys import KEYS, SYNTHETIC, chosen, real
from characterize.lib.table import ResultTable, median_interval
from kvfloor import Spec, parse

TOKENS, QUERIES, SEEDS, AT_ONCE, LAYERS = 1024, 16, 96, 16, 7
ALONE = "sinks=0,recent=0"
UNIFORM = "random(block=16)"  # divides the number of keys, so that no open block is held beside the sample
PAPER = f"batch=512,keep=smaller,centre=False,sharpness=1.0,{ALONE}"
KINDS = (("normal(0.25)", 64), ("normal(0.5)", 64), ("normal(1)", 64), ("normal(1)", 4), ("cluster", 64), ("walk", 64))
FIELDS = (
    "keys",
    "kind",
    "d",
    "method",
    "uniform_tokens",
    "held",
    "streams",
    "uniform_error",
    "error",
    "ratio",
    "low",
    "high",
)
Stream = tuple[Tensor, Tensor, Tensor]


def methods(n: int) -> dict[str, tuple[str, str]]:
    """Return each method's text with that of the uniform sample; "" is a sample of as many tokens as it holds."""
    return {
        "tree": (f"balance(batch=512,{ALONE})", ""),
        "budget 1/4": (f"balance({ALONE})@{n // 4}", f"{UNIFORM}@{n // 4}"),
        "budget 1/8": (f"balance({ALONE})@{n // 8}", f"{UNIFORM}@{n // 8}"),
        "paper": (f"balance({PAPER})", ""),
        "safe": (f"balance({PAPER},c=None,horizon={n})", ""),
        "protected": (f"balance@{n // 8}", f"random(sinks=4,recent=16,block=16)@{n // 8}"),
        "coin": (f"balance(c=1e9)@{n // 8}", f"random(sinks=4,recent=16,block=16)@{n // 8}"),
    }


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


def streams(name: str) -> dict[tuple[str, int], list[Stream]]:
    """Return, by kind and width of keys, a list of queries, keys and values, of some rows each."""
    if name == SYNTHETIC:
        return {kind: [drawn(*kind, seed) for seed in range(SEEDS // AT_ONCE)] for kind in KINDS}
    parts = [one.asked(QUERIES) for one in real(name).streams(LAYERS)]
    return {("real", parts[0][1].shape[2]): parts}


def errors(text: str, q: Tensor, k: Tensor, v: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the relative errors (rows,) of the answers after the stream, and the tokens held (rows,)."""
    rows, _, d = k.shape
    spec = Spec(rows, d, v.shape[2], scale=d**-0.5, seed=seed)
    state = parse(text).open(spec)
    state.append(k, v)
    truth = torch.softmax(spec.scale * q.double() @ k.double().mT, -1) @ v.double()
    wrong = (state.read(q).mean.double() - truth).norm(dim=(1, 2)) / truth.norm(dim=(1, 2))
    return wrong, state.held.double()


def compared(text: str, uniform: str, parts: list[Stream]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the method's errors, the uniform sample's, and the tokens held: (rows,) each, for every part."""
    for seed, part in enumerate(parts):
        mine, held = errors(text, *part, seed)
        yield mine, errors(uniform or f"{UNIFORM}@{round(float(held.mean()))}", *part, seed)[0], held


def main() -> None:
    torch.set_num_threads(1)
    names = chosen(__doc__)
    table = ResultTable(__file__, FIELDS, names, KEYS)
    for name in names:
        for (kind, d), parts in streams(name).items():
            for method, (text, uniform) in methods(parts[0][1].shape[1]).items():
                found = zip(*compared(text, uniform, parts), strict=True)
                mine, theirs, held = (torch.cat(list(each)) for each in found)
                size = int(uniform.rpartition("@")[2]) if uniform else round(float(held.mean()))
                medians = (float(theirs.quantile(0.5)), float(mine.quantile(0.5)))
                ratio = median_interval((mine / theirs).tolist())
                table.add(name, kind, d, method, size, float(held.mean()), len(mine), *medians, *ratio)
    table.save()


if __name__ == "__main__":
    main()
