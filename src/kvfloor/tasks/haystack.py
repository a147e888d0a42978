"""Hide sentences with facts in a haystack: among the sentences of an essay, or between lines."""

from __future__ import annotations

import random
from itertools import pairwise

from .fit import fill, reserved
from .passages import essay
from .sample import Question
from .task import Request

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Depths in percent at which a sentence may stand in an essay: 40 equal steps, as in RULER."""
FEWEST_WORDS = 40


def in_essay(request: Request, head: str, facts: list[str], questions: tuple[Question, ...]) -> str:
    """Return a context: `head`, then an essay with the facts among its sentences, at most 40 of them.

    Context, questions and generated answers together have at most the requested length. Raises ValueError if the length
    is too small for that.
    """
    rest = request.rng.getrandbits(64)

    def build(words: int) -> str:
        return head + " ".join(among_sentences(random.Random(rest), essay(words), facts))

    room = request.length - reserved(questions, request.count)
    return fill(build, room, request.count, FEWEST_WORDS, f"length={request.length}: the facts")


def among_sentences(rng: random.Random, sentences: list[str], needles: list[str]) -> list[str]:
    """Return the sentences with each needle at a depth of its own, drawn from DEPTHS."""
    places = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(DEPTHS, len(needles)))
    out = []
    for (start, stop), needle in zip(pairwise([0, *places]), needles, strict=True):
        out += [*sentences[start:stop], needle]
    return out + sentences[places[-1] if places else 0 :]


def between_lines(rng: random.Random, lines: list[str], needles: list[str]) -> list[str]:
    """Return the lines with the needles before different random ones of them, in order."""
    places = sorted(rng.sample(range(len(lines)), len(needles)))
    out = []
    for (start, stop), needle in zip(pairwise([0, *places]), needles, strict=True):
        out += [*lines[start:stop], needle]
    return out + lines[places[-1] :]
