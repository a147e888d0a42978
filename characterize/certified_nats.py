"""Measure what a bound on each layer's error makes of a model's predictions: nats of SmolLM2 under `tiered`.

    python -m characterize.certified_nats

SmolLM2 reads two texts through `tiered` at each epsilon, in every layer: 1,024 tokens are taken in, and the
predictions of the next 256 are compared with those of its own attention. Each line has the KL divergence in nats per
token, with its 95 % interval over blocks of 64 tokens, and the share of tokens with the same likeliest next token.
What is certified is each layer's attention output; that the divergence is small is measured, not proven. Ten minutes on
one core.
"""

from __future__ import annotations

import torch

from characterize.lib.table import save
from kvfloor.audit.nats import BLOCK_TOKENS
from kvfloor.audit.reading import Reader
from kvfloor.audit.texts import SHIPPED, excerpts
from kvfloor.hf import prepare
from kvfloor.methods.grammar import parse
from kvfloor.models import load
from kvfloor.statistics import blocks, mean_interval

EPSILONS = (0.01, 0.02, 0.05)
CONTEXT, SCORED = 1024, 256
FIELDS = ("epsilon", "kl", "low", "high", "same_top", "tokens")


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load("smollm2")
    prepare(model)
    reader = Reader(model, 0)
    kl: dict[float, list[tuple[float, int]]] = {epsilon: [] for epsilon in EPSILONS}
    same: dict[float, list[float]] = {epsilon: [] for epsilon in EPSILONS}
    for excerpt in excerpts(SHIPPED[:2], [CONTEXT], SCORED, lambda text: tokenizer(text, verbose=False).input_ids):
        reference = reader.reference(excerpt)
        for epsilon in EPSILONS:
            found = reader.read(parse(f"tiered(epsilon={epsilon})"), excerpt, reference).figures
            kl[epsilon] += blocks(found.kl, BLOCK_TOKENS)
            same[epsilon] += found.same_top
            print(excerpt.cell.text, epsilon, sum(found.kl) / len(found.kl), flush=True)
    save(
        __file__,
        FIELDS,
        [(e, *mean_interval(kl[e]), sum(same[e]) / len(same[e]), len(same[e])) for e in EPSILONS],
    )


if __name__ == "__main__":
    main()
