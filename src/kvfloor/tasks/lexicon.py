"""Define the words and two-digit numbers that tasks are made of. Each is one token of the built-in tokenizer.

In arguments, `rng` is the random generator that decides what is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


def listed(text: str) -> tuple[str, ...]:
    """Return the words of `text`, split at white space."""
    return tuple(text.split())


THINGS = listed(
    """
    anchor apple apron arrow badge ball banana barrel basket beach bead beam bean bear beaver bee beetle
    bell belt bench berry bird biscuit blanket boat bone book boot bottle bowl box branch bread brick
    broom brush bucket bull button cabin cable cactus cake camel camera candle canoe cape card carpet
    carrot cart castle cat cave chain chair chalk cheese cherry chest chicken clam clay cliff cloak clock
    cloud clover coal coat cobra coin comb compass cone copper coral cork corn cotton couch crab crane
    crate crow crown cup curtain daisy deer desk dish dog doll dolphin door dove dragon drum duck eagle
    ear easel egg elbow elk ember engine fan feather fern fiddle fig finch fish flag flame flask flea
    flute fly foam fog fork fox frog fruit fur garlic gate gem ghost giraffe glass globe glove glue goat
    gold goose grape grass guitar gull hammer hamster harp hat hawk heart helmet hen herb heron hill hive
    honey hoof hook horn horse hose ice inkpot iron island ivory jacket jade jar jelly jewel jug kayak
    kettle kite kiwi knee knife knot koala lace ladder lake lamb lamp lantern lark leaf lemon lens
    leopard lily lime lion lizard llama lobster lock log lotus magnet mango map maple marble mask mast
    meadow melon mint mirror mitten mole moon moose moss moth mouse mug mule nail napkin needle nest net
    newt nut oak oar olive onion orange orchid otter owl oyster paddle
    """
)

TRAITS = listed(
    """
    amber ancient azure bitter blue bold brave bright broken calm clever cold crimson curly dark dusty
    empty fancy gentle golden green grey heavy hidden hollow humble jolly lucky narrow pale purple silver
    """
)

PEOPLE = listed(
    """
    baker farmer sailor miller weaver teacher painter doctor carpenter shepherd singer tailor gardener
    fisher hunter merchant soldier writer driver dancer
    """
)

MANNERS = listed(
    """
    old young tired quiet cheerful careful hungry famous patient lonely
    """
)

ACTIONS = listed(
    """
    walks waits sleeps works sings rests reads dreams travels cooks paints laughs listens wanders hides
    looks
    """
)

PLACES = listed(
    """
    river market village tower garden bridge forest harbour station kitchen valley school chapel library
    mountain road theatre field cellar square
    """
)

TIMES = listed(
    """
    today tonight often sometimes again later slowly alone together quickly
    """
)

LINKS = listed(
    """
    near behind beside towards inside above
    """
)

REGISTERS = tuple(f"r{i}" for i in range(16))

GRAMMAR = listed(
    """
    the a and is of to in what code key pass vault repeat begin end passage let list follow most frequent
    words are three all which then while it was no
    """
)

PAIRS = tuple(f"{i:02d}" for i in range(100))


@dataclass(frozen=True)
class Lexicon:
    """Hold the words and numbers that a task draws from.

    things  nouns
    traits  adjectives
    pairs   two-digit numbers
    A smaller lexicon gives the same task with fewer different words and numbers.
    """

    things: tuple[str, ...] = THINGS
    traits: tuple[str, ...] = TRAITS
    pairs: tuple[str, ...] = PAIRS

    def shrink(self, symbols: int) -> Lexicon:
        """Return a lexicon with only the first `symbols` nouns, `symbols` adjectives and `symbols` numbers.

        The training of the built-in model starts with such a lexicon. Raises ValueError if `symbols` is less than 1.
        """
        if symbols < 1:
            raise ValueError(f"symbols={symbols}: a lexicon needs at least 1 symbol per pool")
        return Lexicon(self.things[:symbols], self.traits[:symbols], self.pairs[:symbols])

    def split(self, rng: random.Random, sizes: Sequence[int]) -> list[Lexicon]:
        """Split the nouns at random: return one lexicon with `sizes[0]` nouns, one with `sizes[1]` nouns, and so on.

        No noun is in two of the lexicons, so several tasks in one context cannot use the same noun. Adjectives and
        numbers are shared.
        """
        things = rng.sample(self.things, sum(sizes))
        ends = list(accumulate(sizes, initial=0))
        return [Lexicon(tuple(things[a:b]), self.traits, self.pairs) for a, b in pairwise(ends)]

    def number(self, rng: random.Random, digits: int) -> str:
        """Draw a number of `digits` digits, as text: two-digit numbers of the lexicon, joined.

        If `digits` is odd, the last digit is drawn from 0 to 9.
        """
        groups = "".join(rng.choice(self.pairs) for _ in range(digits // 2))
        return groups + (rng.choice("0123456789") if digits % 2 else "")

    def numbers(self, rng: random.Random, digits: int, n: int) -> list[str]:
        """Draw `n` different numbers of `digits` digits. Raises ValueError if the lexicon has fewer."""
        room = len(self.pairs) ** (digits // 2) * (10 if digits % 2 else 1)
        if n > room:
            raise ValueError(f"{n} different numbers of {digits} digits asked, only {room} exist in this lexicon")
        found: dict[str, None] = {}
        while len(found) < n:
            found[self.number(rng, digits)] = None
        return list(found)


FULL = Lexicon()
