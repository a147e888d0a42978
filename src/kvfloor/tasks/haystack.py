"""Hide sentences with facts (needles) in a longer text (the haystack): among an essay's sentences, or between lines."""

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
    """Return a context: the text `head`, then an essay with the sentences `facts` among its own, at most 40 facts.

    Context, questions and generated answers together have nearly `request.length` tokens, never more. Raises ValueError
    if the length is too small for that.
    """
    rest = request.rng.getrandbits(64)

    def build(words: int) -> str:
        return head + " ".join(among_sentences(random.Random(rest), essay(words), facts))

    room = request.length - reserved(questions, request.count)
    return fill(build, room, request.count, FEWEST_WORDS, f"length={request.length}: the facts")


def among_sentences(rng: random.Random, sentences: list[str], needles: list[str]) -> list[str]:
    """Return the sentences with the needles among them, in order, at different depths drawn from DEPTHS.

    A depth is a share of the sentences in percent, 0 first to 100 last. There are 40 depths, so at most 40 needles.
    """
    places = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(DEPTHS, len(needles)))
    out = []
    for (start, stop), needle in zip(pairwise([0, *places]), needles, strict=True):
        out += [*sentences[start:stop], needle]
    return out + sentences[places[-1] if places else 0 :]


def between_lines(rng: random.Random, lines: list[str], needles: list[str]) -> list[str]:
    """Return the lines with the needles among them, in order, each before another random line."""
    places = sorted(rng.sample(range(len(lines)), len(needles)))
    out = []
    for (start, stop), needle in zip(pairwise([0, *places]), needles, strict=True):
        out += [*lines[start:stop], needle]
    return out + lines[places[-1] :]
