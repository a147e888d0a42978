"""Compute the space floor (lower bound on any method's bits) for answers whose error is bounded in the l2 norm.

A method is a way to keep a KV cache; its state is the memory that it keeps of a stream of tokens. An error guarantee
bounds the error of an answer z: |z - A|_2 <= epsilon * size, where A is exact attention. There are three guarantees,
named by `metric`. V is the matrix of values, with one row v_i per token:
    max        size = max |v_i|_2, the length of the longest value
    frobenius  size = ||softmax||_2 ||V||_F, the length of the vector of softmax weights times the Frobenius norm of V
    operator   size = ||softmax||_2 ||V||_op, the same with the operator norm of V
There are two proofs, and the larger bound counts. In one, points of the unit ball are hidden in a stream as values: the
finer an answer, the more bits a point tells (`kvfloor.floors.ball`). In the other, random signs ±1 are hidden: a row of
dv signs per token. The receiver of the method's state reads a row as the signs of the answer to one query, which puts
nearly all softmax mass on the row's token. An answer within the guarantee can still have wrong signs, but at most a
share rho of the row. Let B be the number of rows of dv signs that differ from a given row in at most rho dv signs, and
H2 the binary entropy. If the guarantee holds with probability p, a row then gives p (dv - log2 B) - H2(p) bits.
docs/floors.md, "Other error guarantees", has the proofs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from kvfloor.floors import upper
from kvfloor.floors.ball import ball_radius, best_points, squared_ball_norm
from kvfloor.floors.coherence import gap_known
from kvfloor.floors.entropy import H2
from kvfloor.floors.floor import Floor
from kvfloor.floors.levels import number_format
from kvfloor.validation import one_of, positive, whole, within

MOST_WIDTH = 4096  # every width of rows up to dv is tried, at a cost that grows with the square
NORMS = ("max", "frobenius", "operator")
_GUARANTEES = {
    "max": "||z - A||_2 <= epsilon max |v_i|_2",
    "frobenius": "||z - A||_2 <= epsilon ||softmax||_2 ||V||_F",
    "operator": "||z - A||_2 <= epsilon ||softmax||_2 ||V||_op",
}
_POINTS = "points of the unit ball under an error guarantee in the l2 norm; derived, docs/floors.md"
_THEOREMS = {
    "max": "sign rows under an error relative to the largest value (derived, docs/floors.md)",
    "frobenius": "sign rows under BalanceKV's guarantee (Kochetkova et al. 2025, eq. 2); derived, docs/floors.md",
    "operator": "sign rows under SubGen's guarantee (Zandieh et al. 2024); derived, docs/floors.md",
}


def wrong_share(metric: str, epsilon: float, m: int, dv: int, leak: float = 0.0, norm: float | None = None) -> float:
    """Return an upper bound on the share rho of a row's dv signs that an answer within the guarantee gets wrong.

    A row is the dv values ±1 of one of `m` tokens. It is read by a query that puts nearly all softmax mass on this
    token; the signs of the answer are taken for those of the row.
    metric   the guarantee: |answer - attention|_2 is at most epsilon times max |v_i|_2 (max), ||softmax||_2 ||V||_F
             (frobenius) or ||softmax||_2 ||V||_op (operator)
    leak     the ratio x = (softmax mass on all other tokens)/(mass on the token)
    norm     operator norm of the m x dv matrix of all rows; None: `sign_norm`(m, dv)
    Law:
        max        rho = epsilon^2 ((1+x)/(1-x))^2
        frobenius  rho = epsilon^2 m (1+x^2)/(1-x)^2
        operator   rho = epsilon^2 (norm^2/dv) (1+x^2)/(1-x)^2
    The result may be above 1, and is infinite for leak >= 1.
    Derived here. Each entry of the exact attention output has an absolute value of at least (1-x)/(1+x). An answer
    with the wrong sign there is off by at least as much. So |answer - attention|_2^2 >= rho dv ((1-x)/(1+x))^2. The law
    follows with ||softmax||_2^2 <= (1+x^2)/(1+x)^2.
    """
    one_of("metric", metric, NORMS)
    epsilon = within("epsilon", epsilon, 0.0, math.inf, high_open=True)
    norm = None if norm is None else positive("norm", norm)
    return _share(metric, epsilon, whole("m", m), whole("dv", dv), within("leak", leak, 0.0, math.inf), norm)


def sign_norm(m: int, dv: int) -> float:
    """Return an operator norm that at least half of all m x dv sign matrices do not exceed; about sqrt(m) + sqrt(dv).

    A sign matrix has entries ±1.
    Law, with s = sqrt(m) + sqrt(dv): norm^2 is the smaller of m dv and the least value, over k = 1, 2, ..., of
    (2 min(m, dv))^(1/k) s^2 e^(2k/s^2). Two k are tried: the whole numbers next to s sqrt(ln(2 min(m, dv))/2), the best
    real k.
    Derived here: docs/floors.md, "Other error guarantees", compares the moments of sign matrices with those of Gaussian
    matrices.
    """
    return math.sqrt(_squared_norm(whole("m", m), whole("dv", dv)))


def ball_bits(dv: int, wrong: int) -> float:
    """Return log2 of the number of strings of `dv` bits that differ from a given string in at most `wrong` bits.

    The result is at most dv H2(wrong/dv) for wrong <= dv/2, where H2 is the binary entropy.
    """
    dv, wrong = whole("dv", dv), whole("wrong", wrong, least=0)
    return math.log2(sum(math.comb(dv, j) for j in range(min(wrong, dv) + 1)))


def noisy_row_bits(m: int, dv: int, p: float, wrong: int) -> float:
    """Return a lower bound on the bits of a message from which `m` rows of `dv` bits are decoded with few errors.

    p is the probability that a row is decoded with at most `wrong` wrong bits.
    Law: m [p (dv - ball_bits(dv, wrong)) - H2(p)], and at least 0, where H2 is the binary entropy. `ball_bits` is log2
    of the number of rows that differ from a given one in at most `wrong` bits. For rho = wrong/dv <= 1/2 the result is
    at least m [p dv (1 - H2(rho)) - H2(p)]. For wrong = 0 it is m (p dv - H2(p)), the bound for rows decoded without
    any error. Derived here: Fano's inequality with a list.
    """
    m, p = whole("m", m, least=0), within("p", p, 0.0, 1.0, low_open=True)
    return max(0.0, m * (p * (dv - ball_bits(dv, wrong)) - H2(p)))


def metric_space(
    n: int,
    d: int,
    dv: int | None = None,
    *,
    metric: str,
    epsilon: float,
    p: float = 0.9,
    radius: float | None = None,
    window: int | None = None,
    norm: float | None = None,
    heads: int = 1,
    layers: int = 1,
    values: str = "fp16",
) -> Floor:
    """Return a lower bound on the bits that any streaming method must hold to meet an error guarantee at each step.

    n, d, dv  tokens of the stream, width of a key, width of a value (d unless given; at most 4,096)
    metric    max, frobenius or operator: the size that the l2 error of an answer is compared with (see the module)
    epsilon   the error is at most epsilon times that size
    p         probability that the guarantee holds, at each step
    radius    largest logit; None: no bound on logits
    window    number of tokens of a sliding window, or None
    norm      for the metric operator only: an operator norm, found by measurement, that at least half of all n x dv
              sign matrices do not exceed; None: a proven one (`sign_norm`)
    heads, layers   number of kv heads and of layers, which multiply the bound
    values    number format of the values: fp16, bf16 or fp32. binary: signs ±1 alone are hidden, a bound that holds for
              every format
    Law: S >= heads layers (B - b), and at least 0, where S is the number of bits and B the larger of two maxima:
        over m and w, `noisy_row_bits`(m, w, p, floor(rho w))
        over m, `row_bits`(m, dv, p, log2(1/r)), unless `values` is binary
    r is the radius to which an answer tells a point of the unit ball (`ball_radius`). rho is the share of a row's signs
    that an answer within the guarantee can get wrong (`wrong_share`). `noisy_row_bits` is a lower bound on the bits
    from which m rows of w signs are decoded with floor(rho w) wrong signs each. b is 1 bit for the operator norm, where
    the likelier half of all matrices is used, else 0. The stream of the proof has m tokens, with signs in w <= dv
    coordinates or points of dv; m <= n, or m <= window - 1.
    Both depend on the leak of a query: the softmax mass on all other tokens, divided by that on the token that it
    reads. Let g be a gap that some m unit keys in d dimensions have (`gap_known`), i.e. 1 less the largest inner
    product of two keys. Then the leak is at most m e^(-radius g); without `radius` it is arbitrarily small.
    Returns a `Floor`: the bound, the numbers that it was computed from, and memory sizes that suffice. Raises
    ValueError naming the argument, what was given and what is allowed.
    """
    n, d = whole("n", n), whole("d", d)
    dv = d if dv is None else whole("dv", dv)
    if dv > MOST_WIDTH:
        raise ValueError(f"dv must be at most {MOST_WIDTH} for the metrics {', '.join(NORMS)}, got {dv}")
    one_of("metric", metric, NORMS)
    epsilon = within("epsilon", epsilon, 0.0, math.inf, high_open=True)
    p = within("p", p, 0.0, 1.0, low_open=True)
    radius = None if radius is None else positive("radius", radius)
    copies = whole("heads", heads) * whole("layers", layers)
    held = n if window is None else min(n, whole("window", window))
    most = n if window is None else min(n, window - 1)
    norm, rounding = _norm(norm, metric, most, dv), number_format(values).rounding

    @functools.cache
    def leak(m: int) -> float:
        return _leak(m, d, radius)

    def wrong(m: int, width: int) -> int:
        share = _share(metric, epsilon, m, width, leak(m), norm)
        return width if share >= 1.0 else math.floor(share * width * (1.0 + 1e-12) + 1e-12)

    def radius_of(m: int) -> float:
        size = 1.0 if metric == "max" else math.sqrt(m)
        if metric == "operator":
            size = math.sqrt(squared_ball_norm(m, dv)) + size * rounding  # of the points, and of their rounding
        return ball_radius(epsilon, size, leak(m), rounding, of_all=metric != "max")

    m, width, errors, told = best_rows(most, dv, p, wrong)
    points, r, by_points = (0, 1.0, 0.0) if values == "binary" else best_points(most, dv, p, radius_of)
    signs = told >= by_points
    m, told = (m, told) if signs else (points, by_points)
    bits = copies * max(0.0, told - (1.0 if metric == "operator" else 0.0))
    regime = f"{metric} norm, sliding window" if most < n else f"{metric} norm"
    constants: dict[str, Any] = {
        "n": n, "d": d, "dv": dv, "metric": metric, "guarantee": _GUARANTEES[metric], "epsilon": epsilon, "p": p,
        "H2_p": H2(p), "heads": heads, "layers": layers, "values": values,
        "hidden": "signs" if signs else "points of the unit ball", "rows": m, "bits_per_row": told / m if m else 0.0,
        "exact_bytes_fp16": copies * upper.exact_bytes(held, d, dv, "fp16"),
        "exact_bytes_fp32": copies * upper.exact_bytes(held, d, dv, "fp32"),
    }  # fmt: skip
    if m:
        constants |= {"gap": gap_known(m, d), "leak_ratio": leak(m)}
        if signs:
            constants |= {"row_width": width, "wrong_per_row": errors}
            constants["rho"] = wrong_share(metric, epsilon, m, width, leak(m), norm)
        else:
            constants["ball_radius"] = r
    if radius is not None:
        constants["radius"] = radius
    if window is not None:
        constants["window"] = window
    if metric == "operator" and m:
        proven = sign_norm(m, width) if signs else math.sqrt(squared_ball_norm(m, dv))
        constants["operator_norm"] = norm if signs and norm is not None else proven
    stored = 1.0 if signs else float(number_format(values).bits)
    possible = upper.beside(copies, n, held, d, dv, windowed=window is not None, values=values, told=stored)
    if radius is not None and window is None:
        possible += upper.within_radius(copies, n, d, dv, radius, epsilon)
        possible += upper.sampled(copies, n, d, dv, metric, epsilon, radius, 1.0 - p)
    theorem = _THEOREMS[metric] if signs else _POINTS
    return Floor.of(bits, float(copies * held * dv * stored), regime, theorem, constants, possible)


def best_rows(most: int, dv: int, p: float, wrong: Callable[[int, int], int]) -> tuple[int, int, int, float]:
    """Find the number m <= `most` of rows and their width <= `dv` for which the bound `noisy_row_bits` is largest.

    `noisy_row_bits` is a lower bound on the bits of a message from which m rows of bits are decoded with few errors.
    p      probability that a row is decoded with at most `wrong`(m, width) wrong bits
    wrong  called with (m, width); returns the wrong bits that are allowed in a row. It must not decrease as m grows
    Returns (m, width, errors, bits): the choice, the wrong bits allowed in one of its rows, and the bound. Returns (0,
    0, 0, 0.0) where no choice gives positive bits.
    For each width and number of errors, the largest m that `wrong` allows is found by bisection, so the maximum is
    exact.
    """
    best = (0, 0, 0, 0.0)
    for width in range(dv, 0, -1):
        ball, term = 0, 1  # strings within `errors` of one, strings at one error more
        for errors in range(width + 1):
            ball += term
            term = term * (width - errors) // (errors + 1)
            gain = p * (width - math.log2(ball)) - H2(p)
            if most * gain <= best[3]:
                break  # gain only falls
            low, high = math.floor(best[3] / gain) + 1, most
            if low > most or wrong(low, width) > errors:
                continue
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if wrong(middle, width) <= errors else (low, middle - 1)
            if low * gain > best[3]:
                best = (low, width, errors, low * gain)
    return best


def _share(metric: str, epsilon: float, m: int, dv: int, leak: float, norm: float | None) -> float:
    if leak >= 1.0:
        return math.inf
    if metric == "max":
        return epsilon * epsilon * ((1.0 + leak) / (1.0 - leak)) ** 2
    size = m if metric == "frobenius" else (_squared_norm(m, dv) if norm is None else norm**2) / dv
    return epsilon * epsilon * size * (1.0 + leak**2) / (1.0 - leak) ** 2


def _squared_norm(m: int, dv: int) -> float:
    s, log_factor = math.sqrt(m) + math.sqrt(dv), math.log(2 * min(m, dv))
    best = s * math.sqrt(log_factor / 2.0)
    low, high = max(1, math.floor(best)), math.ceil(best)
    exponent = min(log_factor / low + 2.0 * low / s**2, log_factor / high + 2.0 * high / s**2)
    return min(float(m * dv), s**2 * math.exp(exponent))


def _leak(m: int, d: int, radius: float | None) -> float:
    """Return an upper bound on the leak of a query for one of m unit keys of width d, at logits up to `radius`.

    The leak is (softmax mass off the queried key)/(mass on it). It includes the mass of one more token, which the
    receiver of the state appends before the query. Without `radius` the result is 0, or infinite where no query can
    single out a key.
    """
    if radius is None:
        return 0.0 if d > 1 or m <= 2 else math.inf  # there are only two unit keys in one dimension
    return math.exp(min(700.0, math.log(m) - radius * gap_known(m, d)))


def _norm(norm: float | None, metric: str, rows: int, dv: int) -> float | None:
    if norm is None:
        return None
    if metric != "operator":
        raise ValueError(f"norm belongs to metric='operator', got norm={norm!r} with metric={metric!r}")
    least = math.sqrt(max(rows, dv))
    if not positive("norm", norm) >= least * (1.0 - 1e-12):
        raise ValueError(f"norm must be at least {least:g}, as that of any {rows} x {dv} sign matrix is, got {norm!r}")
    return float(norm)
