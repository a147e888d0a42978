"""List methods whose memory is known to suffice for attention, to compare with a floor (a lower bound on memory).

A method is a way to keep a KV cache; its state is the memory that it keeps. Each function that returns `Possible`
objects describes one or more methods by name, bits and conditions. A number is one stored float. Keys are "public" if
they are fixed in advance, so that a state need not hold them. d and dv are the widths of a key and a value. `copies` is
the number of kv heads times layers.
"""

import math

from kvfloor.floors.floor import Possible
from kvfloor.floors.levels import number_format
from kvfloor.floors.sampling import lazy_gumbel_tokens, subgen_numbers, subgen_plan
from kvfloor.floors.taylor import LARGEST_RADIUS, taylor_degree, taylor_numbers
from kvfloor.validation import one_of, whole

FORMATS = {"fp32": 32, "fp16": 16, "bf16": 16}  # bits of a number
_SIGNIFICANT = {"fp32": "24 significant bits", "fp16": "11 significant bits", "bf16": "8 significant bits"}
_SUMS_AT = 32  # bits of a number that a sampling method keeps
_MOMENTS_AT = 64  # bits of a moment: terms of opposite sign cancel, so that float32 is too short
_LARGEST_LOG = 600.0  # exp of it, times any sizes, is still a float
_DERIVED = "derived, docs/floors.md"


def exact_bytes(tokens: int, d: int, dv: int, dtype: str = "fp16") -> int:
    """Return the bytes of the keys and values of `tokens` tokens: tokens (d + dv) numbers of fp32, fp16 or bf16."""
    size = FORMATS[one_of("dtype", dtype, tuple(FORMATS))]
    return whole("tokens", tokens, least=0) * (whole("d", d) + whole("dv", dv)) * size // 8


def running_sum_numbers(W: int, d: int, dv: int) -> int:
    """Count the numbers that exact attention over a window of `W` tokens holds if older tokens keep logit 0.

    Older tokens then leave the window but not the softmax: each adds its value with weight exp(0) = 1.
    Law: W (d + dv) for the window, dv for the sum of the values of older tokens, 1 for the count of older tokens. The
    answer is (sum + the window's sum of exp(logit) times value) / (count + the window's sum of exp(logit)). Derived
    here.
    """
    W, d, dv = whole("W", W), whole("d", d), whole("dv", dv)
    return W * (d + dv) + dv + 1


def caches(copies: int, numbers: int, name: str = "exact", proviso: str = "", values: str = "fp16") -> list[Possible]:
    """List the memory sizes of exact attention in fp32, fp16 and bf16, at `numbers` stored numbers per head and layer.

    `copies` is the number of kv heads times layers. The name of each entry begins with `name`, and its condition ends
    with `proviso`. `values` is the number format of the values; formats of fewer bits are left out.
    """
    return [
        Possible(
            f"{name}, {dtype}",
            float(copies * numbers * bits),
            f"inputs of {_SIGNIFICANT[dtype]}{proviso}",
            "by definition",
        )
        for dtype, bits in FORMATS.items()
        if bits >= number_format(values).bits
    ]


def public_keys(copies: int, rows: int, dv: int, told: float = 1.0) -> Possible:
    """Return the memory that suffices to answer attention over the stream of a floor's proof.

    In that stream, tokens with public keys (fixed in advance, not stored) hide rows of dv values of `told` bits each.
    `copies` is the number of kv heads times layers, `rows` the number of hidden rows per head and layer.
    """
    size = "one bit" if told == 1.0 else f"{told:.4g} bits"
    return Possible(
        "public keys", float(copies * rows * dv * told), f"keys known to both sides, values of {size}", _DERIVED
    )


def beside(
    copies: int, n: int, held: int, d: int, dv: int, *, windowed: bool, values: str = "fp16", told: float = 1.0
) -> list[Possible]:
    """List memory sizes that suffice for standard attention at any error, to print beside a floor.

    `copies` is the number of kv heads times layers; `held` of the `n` tokens are attended to. `values` is the number
    format of the values, and `told` the bits of a value of the floor's proof. Listed are
        exact caches            in fp32, fp16 and bf16, but none of fewer bits than the values
        public keys             `told` bits per value, for keys that are fixed in advance
        window and running sum  for a sliding window (`windowed`) with older tokens. It is for the kind of attention in
                                which older tokens keep logit 0 in the softmax
        lazy Gumbel             for d = 1 without a window: a method that draws tokens by their softmax weights
    """
    slides = windowed and n > held
    proviso = "; old tokens leave the softmax" if slides else ""
    exact = caches(copies, held * (d + dv), proviso=proviso, values=values)
    possible = [*exact, public_keys(copies, held, dv, told)]
    if slides:
        numbers = running_sum_numbers(held, d, dv)
        carry = math.ceil(math.log2(n - held))
        condition = f"old tokens keep logit 0; an exact sum takes {carry} bits a coordinate more"
        possible.append(Possible("window and running sum, fp32", float(copies * numbers * 32), condition, _DERIVED))
    if d == 1 and not windowed:
        tokens = lazy_gumbel_tokens(n)
        possible.append(
            Possible(
                "lazy Gumbel, fp32",
                copies * tokens * (d + dv) * 32.0,
                "d = 1; in expectation, for one unbiased draw, of which an average is taken",
                "Haris & Onak (COLT 2025), Appendix D",
                vacuous=tokens >= n,
            )
        )
    return possible


def within_radius(copies: int, n: int, d: int, dv: int, radius: float, error: float) -> list[Possible]:
    """List the memory of Taylor moments that answer attention over `n` tokens within `error`: one entry or none.

    Moments are sums of monomials of the keys (`floors.taylor`). `copies` is the number of kv heads times layers. Logits
    are at most `radius` in size. `error` is the allowed error of an answer. For values >= 0 it may be eta: each value
    of an answer is within a factor 1±eta. For values of any sign it may be epsilon: the l2 error is at most epsilon
    times max |v_i|, ||softmax||_2 ||V||_F or ||softmax||_2 ||V||_op, where V is the matrix of the values v_i. The
    formula is the same in all cases. The list is empty at error 0 and for a radius above 10^6.
    """
    if error <= 0.0 or radius > LARGEST_RADIUS:
        return []
    degree = taylor_degree(radius, error)
    log_count = math.lgamma(d + degree + 1) - math.lgamma(d + 1) - math.lgamma(degree + 1)
    numbers = taylor_numbers(d, dv, degree) if log_count < _LARGEST_LOG else math.inf
    return [
        Possible(
            f"Taylor moments to degree {degree}, fp64",
            float(copies * numbers * _MOMENTS_AT),
            f"logits within {radius:g}, real arithmetic; a relative error needs values >= 0",
            _DERIVED,
            vacuous=numbers >= n * (d + dv),
        )
    ]


def sampled(
    copies: int, n: int, d: int, dv: int, metric: str, epsilon: float, radius: float, failure: float
) -> list[Possible]:
    """List the memory of SubGen at its best cluster radius, for the operator or Frobenius norm; [] for other metrics.

    SubGen clusters keys and samples tokens. `copies` is the number of kv heads times layers. `metric`, `epsilon` and
    `failure` are the norm, the error and the failure probability of the guarantee; queries q have |q| <= `radius`. The
    list is also empty for epsilon outside (0, 1], for failure outside (0, 1), and where SubGen's sizes overflow a
    float.
    """
    if metric == "max" or not 0.0 < epsilon <= 1.0 or not 0.0 < failure < 1.0:
        return []
    plan = subgen_plan(n, d, dv, epsilon, radius, failure, norm=metric)
    if plan is None:
        return []
    delta, s, t, centres = plan
    numbers = subgen_numbers(d, dv, s, t, centres)
    why = [text for text, holds in ((f"s = {s:,} >= n", s >= n), (f"t = {t:,} >= n", t >= n)) if holds]
    says = f"; vacuous: {' and '.join(why)}" if why else ""
    return [
        Possible(
            f"SubGen(delta={delta:.3g}, s={s:,}, t={t:,}), fp32",
            float(copies * numbers * _SUMS_AT),
            f"keys of norm 1, |q| <= {radius:g}, at most {centres:,} clusters, one query fixed beforehand{says}",
            f"Zandieh et al. 2024; constants {_DERIVED}",
            vacuous=bool(why) or numbers >= n * (d + dv),
        )
    ]
