"""Score a model with the exact cache: `python -m builtin_model.evaluate --model DIR --lengths 2048,4096 --n 64`.

Greedy decoding gives the right answer exactly if every token of that answer is the most likely one after the right
tokens before it. So one forward pass over context, question and answer gives the score without decoding. The tests
compare it with decoding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvfloor.models.load import BUILTIN, builtin_path, load
from kvfloor.statistics import wilson_interval
from kvfloor.tasks import TASKS, Sample

BAR = {2048: 0.95, 4096: 0.90}  # context length -> the score that the built-in model should reach on every task
Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Score:
    """Record `right` of `n` samples of one task at one context length, with the 95 % Wilson interval low to high."""

    task: str
    length: int
    n: int
    right: int
    score: float
    low: float
    high: float


def answered(model: Any, tokenizer: Any, sample: Sample) -> bool:
    """Return True if greedy decoding answers the first question right and then ends."""
    prompt = tokenizer(sample.prompt()).input_ids
    answer = tokenizer(sample.questions[0].answer, add_special_tokens=False).input_ids
    answer = [*answer, tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer])
    with torch.inference_mode():
        logits = model(ids, logits_to_keep=len(answer) + 1, use_cache=False).logits
    return logits[0, :-1].argmax(-1).tolist() == answer


def evaluate(
    model: Any, tokenizer: Any, tasks: Sequence[str], lengths: Sequence[int], n: int, seed: int
) -> list[Score]:
    """Score every task at every context length, on samples 0 to n-1 of stream `seed`."""
    scores = []
    for length in lengths:
        for name in tasks:
            samples = (
                TASKS[name].generate(seed, i, length, count=lambda text: len(tokenizer(text).input_ids))
                for i in range(n)
            )
            right = sum(answered(model, tokenizer, sample) for sample in samples)
            low, high = wilson_interval(right, n)
            scores.append(Score(name, length, n, right, right / n, low, high))
            print(
                f"{name} {length}: {right}/{n} = {right / n:.3f} [{low:.3f}, {high:.3f}]",
                file=sys.stderr,
                flush=True,
            )
    return scores


def falls_short(scores: Sequence[dict[str, Any]]) -> list[str]:
    """List the tasks whose measured score is below the bar at some length, in the order of TASKS."""
    short = {s["task"] for s in scores if s["score"] < BAR.get(s["length"], 0.0)}
    return [name for name in TASKS if name in short]


def main() -> None:
    """Score from the command line; `--record` writes the scores into the model folder's `training.json`."""
    parser = argparse.ArgumentParser(prog="python -m builtin_model.evaluate", description=__doc__)
    parser.add_argument("--model", default=BUILTIN, help="'builtin' or the folder of a model")
    parser.add_argument("--lengths", default="2048,4096", help="context lengths in tokens, with commas")
    parser.add_argument("--tasks", default=",".join(TASKS), help="task names, with commas")
    parser.add_argument("--n", type=int, default=64, help="samples per task and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--record", action="store_true", help="add the scores to training.json")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tasks = given.tasks.split(",")
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        parser.error(f"unknown task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
    model, tokenizer = load(given.model)
    lengths = [int(length) for length in given.lengths.split(",")]
    scores = [asdict(score) for score in evaluate(model, tokenizer, tasks, lengths, given.n, given.seed)]
    if given.record:
        folder = builtin_path() if given.model == BUILTIN else Path(given.model)
        note = folder / "training.json"
        old = json.loads(note.read_text())
        # a task or length that is not measured again keeps its figures
        fresh = {(s["task"], s["length"]) for s in scores}
        kept = [s for s in old.get("scores", []) if (s["task"], s["length"]) not in fresh]
        both = sorted(kept + scores, key=lambda s: (s["length"], list(TASKS).index(s["task"])))
        facts = old | {"evaluation_seed": given.seed, "scores": both, "falls_short": falls_short(both)}
        note.write_text(json.dumps(facts, indent=1) + "\n")
    if given.json:
        print(json.dumps({"schema": 1, "model": given.model, "seed": given.seed, "rows": scores}))


if __name__ == "__main__":
    main()
