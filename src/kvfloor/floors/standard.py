"""Compute the space floor (lower bound on any method's bits) of standard attention and of its sliding window.

In the proof, each key of a stream carries a row of dv hidden values (the "hard instance"). Alice sends a method's
state, the memory that it keeps of the stream. Bob, the receiver, appends a token, and reads each row by a query that
puts nearly all softmax mass on the row's key. d and dv are the widths of a key and a value. A hidden value is one of
so many numbers (levels) as answers with the allowed error tell apart (`kvfloor.floors.levels`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvfloor.floors import upper
from kvfloor.floors.coherence import gap_known
from kvfloor.floors.entropy import H2, row_bits
from kvfloor.floors.floor import Floor
from kvfloor.floors.levels import additive_leak, additive_levels, levels_leak, number_format, relative_levels
from kvfloor.floors.norm_bounded import separable_keys
from kvfloor.floors.separation import tau
from kvfloor.floors.spike import spike_C
from kvfloor.validation import positive, relative_error, whole, within

_WHOLE_ROW = "whole rows by Fano's inequality (derived, docs/floors.md)"
_THEOREMS = {
    "near-orthogonal": f"Haris & Onak (COLT 2025), Theorem 8 with Remark 7; {_WHOLE_ROW}",
    "low-dimensional, unbounded norm": f"Haris & Onak (COLT 2025), Theorem 1, with keys on a circle; {_WHOLE_ROW}",
    "line": f"the two keys ±1; {_WHOLE_ROW}",
    "norm-bounded": f"Haris & Onak (COLT 2025), Theorem 1, with N(d, r, eta) separable keys; {_WHOLE_ROW}",
    "sliding window": f"Haris & Onak (COLT 2025), Theorem 17 for W - 1 rows (append, then attend); {_WHOLE_ROW}",
}


_LEVELS = "values of as many levels as answers tell apart (derived, docs/floors.md)"
_RATIOS = (*range(17), *range(20, 289, 4))  # halvings of the largest leak at which keys under a radius are counted


def space(
    n: int,
    d: int,
    dv: int | None = None,
    *,
    eta: float = 0.5,
    p: float = 0.9,
    radius: float | None = None,
    window: int | None = None,
    heads: int = 1,
    layers: int = 1,
    values: str = "fp16",
) -> Floor:
    """Return a lower bound on the bits that any streaming method must hold to answer attention within a factor 1±eta.

    n, d, dv  tokens of the stream, width of a key, width of a value (d unless given)
    p         probability that a whole row, the dv values of one answer, is within the factor 1±eta
    radius    largest scale * |q| * |k|, in nats; None: no bound
    window    number W of tokens of a sliding window, or None
    heads, layers   number of kv heads and of layers, which multiply the bound
    values    number format of the values: fp16, bf16 or fp32. Of the formats of 16 bits, fp16 gives the smaller bound.
              binary: all values are 0 or 1, a bound that holds for every format and every eta below 1
    Law: S >= heads layers `row_bits`(m, dv, p, log2 L): for wide rows, m (p dv log2 L - H2(p)) times heads layers. S is
    the number of bits, H2 the binary entropy, L = `relative_levels`(eta, values) the number of non-negative values that
    answers tell apart, and m the number of tokens with hidden values that queries can read. m is the least of
        n
        W - 1                   if `window` is given: the token that Bob appends takes one place
        2                       for d = 1 without `radius`
        `separable_keys`(d, radius, x)  if `radius` is given: the number of keys that queries within the radius can tell
                                apart at a leak of at most x. Then L is the number of levels at a leak of 2x, and of
                                many x from (1-eta)/4 downwards that with the largest bound is taken
    The bound holds after n tokens, for worst-case keys and values, not for those of one model. Returns a `Floor`: the
    bound, the numbers that it was computed from, and memory sizes that suffice. Raises ValueError naming the argument,
    what was given and what is allowed.
    """
    eta = relative_error(eta)
    number_format(values)
    question = _Question(
        told=lambda leak: relative_levels(eta, values, leak), leak=lambda: levels_leak(eta, values),
        most_leak=(1.0 - eta) / 4.0, error=eta, values=values,
    )  # fmt: skip
    floor = _space(question, n, d, dv, p, radius, window, heads, layers, {"eta": eta})
    if values == "binary" and "eps_s" in floor.constants:
        floor.constants["tau"] = tau(eta, floor.constants["eps_s"])
    return floor


def additive_space(
    n: int,
    d: int,
    dv: int | None = None,
    *,
    epsilon: float,
    p: float = 0.9,
    radius: float | None = None,
    window: int | None = None,
    heads: int = 1,
    layers: int = 1,
    values: str = "fp16",
) -> Floor:
    """Return a lower bound on the bits that any method must hold to answer attention within an additive error.

    epsilon   each number of an answer errs by at most epsilon times the largest size of a number of all values
    The other arguments, the result and the errors raised are those of `space`. The law is the same too, but L is the
    number of levels of both signs that answers tell apart, `additive_levels`(epsilon, values), about 1/epsilon; with
    values="binary" they are the two signs. Leaks x are tried from 1/16 downwards. The bound is 0 where only one level
    is left, from epsilon = 1 on.
    """
    epsilon = within("epsilon", epsilon, 0.0, math.inf, high_open=True)
    number_format(values)
    question = _Question(
        told=lambda leak: additive_levels(epsilon, values, leak), leak=lambda: additive_leak(epsilon, values),
        most_leak=1.0 / 16.0, error=epsilon, values=values,
    )  # fmt: skip
    told = {"metric": "additive", "guarantee": "|z_j - A_j| <= epsilon max |v_ij|", "epsilon": epsilon}
    return _space(question, n, d, dv, p, radius, window, heads, layers, told)


@dataclass(frozen=True)
class _Question:
    """Hold what a floor asks for: the levels that answers tell apart, as a function of the leak of a query.

    told       leak -> number of levels that answers tell apart
    leak       () -> a leak at which as many levels are told apart as at a leak of 0
    most_leak  largest leak to consider
    error      allowed error of an answer
    values     number format of the hidden values
    """

    told: Callable[[float], int]
    leak: Callable[[], float]
    most_leak: float
    error: float
    values: str


def _space(
    question: _Question,
    n: int,
    d: int,
    dv: int | None,
    p: float,
    radius: float | None,
    window: int | None,
    heads: int,
    layers: int,
    asked: dict[str, Any],
) -> Floor:
    n, d = whole("n", n), whole("d", d)
    dv = d if dv is None else whole("dv", dv)
    p = within("p", p, 0.0, 1.0, low_open=True)
    copies = whole("heads", heads) * whole("layers", layers)
    held = n if window is None else min(n, whole("window", window))

    limits: dict[str, float] = {"n": n}
    if window is not None:
        limits["W - 1"] = window - 1
    if radius is not None:
        most = int(min(limits.values()))
        separable, levels, ratio = _within_radius(question, most, d, dv, p, positive("radius", radius))
        limits["N(d, r, eta)"] = separable
    else:
        levels, ratio = question.told(0.0), 0.0
        if d == 1:
            limits["d = 1"] = 2
    rows_bound_by = min(limits, key=lambda name: limits[name])
    rows = int(limits[rows_bound_by])

    told = math.log2(levels)
    bits = copies * row_bits(rows, dv, p, told)
    regime = _regime(n, d, bounded=radius is not None, windowed=rows_bound_by == "W - 1")
    constants: dict[str, Any] = {
        "n": n, "d": d, "dv": dv, **asked, "p": p, "H2_p": H2(p), "heads": heads, "layers": layers,
        "values": question.values, "levels": levels, "bits_per_value": told,
        "bits_per_row": row_bits(1, dv, p, told), "rows": rows, "rows_bound_by": rows_bound_by,
        "exact_bytes_fp16": copies * upper.exact_bytes(held, d, dv, "fp16"),
        "exact_bytes_fp32": copies * upper.exact_bytes(held, d, dv, "fp32"),
    }  # fmt: skip
    if window is not None:
        constants["window"] = window
    if radius is not None:
        constants |= {"radius": float(radius), "N": limits["N(d, r, eta)"]}
    if rows and levels > 1:
        ratio = ratio or question.leak()
        constants |= _spike(n, d, rows, ratio, copied=radius is not None and rows < held)
    possible = upper.beside(copies, n, held, d, dv, windowed=window is not None, values=question.values, told=told)
    if radius is not None and window is None:
        possible += upper.within_radius(copies, held, d, dv, float(radius), question.error)
    theorem = _THEOREMS[regime] if levels == 2 else f"{_THEOREMS[regime]}; {_LEVELS}"
    return Floor.of(bits, float(copies * held * dv * told), regime, theorem, constants, possible)


def _within_radius(
    question: _Question, most: int, d: int, dv: int, p: float, radius: float
) -> tuple[float, int, float]:
    """Return (keys, levels, leak): the choice under a bound on logits with the largest floor for at most `most` tokens.

    The smaller the leak of queries, the more levels answers tell apart, but the fewer keys queries tell apart. Levels
    are counted at twice the leak of single keys, because tokens repeat keys, some of them once more than others.
    """
    best, found = -1.0, (0.0, 1, 0.0)
    finest = math.log2(question.told(0.0))
    for halvings in _RATIOS:
        ratio = question.most_leak * 2.0**-halvings
        keys = separable_keys(d, radius, ratio)
        rows = int(min(float(most), keys))
        if best >= 0.0 and row_bits(rows, dv, p, finest) <= best:
            continue
        levels = question.told(2.0 * ratio)
        bits = row_bits(rows, dv, p, math.log2(levels))
        if bits > best:
            best, found = bits, (keys, levels, ratio)
    return found


def _regime(n: int, d: int, *, bounded: bool, windowed: bool) -> str:
    if windowed:
        return "sliding window"
    if bounded:
        return "norm-bounded"
    if d == 1:
        return "line"
    return "near-orthogonal" if d > 4.0 * math.log(n) else "low-dimensional, unbounded norm"


def _spike(n: int, d: int, rows: int, ratio: float, *, copied: bool) -> dict[str, float]:
    """Return numbers about the queries of the proof's hard instance with `rows` distinct keys: a dict, name -> number.

    eps_s  ratio (softmax mass off the queried key)/(mass on it)
    gap    smallest one-sided gap of the keys (squared norm less the largest inner product with another key)
    C      length of a query that reads the hidden values of one key; the softmax includes the token that Bob appends
    `ratio` is eps_s for equally frequent keys. `copied` is True if the `n` tokens repeat each key about n/rows times,
    as they do under a bound on norms. Where n/rows is not whole, some keys occur once more than others, and eps_s is
    ceil(n/rows)/floor(n/rows) times the ratio.
    """
    gap = gap_known(rows, d)
    length = spike_C(rows, 1, gap, 1.0, ratio)
    if copied:
        ratio *= math.ceil(n / rows) / (n // rows)
    return {"eps_s": ratio, "gap": gap, "C": length}
