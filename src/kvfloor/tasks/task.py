"""Define a task: a name, a default difficulty, and a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .lexicon import FULL, Lexicon
from .randomness import stream
from .sample import Sample
from .weave import Count, Plot, weave


@dataclass(frozen=True)
class Request:
    """Hold one sample's checked settings: lengths in tokens of `count`, `depth` a share of the context or None."""

    rng: random.Random
    length: int
    difficulty: int
    depth: float | None
    questions: int
    count: Count
    lexicon: Lexicon


@dataclass(frozen=True)
class Task:
    """Generate the samples of one built-in task.

    `unit` says what `difficulty` counts, `lowest` and `highest` are its limits, `default` gives it for a
    length.
    `depth_moves` names what `depth` places; None where the evidence is spread over the whole context.
    `things` is how many of the lexicon's things it may take at its default difficulty, where contexts are shared.
    """

    name: str
    about: str
    unit: str
    lowest: int
    highest: int
    default: Callable[[int], int]
    make: Callable[[Request], Sample]
    depth_moves: str | None = None
    things: int = 0

    def generate(
        self,
        seed: int,
        index: int,
        length: int,
        *,
        depth: float | None = None,
        difficulty: int | None = None,
        questions: int = 1,
        count: Count | None = None,
        lexicon: Lexicon = FULL,
    ) -> Sample:
        """Generate sample `index` of stream `seed`: a context of at most (and nearly) `length` tokens, and its
        questions.

        `count(text)` is the number of tokens of a text, the built-in tokenizer's (BOS included) by default.
        `questions` are different from each other; a task that has fewer to ask gives those it has.
        Raises ValueError for a length the facts do not fit in, and for limits that are overstepped.
        """
        if length < 1:
            raise ValueError(f"length={length}: {self.name} needs a positive number of tokens")
        if questions < 1:
            raise ValueError(f"questions={questions}: ask for at least one")
        if depth is not None and self.depth_moves is None:
            raise ValueError(f"depth={depth}: {self.name} spreads its evidence over the context; leave depth out")
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth={depth}: a share of the context, from 0 (first) to 1 (last)")
        size = self.default(length) if difficulty is None else difficulty
        if not self.lowest <= size <= self.highest:
            raise ValueError(f"difficulty={size}: {self.name} takes {self.lowest} to {self.highest} {self.unit}")
        rng = stream(self.name, seed, index)
        counter = builtin_count() if count is None else count
        return self.make(Request(rng, length, size, depth, questions, counter, lexicon))


def builtin_count() -> Count:
    """Count tokens by the built-in tokenizer; imported late, since the tokenizer is made from the tasks' words."""
    from kvfloor.tasks.tokenizer import count_tokens

    return count_tokens


@dataclass(frozen=True)
class Woven:
    """Generate a task whose facts stand in filler: `plot(rng, difficulty, lexicon)` returns the facts."""

    plot: Callable[[random.Random, int, Lexicon], Plot]

    def __call__(self, request: Request) -> Sample:
        story = self.plot(request.rng, request.difficulty, request.lexicon)
        asked = request.rng.sample(list(story.questions), min(request.questions, len(story.questions)))
        pinned = {} if request.depth is None else {asked[0][1]: request.depth}
        context = weave(request.rng, story.threads, request.length, request.count, pinned)
        return Sample(context, tuple(question for question, _ in asked))
