"""Ask for the value of one key (associative recall, MQAR).

Keys are distinct, and each is followed by its value. All pairs are asked for equally often.
"""

from __future__ import annotations

import random

from .lexicon import Lexicon
from .sample import Question
from .task import Task, Woven
from .weave import Plot


def plot(rng: random.Random, pairs: int, lexicon: Lexicon) -> Plot:
    """Plot `pairs` facts "fox 47."; the question is the key."""
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
