"""Define a task: a name, limits of its difficulty, and a seeded generator of samples."""

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
    """Hold the checked settings of one sample that a task is to make.

    rng         the sample's own random generator
    length      largest number of tokens, as `count` counts them: of the context or, in tasks of the groups "ruler" and
                "assistant", of the context, the questions and the generated answers together
    difficulty  size of the task, counted in the task's unit, e.g. a number of pairs
    depth       where the asked fact goes: a share of the context, 0 first to 1 last; None: at random
    questions   largest number of questions to ask
    count       returns the number of tokens of a text
    lexicon     words and numbers to draw from
    """

    rng: random.Random
    length: int
    difficulty: int
    depth: float | None
    questions: int
    count: Count
    lexicon: Lexicon


@dataclass(frozen=True)
class Task:
    """Generate the samples of one task.

    A sample is a context with questions about it. The facts are the sentences of the context that hold the answers.

    name             name on the command line
    about            one line for lists of tasks
    unit             what `difficulty` counts, such as "pairs"
    lowest, highest  limits of the difficulty
    default          returns the usual difficulty for a context of a given number of tokens
    make             makes a sample from a `Request`, the settings of one sample
    depth_moves      name of the fact, such as "the key", whose place in the context the caller can choose by the
                     argument `depth`; None if the facts are spread over the whole context and `depth` cannot be given
    things           largest number of nouns that the task's facts need at the default difficulty. Facts of several
                     tasks can be mixed in one context (`mix`). Then each task gets nouns of its own from the lexicon
                     (the words to draw from), so that no task's fact answers another task's question: this many nouns,
                     or proportionally fewer if the lexicon has too few for all tasks
    chat             True if the questions are put to an assistant, so that they can be asked in a chat template; False
                     if the right answer continues the text of the question
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
    chat: bool = False

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
        """Generate the sample that `seed` and `index` decide: a context of nearly `length` tokens, never more.

        length      largest number of tokens of the context; in the tasks of the groups "ruler" and "assistant", the
                    questions and the generated answers are counted too
        depth       share of the context, 0 first to 1 last, at which the asked fact stands; None: at random
        difficulty  size of the task, counted in its `unit`; None: the default for this length
        questions   number of different questions; a task with fewer asks all it has
        count       returns the number of tokens of a text; None: counted by the built-in tokenizer, BOS included
        lexicon     words and numbers to draw from
        Raises ValueError for a length in which the facts do not fit, and for arguments outside their limits.
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
    """Return the function that counts a text's tokens by the built-in tokenizer.

    The tokenizer's module is imported in the call, since the tokenizer is built from the words of the tasks.
    """
    from kvfloor.tasks.tokenizer import count_tokens

    return count_tokens


@dataclass(frozen=True)
class Woven:
    """Make the samples of a task whose facts stand at random places among filler sentences.

    `plot(rng, difficulty, lexicon)` draws the facts and the questions of one sample. Called with a `Request` (the
    settings of one sample), an object of this class returns the `Sample`.
    """

    plot: Callable[[random.Random, int, Lexicon], Plot]

    def __call__(self, request: Request) -> Sample:
        story = self.plot(request.rng, request.difficulty, request.lexicon)
        asked = request.rng.sample(list(story.questions), min(request.questions, len(story.questions)))
        pinned = {} if request.depth is None else {asked[0][1]: request.depth}
        context = weave(request.rng, story.threads, request.length, request.count, pinned)
        return Sample(context, tuple(question for question, _ in asked))
