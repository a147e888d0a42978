"""Compute certified attention over packed codes, read in place: a numba kernel for CPUs.

The module `kernel` says when it is used, and `certify.glimpse` defines what it computes. docs/certificates.md has the
bounds, and what the order of this file's sums allows for rounding. Import this module only where numba is installed.

A row is one (batch item, kv head) stream, a slot the place of one held token, a page `group` tokens of a row that are
coded together. The kernel goes twice through a row's coded slots, in tiles of TILE. The first time it computes logits,
in integers: queries times steps become integers of 30 bits, in halves of 15, so that no sum over channels is rounded.
The second time it sums values. Heavy tokens, those of large weight, are bounded one by one, all others together. Sums
over more than CHUNK tokens are in float64.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types  # pyright: ignore[reportMissingImports]

from kvfloor.methods.stores import fused_numba
from kvfloor.methods.stores.fused_numba import HIDDEN, TILE, compiled, exponential, fetch, short_float, turn_words
from kvfloor.methods.tiered import kernel_vectors
from kvfloor.methods.tiered.kernel_vectors import (
    add_weighted,
    code_logits,
    highest,
    lane,
    look_up_levels,
    sums_of_16,
    write_halves,
    write_ranks,
)

BUILT_ON = (fused_numba.__file__, kernel_vectors.__file__)

HEAVY = 64
"""Most tokens that are bounded one by one, for each query."""
CHUNK = 256
"""Tokens whose weighted values are summed in float32, before they are added to a sum in float64."""
LEAST = -80.0
"""Least exponent of a weight relative to the largest one: smaller weights are 0, and allowed for."""
DOUBT = 30.0
"""Bound on a logit's error from which on nothing is bounded."""
UNIT = 2.0**-23
"""The allowance for one rounding in float32, twice the largest relative error."""


# ---- the first time: logits and weights -----------------------------------------------------------------------------


@compiled(fast=False)
def _ranges(low, high, span, row, page, begin, wide):
    """Write the start and the width of each channel's range, (d), to the bit as `codes.ranges` computes them."""
    from_low, by_low, from_high, by_high = (
        span[row, page, 0],
        span[row, page, 1],
        span[row, page, 2],
        span[row, page, 3],
    )
    for c in range(len(begin)):  # products are exact in float64, so that they cannot be rounded as one with the sums
        begin[c] = from_low + np.float32(np.float64(low[row, page, c]) * np.float64(by_low))
        end = from_high + np.float32(np.float64(high[row, page, c]) * np.float64(by_high))
        wide[c] = end - begin[c] if end > begin[c] else np.float32(0.0)


@compiled
def _order(wide, rank, spots, order):
    """Write the channels' ranks by falling width to rank (d); that of rank n to order[spots[n]], for n < d // 2."""
    write_ranks(wide, rank)
    for c in range(len(wide)):
        if rank[c] < len(spots):
            order[spots[np.uint64(rank[c])]] = c


@compiled(fast=False)
def _steps(wide, rank, loud, extra, most, step):
    """Write the largest code and the step of each channel, (d), in float64; those of rank < loud have `extra` bits."""
    for c in range(len(wide)):
        most[c] = np.float64((256 << extra) - 1 if rank[c] < loud else 255)
    for c in range(len(wide)):
        step[c] = np.float64(wide[c] / np.float32(most[c]))


@compiled
def _fold(queries, i, extra, begin, step, most, order, folded, small, whole, factors, by):
    """Fold a page's ranges into query i of `queries` (m, d), times the scale, in float64.

    begin, step, most  (d) what `_ranges` and `_steps` wrote; order: what `_order` wrote, if extra > 0
    whole   (d) int32, the factors that codes of 8 bits are multiplied with
    factors int16 (m, 2, d + d // 2), in [i, 0, d:] those of the further bits, in the order of `order`
    by      float32 (m, 4), in row i: what the upper half of a factor counts, what its lower half and what a factor of
            the further bits, and the product with the starts of the ranges
    folded, small  scratch, (d), float64 and int32
    Returns a bound on the error of a logit from half a step of every channel, and one from rounding `fine`.
    """
    start, error, square, fine_square = 0.0, 0.0, 0.0, 0.0
    for c in range(len(step)):
        part = queries[i, c] * step[c]
        size = part * (most[c] + 1.0) * 2.0**-8  # what one of the 8 bits counts
        start += queries[i, c] * np.float64(begin[c])
        error += abs(part)
        square += size * size
        fine_square += part * part if most[c] > 255.0 else 0.0
        folded[c] = part
    top = math.sqrt(square) * 2.0**-29
    top = top if top > 0 else 1.0
    over = 1.0 / top
    for c in range(len(step)):
        whole[c] = np.int32(np.floor(folded[c] * ((most[c] + 1.0) * 2.0**-8) * over + 0.5))
    tiny, left = math.sqrt(fine_square) / 32767.0, 0.0
    tiny = tiny if tiny > 0 else 1.0
    over, d = 1.0 / tiny, np.uint64(len(step))
    for c in range(len(step)):
        rounded = np.floor(folded[c] * over + 0.5) if most[c] > 255.0 else 0.0
        small[c] = np.int32(rounded)
        left += abs(folded[c] - rounded * tiny) if most[c] > 255.0 else 0.0
    for n in range(len(order)):
        factors[i, 0, d + np.uint64(n)] = np.int16(small[order[n]])
    by[i, 0], by[i, 1], by[i, 2], by[i, 3] = (
        np.float32(top * 32768.0),
        np.float32(top),
        np.float32(tiny),
        np.float32(start),
    )
    return error / 2, left * ((1 << extra) - 1)


@compiled
def _tile_logits(words, fine, counts, extra, factors, by, softcap, out, to):
    """Write a tile's logits to out[:, to .. to + TILE - 1]: `code_logits`, and the softcap."""
    m = len(out)
    for t in range(0, TILE, 16):
        i = 0
        while i < m:
            if m - i >= 4:
                code_logits(words, fine, t, counts, extra, factors, by, i, 4, out, to + t)
                i += 4
            elif m - i == 3:
                code_logits(words, fine, t, counts, extra, factors, by, i, 3, out, to + t)
                i += 3
            elif m - i == 2:
                code_logits(words, fine, t, counts, extra, factors, by, i, 2, out, to + t)
                i += 2
            else:
                code_logits(words, fine, t, counts, extra, factors, by, i, 1, out, to + t)
                i += 1
    if softcap > 0:
        for i in range(m):
            for t in range(to, to + TILE):
                out[i, t] = np.float32(softcap * math.tanh(np.float64(out[i, t]) / softcap))


@compiled
def _exponential_part(x, top):
    """Do the work of `_exponentials` for few logits, whose sums are in float32."""
    one, two = np.float32(0.0), np.float32(0.0)
    for t in range(len(x)):
        away = x[t] - top
        weight = exponential(away) if away >= np.float32(LEAST) else np.float32(0.0)
        x[t] = weight
        one += weight
        two += weight * weight
    return one, two


@compiled
def _exponentials(x, top):
    """Turn logits x into weights relative to `top`; return their sum and the sum of their squares."""
    mass, square = 0.0, 0.0
    for start in range(0, len(x), CHUNK):
        one, two = _exponential_part(x[start : start + CHUNK], top)
        mass += np.float64(one)
        square += np.float64(two)
    return mass, square


@compiled
def _lighter_part(x, limit):
    """Do the work of `_lighter` for few weights, whose sum is in float32."""
    count, square = 0, np.float32(0.0)
    for t in range(len(x)):
        above = x[t] > limit
        count += above
        square += np.float32(0.0) if above else x[t] * x[t]
    return count, square


@compiled
def _lighter(x, limit):
    """Return how many of the weights x are above the limit, and the sum of the squares of the others."""
    count, square = 0, 0.0
    for start in range(0, len(x), CHUNK):
        some, two = _lighter_part(x[start : start + CHUNK], limit)
        count += some
        square += np.float64(two)
    return count, square


@compiled
def _limit(x, square):
    """Return a weight that at most HEAVY of the weights x are above, and these stand out. square: the sum of x^2."""
    limit, before, lower = np.float32(np.inf), 0, np.float32(math.sqrt(square / HEAVY))
    for _ in range(4):
        count, rest = _lighter(x, lower)
        if count > HEAVY:
            break
        limit = lower
        if count == before:
            break
        before, lower = count, np.float32(math.sqrt(rest / HEAVY))
    return limit


# ---- the second time: values ----------------------------------------------------------------------------------------


@compiled
def _decoded(packed, start, dv, table, planes, numbers, squares, norms):
    """Write the levels of a tile's values, (TILE * dv), and their norms (TILE), without the values' scales."""
    for n in range(len(squares)):
        squares[n] = np.float32(0.0)
    for t in range(TILE):
        for at in range(t * dv, (t + 1) * dv, 64):
            look_up_levels(packed, start + at, table, planes, numbers, at, squares, t)
    for t in range(0, TILE, 16):
        sums_of_16(squares, 16 * t, norms, t)
    for t in range(TILE):
        norms[t] = math.sqrt(norms[t])


@compiled
def _add_values(numbers, weights, dv, out):
    """Add a tile's numbers, weighted by weights (n, TILE), to out (n, dv)."""
    n = len(weights)
    for c in range(0, dv, 32):
        i = 0
        while i < n:
            if n - i >= 8:
                add_weighted(numbers, weights, i, 8, c, out)
                i += 8
            elif n - i >= 6:
                add_weighted(numbers, weights, i, 6, c, out)
                i += 6
            elif n - i >= 4:
                add_weighted(numbers, weights, i, 4, c, out)
                i += 4
            else:
                add_weighted(numbers, weights, i, 2, c, out)
                i += 2


@compiled
def _weigh(x, i, at, limit, sizes, scales, radii, weights):
    """Write the weights of a tile's values, for query i of m, to weights (2 m, TILE).

    Row i gets the tokens' weights x[i, at ..] times the values' scales, row m + i their squares times the scales, 0 for
    weights above the limit. `at` is a uint64, for an index that is never negative. Returns how many weights are above
    the limit; the sums of x sizes and of x radii over all tokens; those of x^2 sizes^2 and x^2 over the others.
    """
    count, one, two, three, four = np.int32(0), np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
    other = len(weights) // 2 + i
    for t in range(TILE):
        w = x[i, at + np.uint64(t)]
        heavy = w > limit
        light = np.float32(0.0) if heavy else w * w
        weights[i, t] = w * scales[t]
        weights[other, t] = light * scales[t]
        count += np.int32(heavy)
        one += w * sizes[t]
        two += w * radii[t]
        three += light * sizes[t] * sizes[t]
        four += light
    return count, one, two, three, four


@compiled
def _flush(part, total):
    """Add part, float32, to total, float64, both flat, and clear it."""
    for n in range(len(part)):
        total[n] += np.float64(part[n])
    for n in range(len(part)):
        part[n] = np.float32(0.0)


@compiled
def _as_floats(bits, at, out):
    """Write the bfloat16 numbers with the bits bits[at ..] to out; `at` is a uint64."""
    for n in range(len(out)):
        out[n] = short_float(bits[at + np.uint64(n)])


@compiled
def _sizes(norms, scales, radii, shrink, sizes, longest, least):
    """Write norms times scales to sizes; raise `longest` to sizes plus radii, `least` to shrunk sizes minus radii."""
    for t in range(TILE):
        size = norms[t] * scales[t]
        sizes[t] = size
        high, low = size + radii[t], size * shrink - radii[t]
        longest[t] = high if high > longest[t] else longest[t]
        least[t] = low if low > least[t] else least[t]


@compiled
def _turned(turn, vector, out):
    """Write the product of the matrix turn (w, w) and a vector to out."""
    for a in range(len(out)):
        total = 0.0
        for b in range(len(vector)):
            total += turn[a, b] * vector[b]
        out[a] = total


@compiled
def _turned_back(turn, vector, out):
    """Write the product of the transpose of turn (w, w) and a vector to out."""
    for b in range(len(out)):
        out[b] = 0.0
    for a in range(len(vector)):
        for b in range(len(out)):
            out[b] += turn[a, b] * vector[a]


@compiled
def _fresh_logits(asked, softcap, keys, count, logits):
    """Write the logits of the first `count` of keys (n, d) to logits (m, n); return the largest square of a norm."""
    widest = np.float32(0.0)
    for f in range(count):
        square = np.float32(0.0)
        for c in range(keys.shape[1]):
            square += keys[f, c] * keys[f, c]
        widest = max(widest, square)
        for i in range(len(asked)):
            logit = np.float32(0.0)
            for c in range(keys.shape[1]):
                logit += asked[i, c] * keys[f, c]
            logits[i, f] = logit
    if softcap > 0:
        for i in range(len(asked)):
            for f in range(count):
                logits[i, f] = np.float32(softcap * math.tanh(np.float64(logits[i, f]) / softcap))
    return np.float64(widest)


@compiled
def _fresh_sums(values, sizes, logits, i, count, total):
    """Add weights logits[i, f], f < count, times values[f] to total; write the values' norms to sizes.

    Returns the sum of the weights, and of weights times norms.
    """
    mass, size = 0.0, 0.0
    for f in range(count):
        weight = np.float64(logits[i, f])
        mass += weight
        size += weight * sizes[f]
        for c in range(len(total)):
            total[c] += weight * np.float64(values[f, c])
    return mass, size


# ---- the bound ------------------------------------------------------------------------------------------------------


@compiled
def _gram(asked, i, key_gram, r, grown):
    """Return a bound on the root of the sum of squared errors of logits, from the sums of the keys' residuals.

    asked (m, d): queries times the scale, of which i is meant. grown: allowance for the rounding of the sums, relative
    to their trace.
    """
    square, trace, norm = 0.0, 0.0, 0.0
    for c in range(asked.shape[1]):
        part = 0.0
        for e in range(asked.shape[1]):
            part += np.float64(key_gram[r, c, e]) * asked[i, e]
        square += part * asked[i, c]
        norm += asked[i, c] * asked[i, c]
        trace += np.float64(key_gram[r, c, c])
    return math.sqrt(max(square, 0.0) + grown * norm * trace)


@compiled(fast=False)
def _deviation(each, own, rest, slope, gram, count):
    """Return the least bound on a sum of a_i |exp(eta_i) - 1| over the heavy tokens and the others.

    each (count) a_i (exp(B_i) - 1) of the heavy tokens, own (count) a_i^2, rest: the sum of the others' a_i^2. Token by
    token, from the first on, the heavy ones are bounded by themselves, and the rest by the Gram bound.
    """
    for n in range(count - 1, -1, -1):  # own[n] becomes the sum from n on
        own[n] += own[n + 1] if n + 1 < count else rest
    first, least = 0.0, slope * gram * math.sqrt(own[0] if count else rest)
    for n in range(count):
        first += each[n]
        least = min(least, first + slope * gram * math.sqrt(own[n + 1] if n + 1 < count else rest))
    return least


@compiled(fast=False)
def _sort(key, count, order):
    """Write the indices of the first `count` keys by falling key to order."""
    for n in range(count):
        at = n
        while at > 0 and key[order[at - 1]] < key[n]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = n


_BYTES_OF, _FLOATS = types.uint8[:, ::1], types.float32[::1]
_CUBE, _SHARED, _INTEGERS = types.float32[:, :, ::1], types.uint8[:, :, ::1], types.int64[::1]
_SHORTS, _PLANE = types.int16[::1], types.float32[:, ::1]
_SIGNATURE = types.void(
    *(types.int64, types.int64, _CUBE, types.float64, types.float64),
    *(_INTEGERS, _INTEGERS, _INTEGERS, types.int64, types.int64, types.int64, types.boolean[:, :, :]),
    *(_BYTES_OF, types.uint32[:, ::1], types.int64, _SHARED, _SHARED, _CUBE),
    *(_BYTES_OF, _SHORTS, _SHORTS, _FLOATS, _BYTES_OF),
    *(_CUBE, _CUBE, _CUBE, types.float64, _FLOATS, _FLOATS, _FLOATS, types.float64[:, ::1]),
    *(_CUBE, _PLANE, _PLANE, _PLANE, _PLANE),
)


@compiled(signature=_SIGNATURE)
def certify(
    begin,
    stop,
    q,
    scale,
    softcap,
    offset,
    count,
    coded,
    first,
    group,
    ring,
    hide,
    key_packed,
    key_fine,
    extra,
    low,
    high,
    span,
    value_packed,
    value_scale,
    radius,
    table,
    planes,
    fresh_k,
    fresh_v,
    key_gram,
    gram_rounding,
    excess,
    reach,
    operator,
    turn,
    mean,
    log_mass,
    error,
    spread,
    largest,
):
    """Answer queries q (rows, m, d) of the rows begin .. stop - 1, with what `Certified` holds about each answer.

    scale, softcap   of the logits; softcap 0: no cap
    offset, count    (rows,) first slot of each row, and number of its slots that are read; slot i holds token i
    coded            (rows,) number of tokens before those without codes, a multiple of `group`
    first, ring      uncoded tokens: the first ones, and room for the newest ones, in fresh_k and fresh_v
    hide             bool (rows, m, slots), True for slots that a query does not see; or empty
    key_packed, key_fine, extra, low, high, span   what `LoudChannels` or `ChannelCodes` holds; key_fine as 32-bit words
    value_packed, value_scale, table, planes       what `TokenCodes` holds, the scales as the bits of bfloat16, and the
                     levels as `look_up_levels` takes them
    radius           (slots,) bounds on the norms of the values' residuals, the bits of bfloat16
    key_gram, excess, reach, operator              what `Hot` holds; gram_rounding: allowance for key_gram, relative
    turn             (dv, dv) the rotation of values
    Writes mean (rows, m, dv), and log_mass, error, spread and largest (rows, m).
    """
    m, d, dv = q.shape[1], q.shape[2], mean.shape[2]
    full, short, key_bytes = d // 4, key_fine.shape[1], key_packed.shape[1]
    keys, values, masked = key_packed.ravel(), value_packed.ravel(), hide.shape[0] > 0
    words, fine = np.empty(d * TILE // 4, np.uint32), np.empty(max(1, short) * TILE, np.uint32)
    begins, wide = np.empty(d, np.float32), np.empty(d, np.float32)
    step, most, folded = np.empty(d), np.empty(d), np.empty(d)
    loud, each_word = (d // 2, 16 // extra) if extra > 0 else (0, 1)
    rank, whole, small = np.full(d, d, np.int32), np.empty(d, np.int32), np.empty(d, np.int32)
    order, spots = np.empty(loud, np.uint64), np.empty(loud, np.uint64)
    for n in range(loud):
        k = n % (2 * each_word)
        spots[n] = n - k + 2 * (k % each_word) + k // each_word
    asked = np.empty((m, d))
    factors, by, counts = np.zeros((m, 2, d + loud), np.int16), np.empty((m, 4), np.float32), (full, short, each_word)
    gram, norm, rounding = np.empty(m), np.empty(m), np.empty(m)
    numbers, norms = np.empty(TILE * dv, np.float32), np.empty(TILE, np.float32)
    squares = np.empty(16 * TILE, np.float32)
    scales, radii, sizes = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    longest, least, seen = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty((m, TILE), np.float32)
    shrink = np.float32(1 - UNIT * (4 * dv + 64))
    weights, part, total = np.empty((2 * m, TILE), np.float32), np.zeros((2 * m, dv), np.float32), np.empty((2 * m, dv))
    sums, limit = np.empty((m, 5)), np.empty(m, np.float32)
    heavy, heavies = np.empty((m, HEAVY), np.int64), np.empty(m, np.int64)
    each, own, apart_each, square = np.empty(HEAVY), np.empty(HEAVY), np.empty(HEAVY), np.empty(HEAVY)
    apart, lost = np.empty(m), np.empty(m)
    sorted_each, sorted_own, by_size = np.empty(HEAVY), np.empty(HEAVY), np.empty(HEAVY, np.int64)
    flat_part, flat_total = part.ravel(), total.ravel()
    places = np.empty(first + ring, np.int64)
    fresh_logits, fresh_sizes = np.empty((m, first + ring), np.float32), np.empty(first + ring)
    fresh_keys, fresh_values = np.empty((first + ring, d), np.float32), np.empty((first + ring, dv), np.float32)
    asked_once = np.empty((m, d), np.float32)
    top, mass, wild = np.empty(m, np.float32), np.empty(m), np.empty(m, np.bool_)
    center, turned, plain = np.empty(dv), np.empty(dv), np.empty(dv)
    for r in range(begin, stop):
        n = coded[r]
        pages = n // group
        x, doubt = np.empty((m, n), np.float32), np.empty((m, pages))
        fresh = 0
        for p in range(count[r]):
            if p < first or p >= n:
                places[fresh] = p if p < first else first + p % ring
                fresh += 1
        for f in range(fresh):
            at = np.uint64(places[f])
            for c in range(d):
                fresh_keys[f, c] = fresh_k[r, at, c]
            long_square = np.float32(0.0)
            for c in range(dv):
                fresh_values[f, c] = fresh_v[r, at, c]
                long_square += fresh_v[r, at, c] * fresh_v[r, at, c]
            fresh_sizes[f] = math.sqrt(long_square)
        for i in range(m):
            for c in range(d):
                asked[i, c] = np.float64(q[r, i, c]) * scale
                asked_once[i, c] = np.float32(asked[i, c])
        size = math.sqrt(_fresh_logits(asked_once, softcap, fresh_keys, fresh, fresh_logits)) * (1 + 1e-4)
        for i in range(m):
            square_sum = 0.0
            for c in range(d):
                square_sum += np.float64(q[r, i, c]) ** 2
            norm[i] = scale * math.sqrt(square_sum)
            fixed = UNIT * (16.0 - LEAST + 8.0 * softcap)
            rounding[i] = UNIT * (12.0 + d / 32.0) * norm[i] * reach[r] + fixed
            half_rounding = UNIT * (d / 2 + 2) * norm[i] * size + fixed
            gram[i] = _gram(asked, i, key_gram, r, gram_rounding) * (1 + 1e-6)
            wild[i] = not norm[i] * max(np.float64(reach[r]), size) < 1e6
            apart[i] = half_rounding  # of the uncoded tokens
            lost[i] = 0.0
            top[i] = HIDDEN
        for page in range(pages):
            _ranges(low, high, span, r, page, begins, wide)
            if extra > 0:
                _order(wide, rank, spots, order)
            _steps(wide, rank, loud, extra, most, step)
            for i in range(m):
                half, left = _fold(asked, i, extra, begins, step, most, order, folded, small, whole, factors, by)
                write_halves(whole, factors, i)
                doubt[i, page] = min((half + norm[i] * excess[r]) * (1 + 1e-6), gram[i])
                lost[i] = max(lost[i], left)
            for start in range(page * group, (page + 1) * group, TILE):
                place = offset[r] + start
                for at in range(0, TILE * key_bytes, 64):
                    fetch(keys, (place + 2 * TILE) * key_bytes + at)
                turn_words(keys, place * key_bytes, key_bytes, 4, full, words)
                for w in range(short):
                    for t in range(TILE):
                        fine[w * TILE + t] = key_fine[place + t, w]
                _tile_logits(words, fine, counts, extra, factors, by, softcap, x, start)
                if start < first or masked:
                    for i in range(m):
                        for t in range(start, start + TILE):
                            if t < first or (masked and hide[r, i, t]):
                                x[i, t] = HIDDEN
        for i in range(m):
            rounding[i] += lost[i]
            for page in range(pages):
                doubt[i, page] += rounding[i]
            limit[i], heavies[i] = np.float32(np.inf), 0
            if wild[i]:
                continue
            for f in range(fresh):
                p = f if f < min(first, count[r]) else n + f - min(first, n)
                if masked and hide[r, i, p]:
                    fresh_logits[i, f] = HIDDEN
                top[i] = max(top[i], np.float32(fresh_logits[i, f]))
            for t in range(0, n, TILE):
                top[i] = max(top[i], highest(x, i * n + t))
            mass[i], whole_square = _exponentials(x[i], top[i])
            limit[i] = _limit(x[i], whole_square)
        longest[:] = np.float32(0.0)
        least[:] = np.float32(0.0)
        seen[:] = np.float32(0.0)
        total[:] = 0.0
        sums[:] = 0.0
        for start in range(0, n, TILE):
            place = offset[r] + start
            for at in range(0, TILE * dv, 64):
                fetch(values, (place + 2 * TILE) * dv + at)
            _decoded(values, place * dv, dv, table, planes, numbers, squares, norms)
            _as_floats(value_scale, np.uint64(place), scales)
            _as_floats(radius, np.uint64(place), radii)
            for t in range(min(TILE, first - start)):
                scales[t] = radii[t] = np.float32(0.0)
            _sizes(norms, scales, radii, shrink, sizes, longest, least)
            if masked:
                for i in range(m):
                    for t in range(TILE):
                        size = np.float32(0.0) if hide[r, i, start + t] else sizes[t] * shrink - radii[t]
                        seen[i, t] = size if size > seen[i, t] else seen[i, t]
            for i in range(m):
                some, one, two, three, four = _weigh(x, i, np.uint64(start), limit[i], sizes, scales, radii, weights)
                grown = 1.0 + math.expm1(min(doubt[i, start // group], DOUBT))
                sums[i, 0] += np.float64(one)
                sums[i, 1] += grown * np.float64(two)
                sums[i, 2] += np.float64(three)
                sums[i, 3] += np.float64(four)
                sums[i, 4] += grown * grown * np.float64(four)
                for t in range(start, start + TILE if some > 0 else start):
                    if x[i, t] > limit[i] and heavies[i] == HEAVY:
                        wild[i] = True  # never, by `_limit`: bound nothing rather than leave a token out
                    elif x[i, t] > limit[i]:
                        heavy[i, heavies[i]] = t
                        heavies[i] += 1
            _add_values(numbers, weights, dv, part)
            if start % CHUNK == CHUNK - TILE:
                _flush(flat_part, flat_total)
        _flush(flat_part, flat_total)
        for i in range(m):
            if wild[i]:
                mean[r, i, :] = np.float32(0.0)
                log_mass[r, i] = np.float32(0.0)
                error[r, i] = spread[r, i] = np.float32(np.inf)
                largest[r, i] = np.float32(0.0)
                continue
            if top[i] <= HIDDEN:
                mean[r, i, :] = np.float32(0.0)
                log_mass[r, i] = np.float32(-np.inf)
                error[r, i] = spread[r, i] = largest[r, i] = np.float32(0.0)
                continue
            lowest, widest_value = 0.0, 0.0
            for t in range(TILE):
                lowest = max(lowest, np.float64(seen[i, t] if masked else least[t]))
                widest_value = max(widest_value, np.float64(longest[t]))
            plain[:] = 0.0
            for f in range(fresh):
                if fresh_logits[i, f] > HIDDEN:
                    lowest = max(lowest, fresh_sizes[f] * (1 - UNIT * (dv + 4)))
                    widest_value = max(widest_value, fresh_sizes[f])
            _exponential_part(fresh_logits[i, :fresh], top[i])
            fresh_mass, fresh_size = _fresh_sums(fresh_values, fresh_sizes, fresh_logits, i, fresh, plain)
            whole_mass = mass[i] + fresh_mass
            _turned(turn, plain, turned)
            for a in range(dv):
                turned[a] = (total[i, lane(a)] + turned[a]) / whole_mass
            center_square = 0.0
            for a in range(dv):
                center[lane(a)] = turned[a]
                center_square += turned[a] * turned[a]
            long = math.sqrt(center_square)
            _turned_back(turn, turned, plain)
            for b in range(dv):
                mean[r, i, b] = np.float32(plain[b])
            # the heavy tokens, each by itself
            tokens, grown_square = heavies[i], sums[i, 4]
            for h in range(tokens):
                t = heavy[i, h]
                place, weight = offset[r] + t, np.float64(x[i, t])
                factor, away, size = np.float64(short_float(value_scale[place])), 0.0, 0.0
                for c in range(dv):
                    number = factor * np.float64(table[value_packed[place, c]])
                    away += (number - turned[c]) ** 2
                    size += number * number
                more = math.expm1(min(doubt[i, t // group], DOUBT))
                away = math.sqrt(away) + 4 * UNIT * (math.sqrt(size) + long)
                own[h], each[h] = (weight * away) ** 2, weight * away * more
                square[h], apart_each[h] = weight * weight, weight * more
                grown_square += (weight * (1 + more)) ** 2
            _sort(each, tokens, by_size)
            # all together
            widest = rounding[i]
            for page in range(pages):
                widest = max(widest, doubt[i, page])
            widest = min(max(widest, apart[i]), DOUBT)
            slope, uncoded = math.expm1(widest) / max(widest, 1e-300), math.expm1(min(apart[i], DOUBT))
            near = 0.0
            for c in range(dv):
                near += center[c] * total[m + i, c]
            root = math.sqrt(sums[i, 2]) + long * math.sqrt(sums[i, 3])
            rest = max(sums[i, 2] - 2 * near + center_square * sums[i, 3], 0.0)
            rest += UNIT * (dv / 2 + CHUNK / 2 + 64) * root * root
            for h in range(tokens):
                sorted_each[h], sorted_own[h] = each[by_size[h]], own[by_size[h]]
            about = _deviation(sorted_each, sorted_own, rest, slope, gram[i], tokens)
            about += slope * rounding[i] * (sums[i, 0] + long * mass[i]) + uncoded * (fresh_size + long * fresh_mass)
            for h in range(tokens):
                sorted_each[h], sorted_own[h] = apart_each[by_size[h]], square[by_size[h]]
            over = _deviation(sorted_each, sorted_own, sums[i, 3], slope, gram[i], tokens)
            over += slope * rounding[i] * mass[i] + uncoded * fresh_mass
            by_norm, by_radius = math.sqrt(grown_square) * operator[r], sums[i, 1]
            lengths = (sums[i, 0] + sums[i, 1] + fresh_size) / whole_mass
            floor = count[r] * math.exp(LEAST + widest)
            log = np.float64(top[i]) + math.log(whole_mass)
            terms = UNIT * (CHUNK + 64)
            told = terms + 4 * UNIT * (abs(log) + 1)
            loose = (1 + UNIT * (count[r] / 64 + 4 * dv + 256)) * (1 + told)
            off = (about + min(by_norm, by_radius) + floor * (widest_value + long)) / whole_mass
            off = (off + terms * lengths * math.exp(widest)) * loose
            wide_off = ((over + floor) / whole_mass + told) * loose
            checked = off + wide_off + by_norm + by_radius + long
            if widest >= DOUBT or not checked < np.inf:
                off = wide_off = np.inf
            log_mass[r, i] = np.float32(log)
            error[r, i], spread[r, i] = np.float32(off), np.float32(wide_off)
            largest[r, i] = np.float32(lowest * (1 - UNIT))
