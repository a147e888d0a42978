"""Mix the facts of several tasks in one context, and ask questions about all of them."""

from __future__ import annotations

from collections.abc import Sequence

from .lexicon import Lexicon
from .randomness import stream
from .registry import TASKS
from .sample import Question
from .task import Woven
from .weave import Count, weave


def mixable() -> tuple[str, ...]:
    """Return the names of the tasks that `mix` accepts.

    They are the tasks whose facts stand among filler sentences, and so can stand among the facts of other tasks.
    """
    return tuple(name for name, task in TASKS.items() if isinstance(task.make, Woven))


def mix(
    names: Sequence[str], seed: int, index: int, length: int, questions: int, count: Count, lexicon: Lexicon
) -> tuple[str, list[tuple[str, Question]]]:
    """Generate one context of at most `length` tokens that holds the facts of several tasks, and questions about it.

    Returns (context, [(task name, question), ...] in random order), with up to `questions` questions per task.
    names        names of the tasks; each gets an equal share of the length, and nouns that no other task uses, so that
                 no task's fact answers another task's question
    seed, index  decide all random choices
    count        returns the number of tokens of a text
    lexicon      words and numbers to draw from
    Raises ValueError for a task that is not in `mixable()`, and where the facts do not fit.
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
