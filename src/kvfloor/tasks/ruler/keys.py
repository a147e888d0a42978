"""Draw the keys and values of needles (hidden facts "KEY is VALUE"): word pairs, seven-digit numbers, UUIDs.

In arguments, `rng` is the random generator that decides what is drawn.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator

from ..lexicon import FULL, PEOPLE, PLACES, listed

ADJECTIVES = listed(
    """
    able acid agile airy alert alien amused ancient angry arctic ashen awake aware awful basic bent best big black bland
    blank bleak blind blond blunt bold brave brief brisk broad bronze brown bulky busy calm casual central cheap chief
    chilly civil clean clear close cloudy coarse common compact cosmic crisp crooked cruel cubic curious daily damp
    daring dear deep dense direct distant divine dizzy double dreamy dry dull eager early easy elder elegant endless
    equal exact faint fair faithful false fancy fast fatal fierce final firm fit flat foggy formal frail free fresh
    frosty frozen full funny giant glad gloomy good grand grateful grave great grim gross handy happy hard harsh hasty
    helpful high holy honest huge icy ideal idle inner jagged joint keen kind large late lazy lean legal level light
    limp liquid little lively local lone long loose loud lovely low loyal lunar lush magic main major marine mature
    merry mighty mild minor misty mobile modern modest moist mossy muddy mute mutual naive naked native naval near neat
    nervous new nimble noble noisy normal northern numb odd official open oval outer plain pleasant polite poor prime
    proud pure quaint quick rapid rare raw ready real rich right rigid ripe rocky rough round royal rude rural rusty
    sacred sad safe salty scarce secret serene severe shaky sharp shiny short shy sleepy slim slow small smart smooth
    snowy social soft solar solemn solid sour southern spare stable stale steep stern sticky stiff stout strange strict
    strong sturdy sudden sunny sure sweet swift tall tame tart tasty tender tense thick thin tidy tight tiny tough
    tropical true vague vain valid vast vivid warm wary weak weird western wet wide wild wise wooden worthy yellow young
    """
)

NOUNS = (*FULL.things, *PEOPLE, *PLACES)


def word_key(rng: random.Random) -> str:
    """Draw a key such as "ancient-anchor"."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def number(rng: random.Random) -> str:
    """Draw a number of seven digits, the first of which is not 0."""
    return str(rng.randint(10**6, 10**7 - 1))


def uuid4(rng: random.Random) -> str:
    """Draw a UUID of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


KINDS = {"words": word_key, "numbers": number, "uuids": uuid4}
"""Map each kind of keys and values, as RULER calls it, to the function that draws one."""


def different(rng: random.Random, kind: str) -> Iterator[str]:
    """Yield random keys or values of one kind ("words", "numbers" or "uuids") without end, none of them twice."""
    seen: set[str] = set()
    while True:
        one = KINDS[kind](rng)
        if one not in seen:
            seen.add(one)
            yield one
