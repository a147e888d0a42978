"""Hide sentences with facts (needles) in a longer text (the haystack): among an essay's sentences, or between lines.

A `Request` holds what a sample is made from: among others its random generator `rng`, its largest number of tokens
`length`, and the function `count`, which returns the number of tokens of a text.
"""

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

    Context, `questions` and generated answers together have nearly `request.length` tokens, never more. The questions
    are counted, but not written into the context. Raises ValueError if the length is too small.
    """
    rest = request.rng.getrandbits(64)

    def build(words: int) -> str:
        return head + " ".join(among_sentences(random.Random(rest), essay(words), facts))

    room = request.length - reserved(questions, request.count)
    return fill(build, room, request.count, FEWEST_WORDS, f"length={request.length}: the facts")


def among_sentences(rng: random.Random, sentences: list[str], needles: list[str]) -> list[str]:
    """Return a list of the sentences with the needles among them, at different random depths.

    Sentences and needles each keep their order. A needle's depth is the percentage of the sentences that stand before
    it; it is drawn from the 40 values of DEPTHS, so there are at most 40 needles.
    """
    places = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(DEPTHS, len(needles)))
    out = []
    for (start, stop), needle in zip(pairwise([0, *places]), needles, strict=True):
        out += [*sentences[start:stop], needle]
    return out + sentences[places[-1] if places else 0 :]


def between_lines(rng: random.Random, lines: list[str], needles: list[str]) -> list[str]:
    """Return a list of the lines with the needles among them, no two of them between the same two lines.

    Lines and needles each keep their order. The places of the needles are random; none stands after the last line.
    There must not be more needles than lines.
    """
    places = sorted(rng.sample(range(len(lines)), len(needles)))
    out = []
    for (start, stop), needle in zip(pairwise([0, *places]), needles, strict=True):
        out += [*lines[start:stop], needle]
    return out + lines[places[-1] :]
