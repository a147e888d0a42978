"""Define the tasks "passkey" and "passkey64": recall a number of 5 or 6 digits, or of 64, hidden in filler.

The 64 digits of "passkey64" take 32 tokens to copy. In short contexts, both tasks have fewer digits by default.
A `Plot` holds the facts and the questions of one sample, before the facts are placed among filler sentences. `rng` is
the sample's random generator; a `Lexicon` holds the words and numbers to draw from.
"""

from __future__ import annotations

import random

from .lexicon import Lexicon
from .sample import Question
from .task import Task, Woven
from .weave import Plot


def hide(rng: random.Random, digits: int, lexicon: Lexicon, kind: str) -> Plot:
    """Draw one fact such as "the pass key is 48213.", and the question that ends in "the pass key is".

    digits  number of digits
    kind    the word before "key", such as "pass"
    """
    number = lexicon.number(rng, digits)
    ask = f"what is the {kind} key? the {kind} key is"
    return Plot([[f"the {kind} key is {number}."]], [(Question(ask, number), 0)])


def short(rng: random.Random, digits: int, lexicon: Lexicon) -> Plot:
    """Draw the fact and question of "passkey": a number of `digits` digits or, at random, of one digit fewer.

    As the number's length varies, the model must also recall where the number ends.
    """
    return hide(rng, digits - (digits > 2 and rng.random() < 0.5), lexicon, "pass")


def long(rng: random.Random, digits: int, lexicon: Lexicon) -> Plot:
    """Draw the fact and question of "passkey64": a number of exactly `digits` digits."""
    return hide(rng, digits, lexicon, "vault")


PASSKEY = Task(
    name="passkey",
    about="one short number in filler",
    unit="digits (or one fewer)",
    lowest=2,
    highest=12,
    default=lambda length: 2 if length < 40 else 4 if length < 80 else 6,
    make=Woven(short),
    depth_moves="the key",
)

PASSKEY64 = Task(
    name="passkey64",
    about="one 64-digit number in filler: 32 tokens to copy without a slip",
    unit="digits",
    lowest=2,
    highest=128,
    default=lambda length: max(4, min(64, length // 12 * 2)),
    make=Woven(long),
    depth_moves="the key",
)
