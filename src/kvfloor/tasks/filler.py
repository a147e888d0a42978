"""Generate random filler sentences, which answer no question, to hide a task's facts among them.

The sentences are drawn from a small grammar with a seeded generator, instead of repeating one paragraph.
"""

from __future__ import annotations

import random

from .lexicon import ACTIONS, LINKS, MANNERS, PEOPLE, PLACES, TIMES

PATTERNS = (
    "the {manner} {person} {action} {link} the {place}.",
    "the {person} {action} {time}.",
    "a {person} {action} in the {place} while the {other} {act}.",
    "{time} the {manner} {person} {action}, and the {other} {act} {link} the {place}.",
    "it was {time} in the {place}.",
    "no {person} {action} {link} the {manner} {other}.",
    "the {person} {action}.",
)


def sentence(rng: random.Random) -> str:
    """Draw one filler sentence with the generator `rng`: 5 to 15 tokens of the built-in tokenizer."""
    return rng.choice(PATTERNS).format(
        manner=rng.choice(MANNERS),
        person=rng.choice(PEOPLE),
        other=rng.choice(PEOPLE),
        action=rng.choice(ACTIONS),
        act=rng.choice(ACTIONS),
        link=rng.choice(LINKS),
        place=rng.choice(PLACES),
        time=rng.choice(TIMES),
    )
