"""Choose the next training batch: every task starts with short contexts, and grows when it passes its bar."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

from builtin_model.examples import STOP_ID, Example, Span, example
from kvfloor.tasks import FULL, TASKS, Lexicon
from kvfloor.tasks.mixture import mix, mixable
from kvfloor.tasks.tokenizer import count_tokens, encode

LENGTHS = (48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 4608)
FIRST_LENGTH = {"vartrack": 64}  # shorter contexts cannot hold even the easiest sample of the task
PASS = 0.93  # a task grows at this share of right answers among the last WINDOW at its longest length
WINDOW = 48
HUNGER = 4.0  # extra weight of a task that does not pass at its present level
FRONTIER = 0.6  # share of batches at the focused task's longest length; the others revisit shorter ones
ONE_ANSWER = {"words": 0.2, "registers": 0.3}  # FRONTIER of tasks with one answer per sequence: short ones teach more
MIXED = 0.6  # share of long sequences that hold several tasks' facts
MIX_FROM = 256
EXERCISE_UP_TO, ECHO, DRILL = 192, 0.1, 0.2  # shares of short sequences that are bare repetition or bare facts
EXERCISES = ("echo", "drill")


class Curriculum:
    """Keep each task's level (an index into LENGTHS) and its latest results at that level."""

    def __init__(
        self, longest: int, focus: float = 1.0, share: float = 0.0, tasks: Sequence[str] = tuple(TASKS)
    ) -> None:
        self.tasks = [name for name in TASKS if name in tasks]
        self.focus = focus
        self.share = share
        self.longest = max(i for i, n in enumerate(LENGTHS) if n <= longest)
        self.level = {name: LENGTHS.index(FIRST_LENGTH.get(name, LENGTHS[0])) for name in TASKS}
        self.recent = {name: deque[bool](maxlen=WINDOW) for name in (*TASKS, *EXERCISES)}

    def draw(self, seed: int, step: int, rng: random.Random, tokens: int) -> tuple[int, list[Example]]:
        """Draw the context length and the examples of one step, about `tokens` tokens in all."""
        names = self.tasks
        ahead = max(self.level[n] for n in names)
        needs = [1 + 0.5 * (ahead - self.level[n]) ** self.focus + HUNGER * (self.score(n) < PASS) for n in names]
        focus = rng.choices(names, needs)[0]
        level = self.level[focus]
        lowest = LENGTHS.index(FIRST_LENGTH.get(focus, LENGTHS[0]))
        if rng.random() > ONE_ANSWER.get(focus, FRONTIER):
            level = rng.randint(lowest, level)
        length = LENGTHS[level]
        ready = [n for n in names if self.level[n] >= level and FIRST_LENGTH.get(n, 0) <= length]
        weights = [needs[names.index(n)] for n in ready]
        examples: list[Example] = []
        while sum(len(e.ids) for e in examples) < tokens * 0.9:
            row = len(examples)
            index = step * 1000 + row
            chosen = row == 0 or (self.share > 0 and rng.random() < self.share)
            name = focus if chosen else rng.choices(ready, weights)[0]
            lexicon = self.lexicon(name)
            dice = rng.random() if length <= EXERCISE_UP_TO else 1.0
            if dice < ECHO:
                examples.append(echo(rng, length, lexicon))
            elif dice < ECHO + DRILL:
                examples.append(drill(rng, length, lexicon))
            elif length >= MIX_FROM and name in mixable() and rng.random() < MIXED:
                examples.append(self.blend(name, ready, rng, seed, index, length, lexicon))
            else:
                sample = TASKS[name].generate(
                    seed, index, length, questions=max(2, length // 48), count=count_tokens, lexicon=lexicon
                )
                examples.append(example(sample.context, [(name, q) for q in sample.questions]))
        return length, examples

    def lexicon(self, name: str) -> Lexicon:
        """Return the words that a task draws from: more of them at a higher level, even for a short sample."""
        return FULL.shrink(max(64, LENGTHS[self.level[name]]))

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
        """Build one sequence with the facts of task `name` and of some other tasks that have reached this length."""
        others = [n for n in ready if n in mixable() and n != name]
        most = max(1, min(5, length // 128 - 1))
        names = [name, *rng.sample(others, min(len(others), rng.randint(1, most)))]
        context, asked = mix(names, seed, index, length, max(2, length // 128), count_tokens, lexicon)
        return example(context, asked)

    def score(self, name: str) -> float:
        """Return the share of right answers at the task's present level; 0 before the first one."""
        return sum(self.recent[name]) / len(self.recent[name]) if self.recent[name] else 0.0

    def record(self, name: str, length: int, right: bool) -> None:
        """Record one answer, and raise the task's level if its last WINDOW answers reach the bar."""
        if name in EXERCISES:
            self.recent[name].append(right)
            return
        if length != LENGTHS[self.level[name]]:
            return
        self.recent[name].append(right)
        if len(self.recent[name]) == WINDOW and self.score(name) >= PASS and self.level[name] < self.longest:
            self.level[name] += 1
            self.recent[name].clear()

    def state(self) -> dict[str, Any]:
        """Return the levels and the latest results, for a checkpoint."""
        return {"level": dict(self.level), "recent": {n: list(r) for n, r in self.recent.items()}}

    def raise_to(self, length: int) -> None:
        """Raise every trained task to this context length at least, even below the bar."""
        floor = max((i for i, n in enumerate(LENGTHS) if n <= length), default=0)
        for name in self.tasks:
            if self.level[name] < floor:
                self.level[name] = floor
                self.recent[name].clear()

    def restore(self, state: dict[str, Any]) -> None:
        """Load the levels and the latest results of a checkpoint."""
        self.level = {n: min(level, self.longest) for n, level in state["level"].items()}
        for name, results in state["recent"].items():
            self.recent[name].clear()
            self.recent[name].extend(results)


def echo(rng: random.Random, length: int, lexicon: Lexicon) -> Example:
    """Build an exercise that repeats a few random words and numbers; every token after the first round is scored."""
    period = rng.randint(2, max(6, length // 6))
    body = [token for _ in range(period) for token in encode(symbol(rng, lexicon), bos=False)]
    ids = encode("") + body
    while len(ids) < length:
        ids += body
    return Example(ids, [Span("echo", 1 + len(body), len(ids))])


def drill(rng: random.Random, length: int, lexicon: Lexicon) -> Example:
    """Build an exercise that repeats key-value facts in random order; every value seen before is scored."""
    n = rng.randint(2, max(3, length // 12))
    long = rng.random() < 0.5
    keys = [f"{k} =" for k in lexicon.numbers(rng, 4, n)] if long else rng.sample(lexicon.things, n)
    facts = [(encode(key, bos=False), encode(lexicon.number(rng, 4 if long else 2), bos=False)) for key in keys]
    ids, spans, told = encode(""), list[Span](), set[int]()
    while len(ids) < length:
        i = rng.randrange(n)
        key, value = facts[i]
        ids += key
        if i in told:
            spans.append(Span("drill", len(ids), len(ids) + len(value)))
        ids += [*value, STOP_ID]
        told.add(i)
    return Example(ids, spans)


def symbol(rng: random.Random, lexicon: Lexicon) -> str:
    """Draw a noun or a two-digit number."""
    return rng.choice(lexicon.things if rng.random() < 0.5 else lexicon.pairs)
