"""Compute the space floor of tensor attention: a token has two keys and two values, and every pair of tokens is a key.

The floor is a lower bound on the bits of any method. * is the product entry by entry.
Query q has score(j1, j2) = sum_l q_l K1[j1, l] K2[j2, l] on the pair of tokens (j1, j2), whose value is V1[j1] * V2[j2]
(Alman and Song 2023). The product key of the pair is K1[j1] * K2[j2].
d and dv are the widths of a key and a value. In the proofs, Alice hides rows (dv values each) in a stream. Bob receives
the method's state after the stream, and reads each hidden row by a query that puts nearly all softmax mass on one pair.
Four caches (`caches` = 4): the stream has n tokens, each with its rows of K1, K2, V1, V2. Two caches: the stream has
the n^2 product keys as tokens of standard attention, each with a value of its own.
"""

import math
from typing import Any

from kvfloor.floors import upper
from kvfloor.floors.coherence import gap_known
from kvfloor.floors.entropy import H2, row_bits
from kvfloor.floors.floor import Floor
from kvfloor.floors.levels import levels_leak, number_format, relative_levels
from kvfloor.floors.norm_bounded import separable_keys
from kvfloor.floors.separation import eps_s, tau
from kvfloor.floors.spike import spike_C
from kvfloor.validation import positive, relative_error, whole, within

CACHES = (4, 2)
_LEAST_WIDTH = 4  # of keys that split into two planes
_THEOREMS = {
    4: "Chen et al. 2025 (arXiv 2503.11108), Omega(n d) for four caches; both value caches are read (derived, "
    "docs/floors.md)",
    2: "Chen et al. 2025 (arXiv 2503.11108), Omega(n^2 d) for two caches, where a pair's value is arbitrary (derived, "
    "docs/floors.md)",
}


def mu_tensor(n: int, d: int, *, caches: int = 4) -> float:
    """Return mu such that some ±1 keys have product keys K1[i] * K2[j] with inner products of at most mu d.

    Such keys exist, because random ±1 keys K1, K2 (n, d) stay within the bound with positive probability. The bound is
    for the product key of a pair that a query reads and the product key of any other pair.
    Law: with four caches, 2(n-1) pairs are read: mu = sqrt((6 ln n + 2 ln 2)/d), by Hoeffding's bound over fewer than 2
    n^3 inner products. With two caches, all n^2 pairs are read: mu = sqrt((8 ln n - 2 ln 2)/d), over fewer than n^4/2
    inner products; 0 for n = 1. Derived here.
    """
    n, d = whole("n", n), whole("d", d)
    pairs = 3.0 * math.log(n) + math.log(2.0) if _caches(caches) == 4 else 4.0 * math.log(n) - math.log(2.0)
    return math.sqrt(max(0.0, 2.0 * pairs) / d)


def tensor_C(n: int, g: float, eps_s: float, *, append: bool = True) -> float:
    """Return the factor C of the query (C/d) K1[i1] * K2[i2] that reads the pair (i1, i2) of ±1 keys.

    All other pairs together then have at most `eps_s` times the softmax mass of this pair.
    g       the gap 1 - s/d, where s is the largest inner product of the product keys of two pairs
    append  True: a token with zero keys is appended before the query, which makes 2n + 1 more pairs, of score 0
    Law: ln((n^2 + 2n)/eps_s) / min(g, 1) with `append`, else ln((n^2 - 1)/eps_s) / g. Derived here.
    """
    n, g = whole("n", n), positive("g", g)
    return spike_C(n**2, 2 * n + 1, g, 1.0, eps_s) if append else spike_C(n**2, 0, g, g, eps_s)


def tensor_rows(n: int, d: int, *, caches: int = 4) -> int:
    """Count the hidden rows that queries of any length can read by tensor attention over `n` tokens.

    A hidden row is dv values that one query reads.
        d >= 4, four caches  2(n-1) rows: V1[i] is read at pair (i, 0) and V2[i] at pair (0, i), for all tokens i but 0;
                             V1[0] and V2[0] are 1. For n = 1, one row
        d >= 4, two caches   n^2 rows, one per pair
        d = 2 or 3           n rows, as in standard attention: all entries of K2 and V2 are 1
        d = 1                min(n, 2) rows, as in standard attention
    Keys with entries ±1 suffice for as many rows if d > 6 ln n + 2 ln 2 (two caches: 8 ln n - 2 ln 2). Derived here.
    """
    n, d = whole("n", n), whole("d", d)
    plain = n if d >= 2 else min(n, 2)
    if d < _LEAST_WIDTH:
        return plain
    return max(plain, 2 * (n - 1)) if _caches(caches) == 4 else n**2


def tensor_space(
    n: int,
    d: int,
    dv: int | None = None,
    *,
    caches: int = 4,
    eta: float = 0.5,
    p: float = 0.9,
    radius: float | None = None,
    heads: int = 1,
    layers: int = 1,
    values: str = "fp16",
) -> Floor:
    """Return a lower bound on the bits that any method must hold to answer tensor attention within a factor 1±eta.

    n       number of tokens
    caches  4: tokens arrive with K1, K2, V1, V2. 2: pairs arrive with arbitrary values of their own, not with products
            of the values of tokens (else 2 n dv numbers would describe all values)
    p       probability that a whole row, the dv values of one answer, is within the factor 1±eta
    radius  largest |score| in nats; None: no bound
    heads, layers   number of kv heads and of layers, which multiply the bound
    values  number format of the values: fp16, bf16 or fp32; binary: single bits
    Law: S >= heads layers `row_bits`(m, dv, p, log2 L): for wide rows, m (p dv log2 L - H2(p)) times heads layers. S is
    the number of bits, H2 the binary entropy, L = `relative_levels`(eta, values) the number of values that answers tell
    apart, and m the number of hidden rows that queries can read. Without `radius`, m = `tensor_rows`(n, d).
    Under `radius`, hidden values are single bits (L = 2), whatever `values` is, and fewer rows can be read. The leak of
    a query is (softmax mass off the queried key)/(mass on it). Let N(w, r, x) be the number of keys of width w, at most
    n, that queries with scores up to r can read at a leak of at most x (`separable_keys`). With eps_s = (1-eta)/4, m is
    the larger of two counts:
        N(d, radius, eps_s)  as in standard attention
        2(h-1)               for d >= 4, or h^2 with two caches, with h = N(floor(d/2), radius/2, sqrt(1 + eps_s) - 1):
                             the first half of the query's d coordinates picks the first token of the pair, the second
                             half the second token
    Returns a `Floor`: the bound, the numbers that it was computed from, and memory sizes that suffice. Raises
    ValueError naming the argument, what was given and what is allowed.
    """
    n, d = whole("n", n), whole("d", d)
    dv = d if dv is None else whole("dv", dv)
    caches, eta = _caches(caches), relative_error(eta)
    p = within("p", p, 0.0, 1.0, low_open=True)
    copies = whole("heads", heads) * whole("layers", layers)
    rows = tensor_rows(n, d, caches=caches)
    hides = values if radius is None else "binary"
    levels, ratio = relative_levels(eta, hides), eps_s(eta)
    if hides != "binary":  # the product of two values may be as large as the square of the largest
        ratio = levels_leak(eta, hides) / (number_format(hides).top * number_format(hides).unit)
    told = math.log2(levels)
    number_format(values)
    constants: dict[str, Any] = {
        "n": n, "d": d, "dv": dv, "caches": caches, "pairs": n**2, "eta": eta, "p": p, "H2_p": H2(p), "heads": heads,
        "layers": layers, "values": hides, "levels": levels, "bits_per_value": told,
        "bits_per_row": row_bits(1, dv, p, told), "eps_s": ratio,
    }  # fmt: skip
    if hides == "binary":
        constants["tau"] = tau(eta, ratio)
    if radius is None:
        constants |= _keys(n, d, caches, ratio)
    else:
        constants["radius"] = positive("radius", radius)
        rows = _rows_within(n, d, caches, constants["radius"], eps_s(eta))
    constants["rows"] = rows
    stored = 2 * n * dv if caches == 4 else n**2 * dv  # numbers
    kept = "four caches" if caches == 4 else "key factors and pair values"
    possible = upper.caches(copies, 2 * n * d + stored, kept, values=values)
    possible.append(upper.public_keys(copies, stored // dv, dv, told))
    return Floor.of(
        copies * row_bits(rows, dv, p, told),
        float(copies * stored * told),
        f"tensor, {'four' if caches == 4 else 'two'} caches" + ("" if radius is None else ", norm-bounded"),
        _THEOREMS[caches],
        constants,
        possible,
    )


def _keys(n: int, d: int, caches: int, ratio: float) -> dict[str, Any]:
    """Choose the public keys of the proof's stream: the first kind, of three, that n and d allow.

    Public keys are fixed in advance, and are proven to exist. Returns a dict of "keys" (the kind), "gap" and "C". C is
    the factor of a query that reads one pair of tokens: it leaves the other pairs at most `ratio` times the softmax
    mass of this pair. The token that Bob, the receiver of the state, appends counts in the softmax.
        signs   for large d. All keys are ±1. The query is C/d times the product key of the pair. The gap is 1 less the
                largest inner product of the product keys of two pairs, divided by d
        halves  for d >= 4. K1 has rows (a, 1), K2 has rows (1, b), so products are (a, b); a and b are unit keys of
                half the width d. The query is (C a, C b). The gap is 1 less the largest inner product of two a (or b)
        K2 = 1  for smaller d. K2 and V2 are 1, also for Bob's token: this is standard attention with the unit keys K1.
                The query is C times a key. The gap is 1 less the largest inner product of two keys
    """
    mu = mu_tensor(n, d, caches=caches)
    if mu < 1.0:
        return {"keys": "signs", "gap": 1.0 - mu, "C": tensor_C(n, 1.0 - mu, ratio)}
    if d >= _LEAST_WIDTH:
        gap = gap_known(n, d // 2)
        return {"keys": "halves (a, 1) and (1, b)", "gap": gap, "C": spike_C(n, 1, gap, 1.0, _half_ratio(ratio))}
    gap = gap_known(min(n, 2) if d == 1 else n, d)
    return {"keys": "K2 = V2 = 1", "gap": gap, "C": spike_C(n, 1, gap, 1.0, ratio)}


def _rows_within(n: int, d: int, caches: int, radius: float, ratio: float) -> int:
    plain = min(float(n), separable_keys(d, radius, ratio))
    if d < _LEAST_WIDTH:
        return int(plain)
    halves = min(float(n), separable_keys(d // 2, radius / 2.0, _half_ratio(ratio)))
    return int(max(plain, 2.0 * (halves - 1.0) if caches == 4 else halves**2))


def _half_ratio(ratio: float) -> float:
    """Return the leak x that each half of a query may have, if the leak of the whole query is to be `ratio`.

    The query reads a pair of tokens whose product key is (a, b). Its first half singles out a among the first halves of
    all product keys, its second half b among the second halves. A leak is (softmax mass on all other keys)/(mass on the
    queried key).
    Law: (1 + x)^2 = 1 + ratio. The score of a pair is the sum of the scores of its halves, so masses multiply.
    """
    return ratio / (math.sqrt(1.0 + ratio) + 1.0)  # without cancellation


def _caches(caches: int) -> int:
    if caches not in CACHES:
        raise ValueError(f"caches must be 4 (K1, K2, V1, V2 arrive) or 2 (pairs arrive), got {caches!r}")
    return int(caches)
