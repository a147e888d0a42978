"""Compute the space floor (lower bound on any method's bits) of standard attention and of its sliding window.

In the proof, each key of a stream carries a row of dv hidden values (the "hard instance"). Alice sends a method's
state, the memory that it keeps of the stream. Bob, the receiver, appends a token, and reads each row by a query that
puts nearly all softmax mass on the row's key. d and dv are the widths of a key and a value.
"""

import math
from typing import Any

from kvfloor.floors import upper
from kvfloor.floors.coherence import gap_known
from kvfloor.floors.entropy import H2, row_bits
from kvfloor.floors.floor import Floor
from kvfloor.floors.norm_bounded import N_dr
from kvfloor.floors.separation import eps_s, tau
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
) -> Floor:
    """Return a lower bound on the bits that any streaming method must hold to answer attention within a factor 1±eta.

    n, d, dv  tokens of the stream, width of a key, width of a value (d unless given)
    p         probability that a whole row, the dv values of one answer, is within the factor 1±eta
    radius    largest scale * |q| * |k|, in nats; None: no bound
    window    number W of tokens of a sliding window, or None
    heads, layers   number of kv heads and of layers, which multiply the bound
    Law: S >= heads layers `row_bits`(m, dv, p): for wide rows, m (p dv - H2(p)) times heads layers. S is the number of
    bits, H2 the binary entropy, and m the
    number of tokens with hidden values that queries can read. m is the least of
        n
        `N_dr`(d, radius, eta)  if `radius` is given: the number of keys that queries within the radius can tell apart
        W - 1                   if `window` is given: the token that Bob appends takes one place
        2                       for d = 1 without `radius`
    The bound holds after n tokens, for worst-case keys and values, not for those of one model. Returns a `Floor`: the
    bound, the numbers that it was computed from, and memory sizes that suffice. Raises ValueError naming the argument,
    what was given and what is allowed.
    """
    n, d = whole("n", n), whole("d", d)
    dv = d if dv is None else whole("dv", dv)
    eta = relative_error(eta)
    p = within("p", p, 0.0, 1.0, low_open=True)
    copies = whole("heads", heads) * whole("layers", layers)
    held = n if window is None else min(n, whole("window", window))

    limits: dict[str, float] = {"n": n}
    if window is not None:
        limits["W - 1"] = window - 1
    if radius is not None:
        limits["N(d, r, eta)"] = N_dr(d, positive("radius", radius), eta)
    elif d == 1:
        limits["d = 1"] = 2
    rows_bound_by = min(limits, key=lambda name: limits[name])
    rows = int(limits[rows_bound_by])

    bits = copies * row_bits(rows, dv, p)
    regime = _regime(n, d, bounded=radius is not None, windowed=rows_bound_by == "W - 1")
    constants: dict[str, Any] = {
        "n": n, "d": d, "dv": dv, "eta": eta, "p": p, "H2_p": H2(p), "heads": heads, "layers": layers,
        "bits_per_row": row_bits(1, dv, p), "rows": rows, "rows_bound_by": rows_bound_by,
        "exact_bytes_fp16": copies * upper.exact_bytes(held, d, dv, "fp16"),
        "exact_bytes_fp32": copies * upper.exact_bytes(held, d, dv, "fp32"),
    }  # fmt: skip
    if window is not None:
        constants["window"] = window
    if radius is not None:
        constants |= {"radius": float(radius), "N": limits["N(d, r, eta)"]}
    if rows:
        constants |= _spike(n, d, rows, eta, copied=radius is not None and rows < held)
    possible = upper.beside(copies, n, held, d, dv, windowed=window is not None)
    if radius is not None and window is None:
        possible += upper.within_radius(copies, held, d, dv, float(radius), eta)
    return Floor.of(bits, float(copies * held * dv), regime, _THEOREMS[regime], constants, possible)


def _regime(n: int, d: int, *, bounded: bool, windowed: bool) -> str:
    if windowed:
        return "sliding window"
    if bounded:
        return "norm-bounded"
    if d == 1:
        return "line"
    return "near-orthogonal" if d > 4.0 * math.log(n) else "low-dimensional, unbounded norm"


def _spike(n: int, d: int, rows: int, eta: float, *, copied: bool) -> dict[str, float]:
    """Return numbers about the queries of the proof's hard instance with `rows` distinct keys: a dict, name -> number.

    The answers may have a relative error of eta.
    eps_s  ratio (softmax mass off the queried key)/(mass on it)
    tau    threshold in an answer between hidden 0 and 1
    gap    smallest one-sided gap of the keys (squared norm less the largest inner product with another key)
    C      length of a query that reads the hidden values of one key; the softmax includes the token that Bob appends
    `copied` is True if the `n` tokens repeat each key about n/rows times, as they do under a bound on norms. Where
    n/rows is not whole, some keys occur once more than others, and eps_s is ceil(n/rows)/floor(n/rows) times the ratio
    for equally frequent keys.
    """
    ratio = eps_s(eta)
    gap = gap_known(rows, d)
    length = spike_C(rows, 1, gap, 1.0, ratio)
    if copied:
        ratio *= math.ceil(n / rows) / (n // rows)
    return {"eps_s": ratio, "tau": tau(eta, ratio), "gap": gap, "C": length}
