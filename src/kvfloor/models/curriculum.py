"""What to train on next: every task starts tiny, and grows whenever it passes its own bar."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

from kvfloor.tasks import FULL, TASKS, Lexicon
from kvfloor.tasks.mixture import mix, mixable

from .examples import Example, Span, example
from .tokenizer import count_tokens, encode

LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 4608)
FIRST_LENGTH = {"vartrack": 64, "registers": 48}  # shorter contexts have no room for the smallest difficulty
PASS = 0.93  # share of right answers, of the last WINDOW at a task's longest length, that lets it grow
WINDOW = 48
FRONTIER = 0.6  # share of batches at the focused task's longest length; the others revisit shorter ones
MIXED = 0.6  # share of long sequences that hold several tasks' facts
MIX_FROM = 256
ECHO_UP_TO, ECHO = 192, 0.15  # plain repetition, in short sequences only: it forms the copying heads


class Curriculum:
    """Each task's level (index into LENGTHS) and its last results there."""

    def __init__(self, longest: int) -> None:
        self.longest = max(i for i, n in enumerate(LENGTHS) if n <= longest)
        self.level = {name: LENGTHS.index(FIRST_LENGTH.get(name, LENGTHS[0])) for name in TASKS}
        self.recent = {name: deque[bool](maxlen=WINDOW) for name in TASKS}

    def draw(self, seed: int, step: int, rng: random.Random, tokens: int) -> tuple[int, list[Example]]:
        """Context length and the examples of one step, about `tokens` tokens in all."""
        names = list(TASKS)
        ahead = max(self.level.values())
        needs = [1.0 + 0.5 * (ahead - self.level[n]) + (self.score(n) < PASS) for n in names]
        focus = rng.choices(names, needs)[0]
        level = self.level[focus]
        lowest = LENGTHS.index(FIRST_LENGTH.get(focus, LENGTHS[0]))
        if rng.random() > FRONTIER:
            level = rng.randint(lowest, level)
        length = LENGTHS[level]
        ready = [n for n in names if self.level[n] >= level and FIRST_LENGTH.get(n, 0) <= length]
        weights = [needs[names.index(n)] for n in ready]
        lexicon = FULL.shrink(max(16, length // 2))
        rows = max(1, round(tokens / (length * 1.25)))
        examples: list[Example] = []
        for row in range(rows):
            index = step * 1000 + row
            name = focus if row == 0 else rng.choices(ready, weights)[0]
            if length <= ECHO_UP_TO and rng.random() < ECHO:
                examples.append(echo(rng, length, lexicon))
            elif length >= MIX_FROM and name in mixable() and rng.random() < MIXED:
                examples.append(self.blend(name, ready, rng, seed, index, length, lexicon))
            else:
                sample = TASKS[name].generate(
                    seed, index, length, questions=max(2, length // 48), count=count_tokens, lexicon=lexicon
                )
                examples.append(example(sample.context, [(name, q) for q in sample.questions]))
        return length, examples

    def blend(
        self,
        name: str,
        ready: list[str],
        rng: random.Random,
        seed: int,
        index: int,
        length: int,
        lexicon: Lexicon,
    ) -> Example:
        """One sequence with the facts of `name` and of some other ready tasks."""
        others = [n for n in ready if n in mixable() and n != name]
        most = max(1, min(5, length // 128 - 1))
        names = [name, *rng.sample(others, min(len(others), rng.randint(1, most)))]
        context, asked = mix(names, seed, index, length, max(2, length // 128), count_tokens, lexicon)
        return example(context, asked)

    def score(self, name: str) -> float:
        """Share of right answers at the task's present level; 0 before the first."""
        return sum(self.recent[name]) / len(self.recent[name]) if self.recent[name] else 0.0

    def record(self, name: str, length: int, right: bool) -> None:
        """Notes one answer; the task grows where its window is full and good enough."""
        if length != LENGTHS[self.level[name]]:
            return
        self.recent[name].append(right)
        if len(self.recent[name]) == WINDOW and self.score(name) >= PASS and self.level[name] < self.longest:
            self.level[name] += 1
            self.recent[name].clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"level": dict(self.level), "recent": {n: list(r) for n, r in self.recent.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up a checkpoint's levels and windows."""
        self.level = {n: min(level, self.longest) for n, level in state["level"].items()}
        for name, results in state["recent"].items():
            self.recent[name].clear()
            self.recent[name].extend(results)


def echo(rng: random.Random, length: int, lexicon: Lexicon) -> Example:
    """A few random words and numbers said again and again; every token after the first round can be known."""
    period = rng.randint(2, max(6, length // 4))
    unit = " ".join(
        rng.choice(lexicon.things if rng.random() < 0.5 else lexicon.pairs) for _ in range(period)
    )
    ids = encode(unit)
    body = ids[1:]
    while len(ids) < length:
        ids += body
    return Example(ids, [Span("echo", 1 + len(body), len(ids))])
