"""Train ZETA attention and softmax attention in the same model on associative recall (MQAR), and count right answers.

    python -m characterize.zeta_mqar [--steps N] [--seeds 0,1] [--only zeta|softmax]

A sequence of multi-query associative recall (Arora et al. 2023) has 8 distinct keys, each followed by its value. Then
come the same keys at uniformly drawn places, and filler between them. At each of these keys the model must give the
key's value. As places are uniform, most answers lie far from their questions. The model has two blocks of (short causal
convolution, attention, feed-forward); only the attention differs. The seed decides everything. The script prints, and
writes beside this file, one line per model and seed: right answers to one question of each of n new sequences, with
Wilson's 95 % interval. It takes ten minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor, nn

from characterize.lib.table import save, show
from characterize.lib.zeta_attention import ZetaAttention
from kvfloor.statistics import wilson_interval

VOCABULARY, LENGTH, PAIRS, WIDTH = 128, 64, 8, 64
BATCH, RATE, TRIALS = 32, 3e-3, 2000
FIELDS = ("attention", "parameters", "steps", "seed", "right", "n", "low", "high", "keys_weighed", "seconds")


def draw(batch: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw tokens (batch, LENGTH) and the values to predict at the repeated keys, -1 elsewhere. Token 0 is filler."""
    half = VOCABULARY // 2
    keys = torch.rand(batch, half - 1, generator=source).argsort(1)[:, :PAIRS] + 1
    values = torch.randint(half, VOCABULARY, (batch, PAIRS), generator=source)
    tokens = torch.zeros(batch, LENGTH, dtype=torch.int64)
    tokens[:, 0 : 2 * PAIRS : 2], tokens[:, 1 : 2 * PAIRS : 2] = keys, values
    place = 2 * PAIRS + torch.rand(batch, LENGTH - 2 * PAIRS, generator=source).argsort(1)[:, :PAIRS]
    wanted = torch.full_like(tokens, -1)
    return tokens.scatter(1, place, keys), wanted.scatter(1, place, values)


class SoftmaxAttention(nn.Module):
    """Apply causal softmax attention with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        return self.mix(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class _DecoderBlock(nn.Module):
    """Apply a short causal convolution, attention, and a feed-forward net, each with a residual connection."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.near = nn.Parameter(torch.randn(3, WIDTH) * 0.3)  # weights of the token itself and the two before it
        self.attention = attention
        self.wide = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.pad(self.norms[0](x), (0, 0, 2, 0))
        x = x + sum(y[:, 2 - i : y.shape[1] - i] * self.near[i] for i in range(3))
        x = x + self.attention(self.norms[1](x))
        return x + self.wide(self.norms[2](x))


class Recaller(nn.Module):
    """Map tokens (batch, n) to logits (places, vocabulary) at the places marked in `asked` (batch, n)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.5)
        self.blocks = nn.Sequential(*(_DecoderBlock(attention(kind)) for _ in range(2)))
        self.norm, self.say = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        x = self.token(tokens) + self.place.weight
        return self.say(self.norm(self.blocks(x)[asked]))


def attention(kind: str) -> nn.Module:
    if kind == "softmax":
        return SoftmaxAttention(WIDTH)
    return ZetaAttention(WIDTH, k=16, window=16, curves=2, chunk=16)


def run(kind: str, steps: int, seed: int) -> dict[str, object]:
    """Train and test one model, and return its row of the results."""
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model, source = Recaller(kind), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    warm = max(1, steps // 20)
    shape = lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1.0 + math.cos(math.pi * step / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, shape)
    for step in range(steps):
        tokens, wanted = draw(BATCH, source)
        asked = wanted >= 0
        loss = nn.functional.cross_entropy(model(tokens, asked), wanted[asked])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0:
            print(f"{kind} step {step}: loss {loss.item():.3f} ({time.perf_counter() - begin:.0f} s)", flush=True)
    return result(kind, model, steps, seed, begin)


@torch.no_grad()
def result(kind: str, model: nn.Module, steps: int, seed: int, begin: float) -> dict[str, object]:
    source, right, n = torch.Generator().manual_seed(10**6 + seed), 0, TRIALS
    for _ in range(0, n, 200):
        tokens, wanted = draw(200, source)
        asked = wanted >= 0
        one = torch.rand(wanted.shape, generator=source).masked_fill(~asked, -1.0).argmax(1, keepdim=True)
        asked = torch.zeros_like(asked).scatter(1, one, True)
        right += int((model(tokens, asked).argmax(-1) == wanted[asked]).sum())
    low, high = wilson_interval(right, n)
    layer = next((x for x in model.modules() if isinstance(x, ZetaAttention)), None)
    return {
        "attention": kind, "parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "seed": seed,
        "right": right, "n": n, "low": f"{low:.4f}", "high": f"{high:.4f}",
        "keys_weighed": f"<= {LENGTH}" if layer is None else f"<= {layer.k} + mean",
        "seconds": round(time.perf_counter() - begin),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", default="0,1", help="with commas")
    parser.add_argument("--only", choices=["zeta", "softmax"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    kinds, seeds = [given.only] if given.only else ["softmax", "zeta"], [int(seed) for seed in given.seeds.split(",")]
    rows = [[run(kind, given.steps, seed)[field] for field in FIELDS] for seed in seeds for kind in kinds]
    if given.only is None:
        save(__file__, FIELDS, rows)
    else:
        show(FIELDS, rows)


if __name__ == "__main__":
    main()
