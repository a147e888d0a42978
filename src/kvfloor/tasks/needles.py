"""Define the task "needles": recall one of several equally phrased facts, hidden in filler.

The facts share the words of their keys (the pale fox, the pale hen, the old fox), so both words must be matched.
A `Plot` holds the facts and the questions of one sample, before the facts are placed among filler sentences. `rng` is
the sample's random generator; a `Lexicon` holds the words and numbers to draw from.
"""

from __future__ import annotations

import random

from .lexicon import Lexicon
from .sample import Question
from .task import Task, Woven
from .weave import Plot


def plot(rng: random.Random, needles: int, lexicon: Lexicon) -> Plot:
    """Draw `needles` facts such as "the code of the pale fox is 4821.", and a question about each.

    A key is an adjective and a noun, such as "pale fox". The keys combine few adjectives and nouns, so that a single
    word seldom identifies a fact. Raises ValueError if the lexicon has too few words for so many keys.
    """
    side = max(2, min(needles, len(lexicon.traits), len(lexicon.things)))
    traits, things = rng.sample(lexicon.traits, side), rng.sample(lexicon.things, side)
    if needles > side * side:
        raise ValueError(f"difficulty={needles}: only {side * side} keys can be made of {side} traits and things")
    # a square of a few names holds all keys: most traits and most things come up more than once
    narrow = next(s for s in range(1, side + 1) if s * s >= needles)
    keys = rng.sample([f"{trait} {thing}" for trait in traits[:narrow] for thing in things[:narrow]], needles)
    codes = [lexicon.number(rng, 4) for _ in keys]
    facts = [f"the code of the {key} is" for key in keys]
    return Plot(
        [[f"{fact} {code}."] for fact, code in zip(facts, codes, strict=True)],
        [
            (Question(f"what is the code of the {key}? {fact}", code), i)
            for i, (key, fact, code) in enumerate(zip(keys, facts, codes, strict=True))
        ],
    )


NEEDLES = Task(
    name="needles",
    about="several needles of one form in filler, one asked",
    unit="needles",
    lowest=1,
    highest=256,
    default=lambda length: max(2, min(8, length // 24)),
    make=Woven(plot),
    depth_moves="the asked needle",
    things=16,
)
