"""Measure what dropping tokens and bits together does to right answers on SmolLM2, at an eighth of the bytes.

    python -m characterize.frontier_tasks [--n N] [--tasks TASKS] [--out DIR]

Three settings of equal bytes: `h2o` and `snapkv` with few tokens, and `snapkv:k4v3` with more tokens in 4 bits for keys
and 3 for values. The tasks are RULER's, in contexts of 1,024 tokens whose question is visible while they are
compressed. Every policy sees the whole prompt before it evicts, so one run of the model serves all settings. An answer
ends after 48 tokens. Rows of tasks that are not asked for stay in the table. Shares of bytes are those of
`characterize/frontier.py`. The budget of a setting is the largest whose share is at most 1/8.

`exact` has the figures of the exact cache. Where it fails, a task says nothing. `right` of `n` answers have all values
that are asked for; `parts` is the mean share of these values, RULER's own score. `more` is the share of right answers
less that of the better of the two others on the same samples, with Tango's 95 % interval. With --out, rows that are
in the folder are not measured again. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from characterize.frontier import FrontierSource
from characterize.lib.table import ResultTable, Row
from kvfloor.audit.chat import Chat
from kvfloor.audit.grid import EXACT
from kvfloor.audit.measure import Bench
from kvfloor.audit.plan import Item, Work, task_work
from kvfloor.hf import prepare
from kvfloor.methods.grammar import parse
from kvfloor.models import load
from kvfloor.splitting import split_list
from kvfloor.statistics import paired_counts, paired_difference_interval, wilson_interval

SOURCE = FrontierSource("smollm2", "SmolLM2-135M", 30, 3, 64, 3, 1024, (), "")
TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
PAIRED, ALONE = "snapkv", "h2o(prefill=dense)"
STORE, TARGET, N, SEED, MOST = ":k4v3", 1 / 8, 32, 0, 48
FIELDS = (
    *("task", "setting", "share", "right", "n", "low", "high", "parts"),
    *("against", "more", "more_low", "more_high"),
)


@dataclass(frozen=True)
class TaskOutcome:
    """Hold one setting's answers on the samples of a task: 1 for each right one, and the mean share of right values."""

    right: tuple[int, ...]
    parts: float


def fitting(policy: str, share: float) -> str:
    """Return the policy with the largest budget whose share of the bytes is at most `share`."""
    low, high = 16, SOURCE.context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if SOURCE.share(f"{policy}@{middle}") <= share else (low, middle)
    return f"{policy}@{low}"


def settings() -> tuple[str, str, str]:
    """Return settings of equal bytes: two that drop tokens, then one that drops tokens and bits."""
    return fitting(ALONE, TARGET), fitting(PAIRED, TARGET), fitting(PAIRED + STORE, TARGET)


def measure(path: Path, tasks: Sequence[str], settings: Sequence[str], n: int) -> dict[tuple[str, str], TaskOutcome]:
    """Return {(task, setting): outcome}, after measuring those that the file `path` has no line of."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    found = {(x["task"], x["setting"]): TaskOutcome(tuple(x["right"]), x["parts"]) for x in map(json.loads, lines)}
    if all((task, setting) in found for task in tasks for setting in settings):
        return found
    model, tokenizer = load(SOURCE.model)
    prepare(model)
    bench = Bench(model, tokenizer, SEED, methods=[parse(setting) for setting in settings])
    assert bench.template is not None
    chat = Chat("auto", bench.template.count)
    for task in tasks:
        missing = [setting for setting in settings if (task, setting) not in found]
        if missing:
            (work,) = task_work((task,), (SOURCE.context,), ("visible",), n, SEED, bench.count, chat)
            prepared = bench.prepare(Work(work.cell, tuple(map(shortened, work.items)), work.chat))
            for setting in missing:
                got = bench.run(parse(setting), prepared)
                (parts,) = got.parts.values()
                found[task, setting] = TaskOutcome(got.right, parts)
                print(task, setting, sum(got.right), "of", n, flush=True)
                line = {"task": task, "setting": setting, "right": got.right, "parts": parts}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    return found


def shortened(item: Item) -> Item:
    """Return the sample with answers of at most `MOST` tokens."""
    return replace(item, turns=tuple(replace(turn, most=MOST) for turn in item.turns))


def table(found: dict[tuple[str, str], TaskOutcome], tasks: Sequence[str], tried: Sequence[str]) -> list[Row]:
    """Return one row per task and setting, with columns as in FIELDS; the last of `tried` is compared with the others.

    It is compared with the one of them that has more right answers.
    """
    rows: list[Row] = []
    for task in tasks:
        *alone, both = tried
        best = max(alone, key=lambda setting: sum(found[task, setting].right))
        for setting in (EXACT, *tried):
            one = found[task, setting]
            right, n = sum(one.right), len(one.right)
            row = (task, setting, SOURCE.share(setting), right, n, *wilson_interval(right, n), one.parts)
            if setting != both:
                rows.append((*row, "", "", "", ""))
                continue
            gained, lost = paired_counts(one.right, found[task, best].right)
            rows.append((*row, best, (gained - lost) / n, *paired_difference_interval(gained, lost, n)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=N)
    parser.add_argument("--tasks", default=",".join(TASKS), help="names with commas; all unless given")
    parser.add_argument("--out", type=Path, help="folder that keeps the measured rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tasks, tried = split_list(given.tasks), settings()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder / f"frontier_tasks-{given.n}.jsonl", tasks, [EXACT, *tried], given.n)
    results = ResultTable(__file__, FIELDS, tasks, TASKS)
    for row in table(found, tasks, tried):
        results.add(*row)
    results.save()


if __name__ == "__main__":
    main()
