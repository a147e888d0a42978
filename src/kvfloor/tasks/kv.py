"""Define the task "kv": recall the value of one key among key-value pairs.

Keys and values are four-digit numbers of two tokens each. Keys share tokens with one another, so both tokens of a key
must be matched.
A `Plot` holds the facts and the questions of one sample, before the facts are placed among filler sentences. `rng` is
the sample's random generator; a `Lexicon` holds the words and numbers to draw from.
"""

from __future__ import annotations

import random

from .lexicon import Lexicon
from .sample import Question
from .task import Task, Woven
from .weave import Plot


def plot(rng: random.Random, pairs: int, lexicon: Lexicon) -> Plot:
    """Draw `pairs` facts such as "4821 = 9043." with different keys, and for each the question "4821 =".

    Raises ValueError if the lexicon has too few numbers for so many keys.
    """
    keys = lexicon.numbers(rng, 4, pairs)
    values = [lexicon.number(rng, 4) for _ in keys]
    return Plot(
        [[f"{key} = {value}."] for key, value in zip(keys, values, strict=True)],
        [(Question(f"{key} =", value), i) for i, (key, value) in enumerate(zip(keys, values, strict=True))],
    )


KV = Task(
    name="kv",
    about="two-token keys and values among pairs that share their halves",
    unit="pairs",
    lowest=1,
    highest=1024,
    default=lambda length: max(2, min(64, length // 16)),
    make=Woven(plot),
    depth_moves="the asked pair",
)
