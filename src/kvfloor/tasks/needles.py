"""Ask for one of many needles in filler, all of one form, with keys that share words."""

from __future__ import annotations

import random

from .lexicon import Lexicon
from .sample import Question
from .task import Task, Woven
from .weave import Plot


def plot(rng: random.Random, needles: int, lexicon: Lexicon) -> Plot:
    """Plot `needles` facts "the code of the pale fox is 4821.", of so few words that both words of a key count."""
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
