"""Divide one budget among the kv heads of the built-in model in three ways, and count right answers.

    python -m characterize.allocation [--n N]

512 tokens of context are compressed before the question comes. Budgets are 64 and 128 tokens per kv head on average, so
that bytes are equal up to rounding. Three ways to divide them:
  uniform    equal shares
  pyramid    shares that shrink from layer to layer
  floor      shares in proportion to the tokens that a head's queries read apart in one calibration prompt, a sample of
             the same task from another stream
All rows of a task share their samples. Each row gives the right answers of n with Wilson's 95 % interval, and the bytes
per sequence. The script takes ten minutes on one core.
"""

from __future__ import annotations

import argparse

import torch

from characterize.lib.table import save
from kvfloor.hf import CompressedCache, floor_shares, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.models import load
from kvfloor.statistics import wilson_interval
from kvfloor.tasks import TASKS

NAMES = ("recall", "kv", "needles")
METHODS = ("sinks(4)", "h2o", "keydiff")
BUDGETS, CONTEXT, BATCH = (64, 128), 512, 32
ALLOCATIONS = ("uniform", "pyramid", "floor")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=128)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    prepare(model)
    rows = []
    for name in NAMES:
        samples = [TASKS[name].generate(seed=0, index=i, length=CONTEXT) for i in range(given.n)]
        shares = floor_shares(model, tokenizer(TASKS[name].generate(seed=1, index=0, length=CONTEXT).context).input_ids)
        for method in METHODS:
            for budget in BUDGETS:
                for how in ALLOCATIONS:
                    allocate = shares if how == "floor" else how
                    right, size = 0, 0
                    for start in range(0, given.n, BATCH):
                        batch = samples[start : start + BATCH]
                        cache = CompressedCache(model.config, f"{method}@{budget}", allocate=allocate)
                        right += answered(model, tokenizer, cache, batch)
                        size = cache.nbytes // len(batch)
                    rows.append((name, method, budget, how, size, right, given.n, *wilson_interval(right, given.n)))
                    print(rows[-1], flush=True)
    save(__file__, ("task", "method", "budget", "allocate", "bytes", "right", "n", "low", "high"), rows)


def answered(model: torch.nn.Module, tokenizer, cache: CompressedCache, samples: list) -> int:
    """Count the right answers to the samples' questions, each fed after its context was compressed."""
    asks = [sample.questions[0] for sample in samples]
    dialogue = Dialogue.start(model, cache, len(samples))  # type: ignore[arg-type]
    dialogue.feed([tokenizer(sample.context).input_ids for sample in samples])
    cache.seal()
    dialogue.feed([tokenizer(" " + ask.ask, add_special_tokens=False).input_ids for ask in asks])
    wanted = [tokenizer(" " + ask.answer, add_special_tokens=False).input_ids for ask in asks]
    said, _ = dialogue.answer(max(map(len, wanted)), tokenizer.eos_token_id)
    return sum(mine[: len(right)] == right for mine, right in zip(said, wanted, strict=True))


if __name__ == "__main__":
    main()
