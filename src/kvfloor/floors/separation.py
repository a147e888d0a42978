"""Bound the softmax leak under which a (1±eta)-accurate or additively accurate answer still separates hidden values."""

from kvfloor.validation import relative_error, whole, within


def eps_s(eta: float) -> float:
    """Return the odds of softmax mass off the spiked key that the game allows: (1-eta)/4.

    `eps_s` is a ratio, (mass elsewhere)/(mass on the spike), so the leak itself is eps_s/(1+eps_s) < eps_s.
    Any ratio below (1-eta)/(1+eta) would separate (`eps_s_limit`); a quarter leaves room on both sides of `tau`.
    Derived here (docs/floors.md, "The spike").
    """
    return (1.0 - relative_error(eta)) / 4.0


def eps_s_limit(eta: float) -> float:
    """Return the limit (1-eta)/(1+eta): from these odds on, some (1±eta) answers for hidden 0 and hidden 1 coincide."""
    eta = relative_error(eta)
    return (1.0 - eta) / (1.0 + eta)


def tau(eta: float, leak: float) -> float:
    """Return the threshold between hidden 0 and hidden 1 in a (1±eta) answer: ((1+eta) leak + (1-eta)(1-leak)) / 2.

    The answer is at most (1+eta) leak for a hidden 0, and at least (1-eta)(1-leak) for a hidden 1. Raises ValueError
    unless leak <= (1-eta)/2 (a leak that is itself bounded by a ratio stays strictly below its ratio).
    """
    eta = relative_error(eta)
    leak = within("leak", leak, 0.0, (1.0 - eta) / 2.0)
    return 0.5 * ((1.0 + eta) * leak + (1.0 - eta) * (1.0 - leak))


def level_eps_s(bits: int) -> float:
    """Return the odds the game allows for `bits`-bit values, 2^-(bits+3): the leak is at most an eighth of a level."""
    return 2.0 ** -(whole("bits", bits) + 3)


def level_tolerance(bits: int) -> float:
    """Return the additive error below which the nearest of 2^bits levels in [0, 1] is the hidden level.

    Law: a < 1/(2 (2^bits - 1)) - 2^-(bits+3), half the level spacing less the leak. Derived here.
    """
    bits = whole("bits", bits)
    return 1.0 / (2.0 * (2**bits - 1)) - level_eps_s(bits)
