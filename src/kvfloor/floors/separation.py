"""Bound the leak of a query so that answers with an error still tell hidden values apart.

Floors are lower bounds on a method's memory. Their proof is a game: a sender hides values under keys, and a receiver
reads each value by a spike query, which puts nearly all softmax mass on one key (the spiked key). The leak is the
softmax mass on all other tokens. `eta` is the relative error that an answer may have: it is off by a factor between
1-eta and 1+eta.
"""

from kvfloor.validation import relative_error, whole, within


def eps_s(eta: float) -> float:
    """Return the ratio (softmax mass off the spiked key)/(mass on it) that the game allows: (1-eta)/4.

    The spiked key is the one that the query aims at. At any ratio below (1-eta)/(1+eta), the answers to a hidden 0 and
    to a hidden 1 differ (`eps_s_limit`). The smaller ratio (1-eta)/4 also keeps these answers on different sides of the
    threshold `tau`, and away from it. At the ratio eps_s, the mass off the key is the share eps_s/(1+eps_s) of all
    softmax mass. Derived here (docs/floors.md, "The spike").
    """
    return (1.0 - relative_error(eta)) / 4.0


def eps_s_limit(eta: float) -> float:
    """Return the smallest ratio (mass off the spiked key)/(mass on it) at which a hidden bit can be undecidable.

    Mass is softmax mass; the spiked key is the one that the query aims at. Law: (1-eta)/(1+eta). From this ratio on,
    some answer is within a factor 1±eta both for a hidden 0 and for a hidden 1.
    """
    eta = relative_error(eta)
    return (1.0 - eta) / (1.0 + eta)


def tau(eta: float, leak: float) -> float:
    """Return the threshold between hidden 0 and hidden 1 in a (1±eta) answer: ((1+eta) leak + (1-eta)(1-leak)) / 2.

    `leak` is the softmax mass off the key that the query aims at, or an upper bound on it, such as the ratio `eps_s`.
    The answer is at most (1+eta) leak for a hidden 0, and at least (1-eta)(1-leak) for a hidden 1; the threshold is the
    middle between the two. Raises ValueError unless leak <= (1-eta)/2.
    """
    eta = relative_error(eta)
    leak = within("leak", leak, 0.0, (1.0 - eta) / 2.0)
    return 0.5 * ((1.0 + eta) * leak + (1.0 - eta) * (1.0 - leak))


def level_eps_s(bits: int) -> float:
    """Return the ratio (mass off the spiked key)/(mass on it) that the game allows for `bits`-bit values: 2^-(bits+3).

    Mass is softmax mass; the spiked key is the one that the query aims at. A hidden value is one of 2^bits equally
    spaced levels in [0, 1]. At this ratio, the share of all mass that is off the key is at most an eighth of the
    spacing of the levels.
    """
    return 2.0 ** -(whole("bits", bits) + 3)


def level_tolerance(bits: int) -> float:
    """Return the additive error of an answer below which the nearest of 2^bits levels is the hidden one.

    The levels are equally spaced in [0, 1], and an answer is decoded as the nearest level.
    Law: 1/(2 (2^bits - 1)) - 2^-(bits+3), half the spacing of the levels less the leak that `level_eps_s` allows.
    Derived here.
    """
    bits = whole("bits", bits)
    return 1.0 / (2.0 * (2**bits - 1)) - level_eps_s(bits)
