"""Define the task "recall": recall the value of one key among pairs (multi-query associative recall, MQAR).

Keys are distinct words, each followed by its value, a two-digit number. Every pair is equally likely to be asked.
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
    """Draw `pairs` facts such as "fox 47." with different keys, and for each the question "fox"."""
    keys = rng.sample(lexicon.things, pairs)
    values = [rng.choice(lexicon.pairs) for _ in keys]
    return Plot(
        [[f"{key} {value}."] for key, value in zip(keys, values, strict=True)],
        [(Question(key, value), i) for i, (key, value) in enumerate(zip(keys, values, strict=True))],
    )


RECALL = Task(
    name="recall",
    about="one-token keys and values, asked uniformly over the pairs",
    unit="pairs",
    lowest=1,
    highest=256,
    default=lambda length: max(2, min(64, length // 12)),
    make=Woven(plot),
    depth_moves="the asked pair",
    things=96,
)
