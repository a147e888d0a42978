"""Define RULER's task cwe (common words): name the ten words that are in a numbered list more often than all others.

Each common word is in the list 30 times and every other one 3 times; in contexts below 4,096 tokens, 6 times and once.
A worked example with a shorter list and its answer comes first. Templates and parameters are those of
https://github.com/NVIDIA/RULER; the words are those of this package's texts.
"""

from __future__ import annotations

import random

from ..checks import Contains, Part
from ..fit import fill, reserved
from ..lexicon import FULL
from ..passages import plain_words
from ..sample import Question, Sample
from ..task import Request, Task

COMMON = 10
COMPOUNDS = tuple(f"{trait}-{thing}" for trait in FULL.traits for thing in FULL.things)
"""Words that long lists have after the texts' own are used up."""
MOST = 120
SHORT = 4096
_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)


def make(request: Request) -> Sample:
    """Return a sample: the worked example, then the list, and the question for its ten common words.

    The request has the random generator and the largest number of tokens. Raises ValueError if the number is too small.
    """
    rng, short = request.rng, request.length < SHORT
    pool = plain_words()
    shown = rng.sample(pool, 20 if short else 40)
    first = question(shown[:COMMON])
    example = (
        _HEAD + numbered(rng, shown, *((3, 1) if short else (10, 3))) + f"{first.lead} {in_order(shown[:COMMON])}\n"
    )
    words = [*rng.sample(pool, len(pool)), *rng.sample(COMPOUNDS, len(COMPOUNDS))]
    asked = question(words[:COMMON])
    often, seldom = (6, 1) if short else (30, 3)
    rest = rng.getrandbits(64)

    def build(others: int) -> str:
        return example + _HEAD + numbered(random.Random(rest), words[: COMMON + others], often, seldom)

    room = request.length - reserved((asked,), request.count)
    return Sample(fill(build, room, request.count, 1, f"length={request.length}: cwe's words"), (asked,))


def numbered(rng: random.Random, words: list[str], often: int, seldom: int) -> str:
    """Return a shuffled list "1. fox 2. hen ...": the first ten words `often` times each, the others `seldom` times.

    words: the different words, the ten common ones first. rng: the random generator that shuffles.
    """
    entries = words[:COMMON] * often + words[COMMON:] * seldom
    rng.shuffle(entries)
    return in_order(entries)


def in_order(words: list[str]) -> str:
    """Return the words as a numbered list in one line: "1. fox 2. hen ..."."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def question(words: list[str]) -> Question:
    """Return the question for the ten common words; `words` is the right answer."""
    return Question(
        ask="\nQuestion: What are the 10 most common words in the above list?",
        answer=in_order(words),
        opening="Answer: The top 10 words that appear most often in the list are:",
        parts=(Part("references", Contains(tuple(words))),),
        most=MOST,
    )


COMMON_WORDS = Task(
    "ruler_cwe", "RULER: the ten most common words of a numbered list", "test", 1, 1, lambda length: 1, make, chat=True
)
