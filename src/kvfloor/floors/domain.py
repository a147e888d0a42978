"""Argument checks shared by the floors: every refusal names the argument, what was given and what is allowed."""

import math
import operator
from collections.abc import Sequence

MOST_WHOLE = 2**63 - 1
"""The largest count that a user may give: what theorems make of a few of them are finite floats."""


def whole(name: str, value: int, least: int = 1, most: int | None = None) -> int:
    """`value` as an int from `least` to `most`, None: without end; raises ValueError otherwise."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got a number of {number.bit_length()} bits")
    return number


def within(
    name: str, value: float, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> float:
    """`value` as a float in the interval from `low` to `high`; raises ValueError otherwise."""
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    refusal = f"{name} must lie in {interval}, got {value!r}"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(refusal) from None
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    if not (above and below):
        raise ValueError(refusal)
    return number


def positive(name: str, value: float) -> float:
    """`value` as a finite float above 0; raises ValueError otherwise."""
    return within(name, value, 0.0, math.inf, low_open=True, high_open=True)


def relative_error(eta: float) -> float:
    """`eta` as a relative error in [0, 1); 0 is exact attention."""
    return within("eta", eta, 0.0, 1.0, high_open=True)


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, which must be one of `allowed`; raises ValueError otherwise."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value
