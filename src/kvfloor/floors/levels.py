"""Count the values of a number format that answers with an error still tell apart: the levels that a floor hides.

Floors are lower bounds on a method's memory. Their proof hides values in a stream, and reads each back by a query that
puts nearly all softmax mass on one token. The finer an answer must be, the more values can be told apart, and the more
bits a hidden value has. The leak is the ratio (softmax mass off this token)/(mass on it); the hidden values of all
other tokens are at most as large as the largest level. docs/floors.md, "Levels", has the proofs.
All counts are computed in whole numbers, so that no rounding adds a level. A value of a format is counted in units: the
whole number by which it exceeds the format's least positive value.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from kvfloor.validation import one_of, relative_error, within

_ALL_FRACTIONS = 16  # formats of more fraction bits are thinned out


@dataclass(frozen=True)
class Format:
    """Hold a number format of hidden values: floating-point numbers, or the two numbers 0 and 1.

    bits      bits of a stored number
    fraction  bits of a number after its leading one
    binades   number of powers of two that have all their fractions
    unit      least positive value
    """

    bits: int
    fraction: int
    binades: int
    unit: float

    @property
    def top(self) -> int:
        """Return the largest finite value, in units."""
        return (2 ** (self.fraction + 1) - 1) << (self.binades - 1)

    @property
    def rounding(self) -> float:
        """Return a bound on |rounded x - x|_2 / R for x with |x|_2 <= R, R at least 1, of width at most 4,096.

        It is 2^-(fraction+1) for each normal number, and a 256th more for those below.
        """
        return 2.0 ** -(self.fraction + 1) * (1.0 + 2.0**-8)

    def end(self, value: int) -> int:
        """Return the first power of two above `value` at which numbers of this format, all in units, grow sparser."""
        return 1 << max(self.fraction + 1, value.bit_length())

    def at_least(self, value: int) -> int:
        """Return the least number of this format that is not below the whole number `value`, both in units."""
        shift = max(0, value.bit_length() - (self.fraction + 1))
        return -(-value >> shift) << shift


VALUES = {
    "fp16": Format(16, 10, 30, 2.0**-24),
    "bf16": Format(16, 7, 254, 2.0**-133),
    "fp32": Format(32, 23, 254, 2.0**-149),
    "binary": Format(1, 0, 1, 1.0),
}
"""Map each kind of hidden values to its numbers. "binary" hides a single bit per value, whatever the format."""


def number_format(values: str) -> Format:
    """Return the number format called `values`. Raises ValueError unless it is fp16, bf16, fp32 or binary."""
    return VALUES[one_of("values", values, tuple(VALUES))]


def _used(values: str, eta: float) -> Format:
    """Return the numbers of a format of which levels are taken: all of a 16-bit format.

    Of fp32 they are those of the fewest fraction bits, from 10 to 23, that leave 128 numbers between neighbouring
    levels of normal size. That costs a few hundredths of the levels, and counts them in a fraction of a second.
    """
    kind = number_format(values)
    if kind.fraction <= _ALL_FRACTIONS:
        return kind
    spread = 2.0 * eta / (1.0 - eta)
    fraction = next((bits for bits in range(10, kind.fraction) if 2.0**bits * spread >= 128.0), kind.fraction)
    return Format(kind.bits, fraction, kind.binades, kind.unit * 2.0 ** (kind.fraction - fraction))


def relative_levels(eta: float, values: str = "fp16", leak: float = 0.0) -> int:
    """Count the non-negative values of a format that answers within a factor 1±eta tell apart, 0 among them.

    values  number format of the hidden values: fp16, bf16, fp32, or binary (0 and 1)
    leak    ratio (softmax mass on other tokens)/(mass on the token that is read); 0 means as little as is needed
    Law: the largest number L of values 0 = x_0 < x_1 < ... of the format with (1+eta) (x_j + leak x_top) < (1-eta)
    x_{j+1}, where x_top is the format's largest value. Without a leak this is about 2 + ln(largest/least)/ln((1+eta)/
    (1-eta)), but where the format has fewer values. L is at least 1: the value 0 alone tells nothing.
    Of fp32, numbers of fewer fraction bits are counted where a finer one would hardly add a level.
    Derived here. Raises ValueError naming the argument, what was given and what is allowed.
    """
    eta, leak = relative_error(eta), within("leak", leak, 0.0, math.inf, high_open=True)
    number_format(values)
    return _count(eta, values, leak)


def level_values(eta: float, values: str = "fp16") -> list[float]:
    """List the hidden values that answers within a factor 1±eta tell apart, ascending from 0: those that are counted.

    `values` is their number format. There are `relative_levels`(eta, values) of them.
    """
    kind = _used(values, relative_error(eta))
    return [value * kind.unit for value in (0, *_listed(_relative_runs(eta, kind, 0.0)))]


@functools.lru_cache(maxsize=4096)
def levels_leak(eta: float, values: str = "fp16") -> float:
    """Return a leak at which answers within a factor 1±eta still tell all hidden values apart that are counted without.

    The leak is the ratio (softmax mass on other tokens)/(mass on the token that is read). `values` is the number format
    of the hidden values x_0 < x_1 < ... < x_top (`level_values`).
    Law: half of the least ((1-eta) x_{j+1} - (1+eta) x_j) / ((1+eta) x_top), and at most (1-eta)/4. Derived here.
    """
    kind = _used(values, relative_error(eta))
    up, down = 1 + Fraction(eta), 1 - Fraction(eta)
    room = Fraction(kind.top)
    for start, step, count in _relative_runs(eta, kind, 0.0):
        last = start + step * (count - 1)  # of equal steps, the last has the least room
        room = min(room, down * (last + step) - up * last)
    return min((1.0 - eta) / 4.0, float(room / (2 * up * kind.top)))


def additive_levels(error: float, values: str = "fp16", leak: float = 0.0) -> int:
    """Count the values in [-x, x] that answers within an additive error of `error` times x tell apart.

    values  number format of the hidden values: fp16, bf16, fp32, or binary (here the two signs ±x)
    leak    ratio (softmax mass on other tokens)/(mass on the token that is read)
    Law: values of the format, symmetric about 0, more than 2 (error (1 + leak) + leak) x apart, where x is the format's
    largest value. Without a leak these are ceil(1/error), but where the format has fewer values. The result is at least
    1: a single value tells nothing. Derived here.
    """
    error = within("error", error, 0.0, math.inf, high_open=True)
    leak = within("leak", leak, 0.0, math.inf, high_open=True)
    kind = number_format(values)
    gap = 2 * (Fraction(error) * (1 + Fraction(leak)) + Fraction(leak)) * kind.top
    even = 2 * _count_of(_additive_runs(gap / 2, gap, kind))  # without 0
    odd = 1 if values == "binary" else 1 + 2 * _count_of(_additive_runs(gap, gap, kind))
    return max(1, even, odd)


def additive_values(error: float, values: str = "fp16", leak: float = 0.0) -> list[float]:
    """List the hidden values that answers within an additive error tell apart, ascending: those that are counted.

    The arguments are those of `additive_levels`, whose result is the number of these values. They are symmetric about
    0, and the largest is x at most.
    """
    error = within("error", error, 0.0, math.inf, high_open=True)
    leak = within("leak", leak, 0.0, math.inf, high_open=True)
    kind = number_format(values)
    gap = 2 * (Fraction(error) * (1 + Fraction(leak)) + Fraction(leak)) * kind.top
    even = _listed(_additive_runs(gap / 2, gap, kind))
    odd = [] if values == "binary" else _listed(_additive_runs(gap, gap, kind))
    middle, upper = ([], even) if 2 * len(even) > 1 + 2 * len(odd) else ([0], odd)
    return [value * kind.unit for value in (*(-one for one in reversed(upper)), *middle, *upper)]


def additive_leak(error: float, values: str = "fp16") -> float:
    """Return a leak at which answers within an additive error still tell all hidden values apart that are counted then.

    The leak is the ratio (softmax mass on other tokens)/(mass on the token that is read). `error` is relative to the
    largest value, and `values` the number format of the hidden values.
    Law: the largest of 2^-4, 2^-5, ..., 2^-60 at which `additive_levels` counts as many levels as at 2^-60.
    """
    exponent, most = 60, additive_levels(error, values, 2.0**-60)
    while exponent > 4 and additive_levels(error, values, 2.0 ** -(exponent - 1)) == most:
        exponent -= 1
    return 2.0**-exponent


@functools.lru_cache(maxsize=4096)
def _count(eta: float, values: str, leak: float) -> int:
    return 1 + _count_of(_relative_runs(eta, _used(values, eta), leak))


def _relative_runs(eta: float, kind: Format, leak: float) -> Iterator[tuple[int, int, int]]:
    """Yield (start, step, count): from the level `start` on, `count` further levels at equal steps, all in units.

    Each level is the least number of the format that answers tell apart from the level before. The step that is needed
    does not fall as levels grow, so a step is repeated as long as it suffices and numbers of the format are equally
    dense.
    """
    part, whole = Fraction(eta).as_integer_ratio()
    leaked, scale = (Fraction(leak) * kind.top).as_integer_ratio()
    up, down, leaked = (whole + part) * scale, (whole - part) * scale, (whole + part) * leaked
    value, grows = 0, 2 * part * scale
    while True:
        following = kind.at_least((up * value + leaked) // down + 1)
        if following > kind.top:
            return
        step, end = following - value, min(kind.end(value), kind.top)
        count = 1
        if following < end:
            count = (end - value) // step
            if part:
                last = -((leaked - down * step) // grows) - 1  # the step suffices up to here
                count = max(1, min(count, (last - value) // step + 1))
        yield value, step, count
        value += step * count


def _additive_runs(first: Fraction, gap: Fraction, kind: Format) -> Iterator[tuple[int, int, int]]:
    """Yield (start, step, count): count levels start + step, start + 2 step, ..., all in units.

    The levels are above `first` and up to the largest value, each more than `gap` above the last one.
    """
    value = kind.at_least(math.floor(first) + 1)
    if value > kind.top:
        return
    yield 0, value, 1
    while True:
        following = kind.at_least(math.floor(value + gap) + 1)
        if following > kind.top:
            return
        end = min(kind.end(value), kind.top)
        step = following - value
        steps = max(1, (end - value) // step)
        yield value, step, steps
        value += steps * step


def _count_of(runs: Iterable[tuple[int, int, int]]) -> int:
    return sum(count for _, _, count in runs)


def _listed(runs: Iterable[tuple[int, int, int]]) -> list[int]:
    return [start + step * i for start, step, count in runs for i in range(1, count + 1)]
