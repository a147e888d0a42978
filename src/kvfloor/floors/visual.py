"""Compute the space floor of visual autoregression, which predicts an image map by map, a whole map of queries at once.

The floor is a lower bound on the bits of any method, i.e. any way to keep the KV cache. The maps of an image pyramid
grow in size: map k has h_k x h_k tokens, and h_k is its side. The queries of map k attend to all maps up to and
including map k (block-wise causal). In the proof, Alice hides a row of dv values under each token and sends a method's
state, the memory that it keeps of the maps. Bob, its receiver, reads the rows by the queries of a later map ("the
asking map").
"""

import math
from collections.abc import Sequence
from typing import Any

from kvfloor.floors import upper
from kvfloor.floors.coherence import gap_known
from kvfloor.floors.entropy import H2, row_bits
from kvfloor.floors.floor import Floor
from kvfloor.floors.levels import levels_leak, relative_levels
from kvfloor.floors.separation import tau
from kvfloor.floors.spike import spike_C
from kvfloor.validation import relative_error, whole, within

_THEOREM = (
    "Cao et al. 2025 (arXiv 2503.14881), Omega(n^2 d) for a last map of n x n; a whole map of spikes asks (derived, "
    "docs/floors.md)"
)


def pyramid(n: int, ratio: float = 2.0) -> tuple[int, ...]:
    """List the sides of the square maps of an image pyramid, ascending from 1 to `n`.

    Each side is the next larger side divided by `ratio` and rounded down, at least 1.
    """
    side, ratio = whole("n", n), within("ratio", ratio, 1.0, math.inf, low_open=True, high_open=True)
    sides = [side]
    while side > 1:
        side = max(1, min(side - 1, math.floor(side / ratio)))
        sides.append(side)
    return tuple(reversed(sides))


def pyramid_tokens(n: int, ratio: float = 2.0, *, before_last: bool = False) -> float:
    """Count the tokens of maps of sides 1, a, a^2, .., n by the formula (a^2 n^2 - 1)/(a^2 - 1), with a = `ratio`.

    With `before_last`, the last map is left out: (n^2 - 1)/(a^2 - 1). The formula is exact where n is a power of a
    whole ratio. Otherwise, sum the squared sides of `pyramid` instead; that sum is at most n^2 a^2/(a^2 - 1).
    """
    n, ratio = whole("n", n), within("ratio", ratio, 1.0, math.inf, low_open=True, high_open=True)
    square = ratio**2
    return ((n**2 - 1.0) if before_last else (square * n**2 - 1.0)) / (square - 1.0)


def visual_rows(sides: Sequence[int], *, last_asks: bool = False) -> int:
    """Count the tokens that hide values in a pyramid with maps of these sides: the sum of the squared sides.

    If `last_asks`, the queries of the last map read the values hidden in the other maps; the last map hides nothing and
    is not counted. Otherwise the queries are those of a further map.
    """
    squares = [whole("side", side) ** 2 for side in sides]
    if not squares:
        raise ValueError("sides must hold the side of at least one map, got none")
    return sum(squares[:-1] if last_asks else squares)


def visual_C(rows: int, asking: int, g: float, eps_s: float) -> float:
    """Return the length of a query that reads one of `rows` unit keys, if the query's own map adds `asking` keys of 0.

    The gap of the unit keys is 1 less the largest inner product of two of them, and must be at least `g`. All other
    tokens together then have at most `eps_s` times the softmax mass of the key that the query reads.
    Law: ln((rows - 1 + asking)/eps_s) / min(g, 1), because the tokens with key 0 have logit 0. Derived here.
    """
    return spike_C(rows, whole("asking", asking), g, 1.0, eps_s)


def visual_space(
    n: int,
    d: int,
    dv: int | None = None,
    *,
    ratio: float = 2.0,
    sides: Sequence[int] | None = None,
    last_asks: bool = False,
    eta: float = 0.5,
    p: float = 0.9,
    heads: int = 1,
    layers: int = 1,
    values: str = "fp16",
) -> Floor:
    """Return a lower bound on the bits that any method of visual autoregression must hold after a pyramid of maps.

    n          side of the last map
    d, dv      width of a key, width of a value (d unless given)
    sides      sides of the square maps, ascending, the last of them n; None: each side is the next larger one divided
               by `ratio` and rounded down (`pyramid`)
    last_asks  True: no map follows; the queries of the last map read the other maps, and the last map hides nothing.
               False: a further map, as large as the last, asks
    p          probability that a whole row, the dv values of one answer, is within a factor 1±eta of attention
    heads, layers   number of kv heads and of layers, which multiply the bound
    values     number format of the values: fp16, bf16 or fp32; binary: single bits
    Law: S >= heads layers `row_bits`(m, dv, p, log2 L): for wide rows, m (p dv log2 L - H2(p)) times heads layers. S is
    the number of bits, H2 the binary entropy, L = `relative_levels`(eta, values) the number of values that answers tell
    apart, and m = `visual_rows`(sides, last_asks) the number of tokens that hide values; m <= 2 for
    d = 1. Keys and queries may be of any length.
    Returns a `Floor`: the bound, the numbers that it was computed from, and memory sizes that suffice. Raises
    ValueError naming the argument, what was given and what is allowed.
    """
    n, d = whole("n", n), whole("d", d)
    dv = d if dv is None else whole("dv", dv)
    eta, p = relative_error(eta), within("p", p, 0.0, 1.0, low_open=True)
    copies = whole("heads", heads) * whole("layers", layers)
    sides = pyramid(n, ratio) if sides is None else tuple(whole("side", side) for side in sides)
    if list(sides) != sorted(sides) or not sides or sides[-1] != n:
        raise ValueError(f"sides must ascend and end in n = {n}, got {sides}")

    tokens = visual_rows(sides)

    levels, ratio = relative_levels(eta, values), levels_leak(eta, values)
    told = math.log2(levels)

    def bits(last: bool) -> float:
        return copies * row_bits(_readable(sides, d, last), dv, p, told)

    rows = _readable(sides, d, last_asks)
    constants: dict[str, Any] = {
        "n": n, "d": d, "dv": dv, "sides": list(sides), "tokens": tokens, "last_asks": last_asks, "eta": eta, "p": p,
        "H2_p": H2(p), "heads": heads, "layers": layers, "values": values, "levels": levels,
        "bits_per_value": told, "bits_per_row": row_bits(1, dv, p, told), "rows": rows,
        "rows_asked_at_once": n**2, "bits_if_the_last_map_asks": bits(True), "eps_s": ratio,
        "exact_bytes_fp16": copies * upper.exact_bytes(tokens, d, dv, "fp16"),
        "exact_bytes_fp32": copies * upper.exact_bytes(tokens, d, dv, "fp32"),
    }  # fmt: skip
    if values == "binary":
        constants["tau"] = tau(eta, ratio)
    if rows:
        gap = gap_known(rows, d)
        constants |= {"gap": gap, "C": visual_C(rows, n**2, gap, ratio)}
    exact = upper.caches(copies, tokens * (d + dv), values=values)
    possible = [*exact, upper.public_keys(copies, tokens, dv, told)]
    return Floor.of(
        bits(last_asks), float(copies * tokens * dv * told), "visual pyramid", _THEOREM, constants, possible
    )


def _readable(sides: Sequence[int], d: int, last_asks: bool) -> int:
    """Count the tokens of a pyramid whose hidden values queries can read.

    `sides` are the sides of its maps, and d is the width of a key. If `last_asks`, the queries are those of the last
    map, which then hides nothing; else they are those of a further map.
    Law: all tokens that hide values (`visual_rows`); for d = 1 at most two, those of the largest and the smallest key.
    """
    rows = visual_rows(sides, last_asks=last_asks)
    return min(rows, 2) if d == 1 else rows
