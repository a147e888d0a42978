"""Bound the leak of a query so that answers with an error still tell hidden values apart.

In the game of the floors, Alice hides values under keys, and Bob, the receiver of the state, reads each value by a
spike query, which puts nearly all softmax mass on one key (the spiked key). The leak is the mass on all other tokens.
The error of an answer is a relative one, a factor 1±eta, or an additive one.
"""

from kvfloor.validation import relative_error, whole, within


def eps_s(eta: float) -> float:
    """Return the ratio (softmax mass off the spiked key)/(mass on it) that the game allows: (1-eta)/4.

    The spiked key is the one that the query aims at. The mass off it, as a share of all mass, is then eps_s/(1+eps_s).
    Any ratio below (1-eta)/(1+eta) would separate hidden values (`eps_s_limit`); a quarter leaves room on both sides of
    the threshold `tau` between hidden 0 and hidden 1. Derived here (docs/floors.md, "The spike").
    """
    return (1.0 - relative_error(eta)) / 4.0


def eps_s_limit(eta: float) -> float:
    """Return the least ratio (softmax mass off the spiked key)/(mass on it) at which a hidden bit can be undecidable.

    The spiked key is the one that the query aims at. Law: (1-eta)/(1+eta). From this ratio on, some answers within a
    factor 1±eta are the same for a hidden 0 and a hidden 1.
    """
    eta = relative_error(eta)
    return (1.0 - eta) / (1.0 + eta)


def tau(eta: float, leak: float) -> float:
    """Return the threshold between hidden 0 and hidden 1 in a (1±eta) answer: ((1+eta) leak + (1-eta)(1-leak)) / 2.

    `leak` is the softmax mass off the key that the query aims at, or an upper bound on it, such as the ratio `eps_s`.
    The answer is at most (1+eta) leak for a hidden 0, and at least (1-eta)(1-leak) for a hidden 1. Raises ValueError
    unless leak <= (1-eta)/2.
    """
    eta = relative_error(eta)
    leak = within("leak", leak, 0.0, (1.0 - eta) / 2.0)
    return 0.5 * ((1.0 + eta) * leak + (1.0 - eta) * (1.0 - leak))


def level_eps_s(bits: int) -> float:
    """Return the ratio (mass off the spiked key)/(mass on it) that the game allows for `bits`-bit values: 2^-(bits+3).

    Mass is softmax mass; the spiked key is the one that the query aims at. The mass off the key is then at most an
    eighth of the spacing of 2^bits levels in [0, 1].
    """
    return 2.0 ** -(whole("bits", bits) + 3)


def level_tolerance(bits: int) -> float:
    """Return the additive error below which rounding an answer to 2^bits levels in [0, 1] finds the hidden level.

    Law: an error below 1/(2 (2^bits - 1)) - 2^-(bits+3), half the level spacing less the leak that `level_eps_s`
    allows.
    Derived here.
    """
    bits = whole("bits", bits)
    return 1.0 / (2.0 * (2**bits - 1)) - level_eps_s(bits)
