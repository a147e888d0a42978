"""Measure methods on long answers: the trace of a register machine, followed by a question for all current values.

    python -m characterize.long_decode [--n N]

The first 48 tokens of a program are the prompt. All later tokens come after the seal, as those of a long answer do. The
right tokens are fed, block by block, so that every method sees the same stream. Then the question comes. The built-in
model reads programs of 256 to 2,048 tokens with at most 8 registers. Each method gets the bytes per sequence after the
program, and the right answers of n with Wilson's 95 % interval; all methods share their samples. The rows "below its
prompt" give the same policy the whole program as prompt within the same budget. The script takes twenty minutes on one
core.
"""

from __future__ import annotations

import argparse

import torch

from characterize.lib.table import save
from kvfloor import parse
from kvfloor.audit.measure import CHUNK_SLOTS
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.decode import Dialogue
from kvfloor.models import load
from kvfloor.statistics import wilson_interval
from kvfloor.tasks import TASKS

PROMPT, LENGTHS, BUDGET = 48, (256, 512, 1024, 2048), 128
METHODS = {
    "exact": "exact",
    "raas": f"raas@{BUDGET}",
    "raas, needed by half": f"raas(top=0.5)@{BUDGET}",
    "raas, twice the budget": f"raas@{2 * BUDGET}",
    "quest, as many tokens read": f"exact|pages(pages={BUDGET // 16})",
    "h2o": f"h2o@{BUDGET + PROMPT}",
    "tova": f"tova@{BUDGET + PROMPT}",
    "h2o, twice the budget": f"h2o@{2 * BUDGET + PROMPT}",
    "window, twice the budget": f"window@{2 * BUDGET + PROMPT}",
    "sinks": f"sinks@{BUDGET + PROMPT}",
    "window": f"window@{BUDGET + PROMPT}",
    "random": f"random@{BUDGET + PROMPT}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=64)
    n = parser.parse_args().n
    torch.set_num_threads(1)
    model, tokenizer = load("builtin")
    model = prepare(model)

    def plain(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def tried(text: str, programs: list[list[int]], asks: list[list[int]], answers: list[list[int]], prompt: int):
        """Return the bytes per sequence after the program, and the number of right answers."""
        cache = CompressedCache(model.config, parse(text), seed=0, requests=range(n))
        dialogue = Dialogue.start(model, cache, n)
        dialogue.feed([ids[:prompt] for ids in programs], CHUNK_SLOTS)
        cache.seal()
        if any(len(ids) > prompt for ids in programs):
            dialogue.feed([ids[prompt:] for ids in programs], CHUNK_SLOTS)
        held = cache.nbytes // n
        dialogue.feed(asks)
        said, _ = dialogue.answer(max(map(len, answers)) + 2, tokenizer.eos_token_id)
        return held, sum(tokenizer.decode(a) == tokenizer.decode(b) for a, b in zip(said, answers, strict=True))

    rows = []
    for length in LENGTHS:
        samples = [
            TASKS["registers"].generate(10**6, i, length, count=lambda text: len(tokenizer(text).input_ids))
            for i in range(n)
        ]
        programs = [tokenizer(sample.context).input_ids for sample in samples]
        asks = [plain(" " + sample.questions[0].ask) for sample in samples]
        answers = [plain(" " + sample.questions[0].answer) for sample in samples]
        for name, text in METHODS.items():
            held, right = tried(text, programs, asks, answers, PROMPT)
            rows.append((length, name, text, held, right, n, *wilson_interval(right, n)))
            print(*rows[-1], flush=True)
        whole = f"raas(prompt=evict)@{BUDGET}"
        held, right = tried(whole, programs, asks, answers, length + 1)
        rows.append((length, "raas, below its prompt", whole, held, right, n, *wilson_interval(right, n)))
    save(__file__, ("tokens", "cache", "method", "state_bytes", "right", "n", "low", "high"), rows)


if __name__ == "__main__":
    main()
