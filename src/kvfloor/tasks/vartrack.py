"""Define the task "vartrack": find a variable's value by following a chain of scattered assignments.

The context holds several chains, such as "let fox = 4821." ... "let hen = fox.". The difficulty is a chain's number of
hops, i.e. of assignments from another variable.
A `Plot` holds the facts and the questions of one sample, before the facts are placed among filler sentences. `rng` is
the sample's random generator; a `Lexicon` holds the words and numbers to draw from.
"""

from __future__ import annotations

import random

from .lexicon import Lexicon
from .sample import Question
from .task import Task, Woven
from .weave import Plot

CHAINS = 4


def plot(rng: random.Random, hops: int, lexicon: Lexicon) -> Plot:
    """Draw four chains of assignments, and for each a question about the chain's last variable.

    A chain begins with "let fox = 4821." and goes on with `hops` assignments such as "let hen = fox.". The answer
    spells out the chain back to the number: for one hop, the question ends in "hen =" and the answer is "fox = 4821".
    There are fewer chains if the lexicon has too few nouns. Raises ValueError if the nouns do not suffice for one
    chain.
    """
    chains = min(CHAINS, len(lexicon.things) // (hops + 1))
    if chains < 1:
        raise ValueError(f"difficulty={hops}: a chain of {hops} hops needs {hops + 1} names")
    names = rng.sample(lexicon.things, chains * (hops + 1))
    threads: list[list[str]] = []
    questions: list[tuple[Question, int]] = []
    for i in range(chains):
        chain = names[i * (hops + 1) : (i + 1) * (hops + 1)]
        sources = [lexicon.number(rng, 4), *chain[:-1]]
        threads.append([f"let {name} = {source}." for name, source in zip(chain, sources, strict=True)])
        questions.append((Question(f"follow {chain[-1]}. {chain[-1]} =", " = ".join(reversed(sources))), i))
    return Plot(threads, questions)


VARTRACK = Task(
    name="vartrack",
    about=f"{CHAINS} chains of assignments, one followed to its value",
    unit="hops",
    lowest=1,
    highest=8,
    default=lambda length: 1 if length < 96 else 2 if length < 160 else 3 if length < 256 else 4,
    make=Woven(plot),
    depth_moves="the first assignment of the asked chain",
    things=24,
)
