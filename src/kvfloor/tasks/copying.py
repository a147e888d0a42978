"""Define the task "copy": repeat word for word a marked passage of random words, hidden in filler.

A `Plot` holds the facts and the questions of one sample, before the facts are placed among filler sentences. `rng` is
the sample's random generator; a `Lexicon` holds the words and numbers to draw from.
"""

from __future__ import annotations

import random

from .lexicon import Lexicon
from .sample import Question
from .task import Task, Woven
from .weave import Plot


def plot(rng: random.Random, words: int, lexicon: Lexicon) -> Plot:
    """Draw the passage of one sample, such as "begin passage fox hen fox end passage.", and the question to repeat it.

    The passage's number of words is random, from 2/3 of `words` to `words`. Each word is drawn from the lexicon's nouns
    with replacement.
    """
    n = rng.randint(max(1, words * 2 // 3), words)
    passage = " ".join(rng.choice(lexicon.things) for _ in range(n))
    return Plot(
        [[f"begin passage {passage} end passage."]],
        [(Question("repeat the passage. begin passage", passage), 0)],
    )


COPY = Task(
    name="copy",
    about="a marked passage of 32 to 48 words, repeated word for word",
    unit="words",
    lowest=1,
    highest=256,
    default=lambda length: max(3, min(48, length // 6)),
    make=Woven(plot),
    depth_moves="the passage",
    things=64,
)
