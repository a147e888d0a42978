"""Check the values of arguments: every error names the argument, the value given and the values allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

MOST_WHOLE = 2**63 - 1
"""Bound the counts that a user may give, so that formulas of theorems that multiply a few counts are finite floats."""


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Return `value` as an int, checked to be a whole number from `least` to `most` (None: no upper limit).

    Raises ValueError, naming the argument `name`, for any other value. A bool is not taken for a number.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got a number of {number.bit_length()} bits")
    return number


def within(
    name: str, value: float, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> float:
    """Return `value` as a float. Raises ValueError, naming the argument `name`, unless it lies from `low` to `high`.

    low_open, high_open: True if `low` itself, or `high` itself, is not allowed.
    """
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


def positive(name: str, value: Any) -> float:
    """Return `value` as a float. Raises ValueError, naming the argument `name`, unless it is finite and above 0."""
    try:
        number = None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:
        number = math.inf
    if number is None or not 0.0 < number < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return number


def relative_error(eta: float) -> float:
    """Return `eta`, the relative error allowed in an attention output, as a float; 0 allows none.

    Raises ValueError unless it lies in [0, 1).
    """
    return within("eta", eta, 0.0, 1.0, high_open=True)


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """Return `value` unchanged. Raises ValueError, naming the argument `name`, unless it is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def count(owner: str, least: int = 0, **values: Any) -> None:
    """Raise ValueError if any of `values`, arguments by name, is not a whole number >= `least`.

    owner: the method or command that has the arguments, named in the error.
    """
    for name, value in values.items():
        whole(f"{owner}: {name}", value, least)


def positives(owner: str, **values: Any) -> None:
    """Raise ValueError if any of `values`, arguments by name, is not a positive finite number.

    owner: the method or command that has the arguments, named in the error.
    """
    for name, value in values.items():
        positive(f"{owner}: {name}", value)


def literals(config: Any) -> None:
    """Raise ValueError if a field of the dataclass `config` is annotated as a Literal and has a value outside it."""
    for name, allowed in _choices(type(config)).items():
        if getattr(config, name) not in allowed:
            words = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
            raise ValueError(f"{config.name}: {name} must be {words}, got {getattr(config, name)!r}")


@cache
def _choices(kind: type) -> dict[str, tuple[str, ...]]:
    """Return {field: allowed words} for the fields of the dataclass `kind` that are annotated as a Literal."""
    hints = {name: hint for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}
    return {name: get_args(hint) for name, hint in hints.items()}
