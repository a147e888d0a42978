"""Weave several tasks' facts into one context, so that one long sequence can ask about all of them."""

from __future__ import annotations

from collections.abc import Sequence

from .lexicon import Lexicon
from .randomness import stream
from .registry import TASKS
from .sample import Question
from .task import Woven
from .weave import Count, weave


def mixable() -> tuple[str, ...]:
    """Return the tasks whose facts can stand among other tasks' facts."""
    return tuple(name for name, task in TASKS.items() if isinstance(task.make, Woven))


def mix(
    names: Sequence[str], seed: int, index: int, length: int, questions: int, count: Count, lexicon: Lexicon
) -> tuple[str, list[tuple[str, Question]]]:
    """Generate one context of `length` tokens with the facts of tasks `names`, and up to `questions` questions of each.

    Returns the context and (task name, question) in random order. Each task gets its share of the length and
    its own names, so that no task's fact answers another task's question.
    """
    rng = stream("mixture", seed, index)
    scale = len(lexicon.things) / sum(task.things for task in TASKS.values())
    sizes = [int(TASKS[name].things * min(1.0, scale)) for name in names]
    threads: list[Sequence[str]] = []
    asked: list[tuple[str, Question]] = []
    for name, part in zip(names, lexicon.split(rng, sizes), strict=True):
        task = TASKS[name]
        if not isinstance(task.make, Woven):
            raise ValueError(f"{name} fills its whole context; these can be mixed: {', '.join(mixable())}")
        story = task.make.plot(rng, task.default(length // len(names)), part)
        threads += story.threads
        chosen = rng.sample(list(story.questions), min(questions, len(story.questions)))
        asked += [(name, question) for question, _ in chosen]
    rng.shuffle(asked)
    return weave(rng, threads, length, count, {}), asked
