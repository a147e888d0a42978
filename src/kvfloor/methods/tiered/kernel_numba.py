"""Compute certified attention over packed codes, read in place: a numba kernel for CPUs.

The module `kernel` says when it is used, and `certify.glimpse` defines what it computes. docs/certificates.md has the
bounds, and what the order of this file's sums allows for rounding. Import this module only where numba is installed.

A row is one (batch item, kv head) stream, a slot the place of one held token, a page `group` tokens of a row that are
coded together. The kernel goes twice through a row's coded slots, in tiles of TILE. The first time it computes logits,
in integers: queries times steps become integers of 30 bits, in halves of 15, so that a sum over channels is not rounded.
The second time it sums values. Heavy tokens, those of large weight, are bounded one by one, all others together. Sums
over more than CHUNK tokens are in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import binding, ir  # pyright: ignore[reportMissingImports]
from numba import types  # pyright: ignore[reportMissingImports]
from numba.core import cgutils, config  # pyright: ignore[reportMissingImports]

from kvfloor.methods.stores.fused_numba import (
    HIDDEN,
    TILE,
    address,
    addresses,
    compiled,
    exponential,
    fetch,
    instruction,
    largest,
    level,
    scaled_onto,
    short_float,
    turn_words,
)

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

_LANES = 16
_INDEX, _SHORT, _BYTE = ir.IntType(32), ir.IntType(16), ir.IntType(8)
_NUMBERS, _INDICES, _PAIRS = (ir.VectorType(t, n) for t, n in ((ir.FloatType(), 16), (_INDEX, 16), (_SHORT, 32)))
_BYTES = ir.VectorType(_BYTE, 64)


def _features() -> set[str]:
    """Return the processor's features for which numba compiles."""
    if config.CPU_NAME is not None:
        return {part[1:] for part in (config.CPU_FEATURES or "").split(",") if part.startswith("+")}
    return {name for name, there in binding.get_host_cpu_features().items() if there}


_HAS = _features()


# ---- vector operations ----------------------------------------------------------------------------------------------


def _splat(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INDEX, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_INDEX, count), [0] * count))


def _pair_products(builder: Any, codes: Any, pair: Any) -> Any:
    """Return, for 16 lanes of two 16-bit codes each, their products with the two 16-bit numbers of `pair`, added."""
    factor = _splat(builder, pair, _LANES)
    if "avx512bw" in _HAS:
        kind = ir.FunctionType(_INDICES, [_PAIRS, _PAIRS])
        multiply = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.pmaddw.d.512")
        return builder.call(multiply, [builder.bitcast(codes, _PAIRS), builder.bitcast(factor, _PAIRS)])
    half = ir.Constant(_INDICES, [16] * _LANES)
    low, upper = builder.and_(codes, ir.Constant(_INDICES, [0xFFFF] * _LANES)), builder.lshr(codes, half)
    first = builder.ashr(builder.shl(factor, half), half)
    return builder.add(builder.mul(low, first), builder.mul(upper, builder.ashr(factor, half)))


@instruction
def _code_products(
    context: Any, words: Any, fine: Any, at: Any, counts: Any, extra: Any, factors: Any, first: Any, many: Any, out: Any
) -> Any:
    """Write the sums of codes times factors, for 16 tokens and `many` queries from `first` on, as two integers each.

    words, fine  uint32 (count * TILE), word j of token t at j TILE + t: 4 codes of 8 bits, 32 / extra of extra bits
    at           the first token
    counts       (number of words, number of fine words)
    factors      int16 (m, 2, width) as `_fold` writes them
    out          int32 (m, 2, TILE), the sums with the upper and the lower halves of the factors
    """
    del context
    if not isinstance(many, types.IntegerLiteral):
        return None
    number = many.literal_value

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        coarse, loud, given, result = addresses(target, builder, signature, arguments, 0, 1, 5, 8)
        whole = arguments[2].type
        full, short = cgutils.unpack_tuple(builder, arguments[3], 2)
        shape = cgutils.create_struct_proxy(signature.args[5])(target, builder, arguments[5]).shape
        width = builder.lshr(cgutils.unpack_tuple(builder, shape)[2], ir.Constant(whole, 1))  # in pairs
        pairs = builder.bitcast(given, _INDEX.as_pointer())
        starts = []
        for i in range(number):
            row = builder.mul(builder.add(arguments[6], ir.Constant(whole, i)), ir.Constant(whole, 2))
            starts += [builder.mul(builder.add(row, ir.Constant(whole, half)), width) for half in range(2)]
        zero = ir.Constant(_INDICES, [0] * _LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in starts]

        def add(codes: Any, pair: Any) -> None:
            for start, total in zip(starts, totals, strict=True):
                factor = builder.load(builder.gep(pairs, [builder.add(start, pair)]))
                builder.store(builder.add(builder.load(total), _pair_products(builder, codes, factor)), total)

        def load(data: Any, word: Any) -> Any:
            place = builder.add(builder.mul(word, ir.Constant(whole, TILE)), arguments[2])
            return builder.load(address(builder, data, place, _INDICES), align=4)

        mask = ir.Constant(_INDICES, [0x00FF00FF] * _LANES)
        with cgutils.for_range(builder, full) as loop:
            four = load(coarse, loop.index)
            add(builder.and_(four, mask), loop.index)
            odd = builder.and_(builder.lshr(four, ir.Constant(_INDICES, [8] * _LANES)), mask)
            add(odd, builder.add(full, loop.index))
        bits = builder.trunc(arguments[4], _INDEX)
        each = builder.sdiv(ir.Constant(whole, 16), builder.select(
            builder.icmp_signed("==", arguments[4], ir.Constant(arguments[4].type, 0)), ir.Constant(whole, 16), arguments[4]))
        ones = builder.sub(builder.shl(ir.Constant(_INDEX, 1), bits), ir.Constant(_INDEX, 1))
        both = _splat(builder, builder.or_(ones, builder.shl(ones, ir.Constant(_INDEX, 16))), _LANES)
        base = builder.add(full, full)
        with cgutils.for_range(builder, short) as outer:
            word = load(loud, outer.index)
            begin = builder.add(base, builder.mul(outer.index, each))
            with cgutils.for_range(builder, each) as inner:
                by = _splat(builder, builder.mul(bits, builder.trunc(inner.index, _INDEX)), _LANES)
                add(builder.and_(builder.lshr(word, by), both), builder.add(begin, inner.index))
        for n, total in enumerate(totals):
            i = builder.add(arguments[6], ir.Constant(whole, n // 2))
            place = builder.add(builder.mul(i, ir.Constant(whole, 2 * TILE)), ir.Constant(whole, n % 2 * TILE))
            place = builder.add(place, arguments[2])
            builder.store(builder.load(total), address(builder, result, place, _INDICES), align=4)
        return target.get_dummy_value()

    integer = types.intp
    pair = types.UniTuple(integer, 2)
    return types.void(words, fine, integer, pair, integer, factors, integer, many, out), code


@instruction
def _look_up_bytes(context: Any, packed: Any, at: Any, table: Any, planes: Any, out: Any, to: Any) -> Any:
    """Write the levels of the 64 bytes from packed[at] on to out[to .. to + 63], that of byte c where `_lane` says.

    table   float32 (256), the level of each code; table[255 - c] = -table[c]
    planes  uint8 (3, 128), the three upper bytes of table[128 + i], the lowest of them first; the fourth byte is 0
    """
    del context

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, levels, parts, into = addresses(target, builder, signature, arguments, 0, 2, 3, 4)
        at, to, whole = arguments[1], arguments[5], arguments[1].type
        if "avx512vbmi" not in _HAS:
            for c in range(64):
                byte = builder.zext(builder.load(builder.gep(source, [builder.add(at, ir.Constant(whole, c))])), whole)
                number = builder.load(builder.gep(levels, [byte]))
                builder.store(number, builder.gep(into, [builder.add(to, ir.Constant(whole, _lane_of(c)))]))
            return target.get_dummy_value()
        codes = builder.load(address(builder, source, at, _BYTES), align=1)
        none = ir.Constant(_BYTES, [0] * 64)
        upper = builder.icmp_signed("<", codes, none)
        index = builder.select(upper, codes, builder.xor(codes, ir.Constant(_BYTES, [255] * 64)))
        kind = ir.FunctionType(_BYTES, [_BYTES, _BYTES, _BYTES])
        choose = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.qi.512")

        def looked_up(plane: int) -> Any:
            low, high = (
                builder.load(address(builder, parts, ir.Constant(whole, 128 * plane + 64 * i), _BYTES), align=1)
                for i in range(2)
            )
            return builder.call(choose, [low, index, high])

        def unpacked(kind: Any, one: Any, two: Any, start: int) -> Any:
            size = kind.count // 4  # entries of a 128-bit lane
            picked = []
            for lane in range(4):
                for i in range(size // 2):
                    entry = lane * size + start * size // 2 + i
                    picked += [entry, kind.count + entry]
            return builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(_INDEX, kind.count), picked))

        sign = builder.select(upper, none, ir.Constant(_BYTES, [128] * 64))
        first, second, third = looked_up(0), looked_up(1), builder.or_(looked_up(2), sign)
        for half in range(2):
            lower = builder.bitcast(unpacked(_BYTES, none, first, half), _PAIRS)
            above = builder.bitcast(unpacked(_BYTES, second, third, half), _PAIRS)
            for part in range(2):
                numbers = builder.bitcast(unpacked(_PAIRS, lower, above, part), _NUMBERS)
                start = builder.add(to, ir.Constant(whole, 16 * (2 * half + part)))
                builder.store(numbers, address(builder, into, start, _NUMBERS), align=4)
        return target.get_dummy_value()

    return types.void(packed, types.intp, table, planes, out, types.intp), code


def _lane_of(c: int) -> int:
    """Return where `_look_up_bytes` writes the level of byte c of 64."""
    return c % 16 // 4 * 16 + c // 16 * 4 + c % 4


@compiled
def lane(channel):
    """Return where a channel's number is among those of a token, as `_look_up_bytes` writes them."""
    c = channel % 64
    return channel - c + c % 16 // 4 * 16 + c // 16 * 4 + c % 4


@instruction
def _weighted(context: Any, numbers: Any, weights: Any, first: Any, many: Any, column: Any, out: Any) -> Any:
    """Add a tile's numbers, 32 channels from `column` on, weighted by rows first .. first + many - 1 of weights, to out.

    numbers  (TILE * w), weights (n, TILE), out (n, w)
    """
    del context
    if not isinstance(many, types.IntegerLiteral):
        return None
    number = many.literal_value

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, given, result = addresses(target, builder, signature, arguments, 0, 1, 5)
        shape = cgutils.create_struct_proxy(signature.args[5])(target, builder, arguments[5]).shape
        width = cgutils.unpack_tuple(builder, shape)[1]
        first, column, whole = arguments[2], arguments[4], arguments[2].type

        def place(i: int, half: int) -> Any:
            row = builder.mul(builder.add(first, ir.Constant(whole, i)), width)
            entry = builder.add(builder.add(row, column), ir.Constant(whole, half * _LANES))
            return address(builder, result, entry, _NUMBERS)

        totals = [
            cgutils.alloca_once_value(builder, builder.load(place(i, half), align=4))
            for i in range(number)
            for half in range(2)
        ]
        with cgutils.for_range(builder, ir.Constant(whole, TILE)) as loop:
            start = builder.add(builder.mul(loop.index, width), column)
            vectors = [
                builder.load(address(builder, source, builder.add(start, ir.Constant(whole, half * _LANES)), _NUMBERS), align=4)
                for half in range(2)
            ]
            for i in range(number):
                row = builder.mul(builder.add(first, ir.Constant(whole, i)), ir.Constant(whole, TILE))
                factor = builder.load(builder.gep(given, [builder.add(row, loop.index)]))
                for half in range(2):
                    total = totals[2 * i + half]
                    builder.store(scaled_onto(builder, builder.load(total), factor, vectors[half]), total)
        for i in range(number):
            for half in range(2):
                builder.store(builder.load(totals[2 * i + half]), place(i, half), align=4)
        return target.get_dummy_value()

    return types.void(numbers, weights, types.intp, many, types.intp, out), code


# ---- the first time: logits and weights -----------------------------------------------------------------------------


@compiled(fast=False)
def _ranges(low, high, span, row, page, begin, wide):
    """Write the start and the width of each channel's range, (d), to the bit as `codes.ranges` computes them."""
    from_low, by_low, from_high, by_high = span[row, page, 0], span[row, page, 1], span[row, page, 2], span[row, page, 3]
    for c in range(len(begin)):
        begin[c] = from_low + np.float32(low[row, page, c]) * by_low
        end = from_high + np.float32(high[row, page, c]) * by_high
        wide[c] = end - begin[c] if end > begin[c] else np.float32(0.0)


@compiled
def _order(wide, rank, order):
    """Write the indices of the channels by falling width to order (d), equal ones in their order."""
    d, total = len(wide), 0
    for c in range(d):
        rank[c] = 0
    for k in range(d):
        width = wide[k]
        for c in range(d):
            rank[c] += np.int32(width > wide[c])
    for c in range(d):
        total += rank[c]
    if total != d * (d - 1) // 2:  # some are equal
        for k in range(d):
            for c in range(k + 1, d):
                rank[c] += np.int32(wide[k] == wide[c])
    for c in range(d):
        order[rank[c]] = c


@compiled
def _fold(q, r, scale, extra, begin, wide, step, most, order, folded, whole, factors, unit, shift, half):
    """Fold a page's ranges into the queries of row r of q (r, m, d).

    begin, wide, order  (d) what `_ranges` and `_order` wrote. step, most (d) and folded, whole (d): scratch
    extra    bits that the first d // 2 channels of the order have beyond 8
    factors  int16 (m, 2, width): upper and lower halves of the integers that codes are multiplied with, those of the
             even channels, then of the odd ones, then of the channels with extra bits, in the order in which
             `_code_products` reads pairs
    unit     (m) what an integer counts; shift (m) products with the starts of the ranges
    half     (m) bound on the error of a logit from half a step of every channel
    """
    d = len(begin)
    for c in range(d):
        most[c] = np.float32(255.0)
    if extra > 0:
        for n in range(d // 2):
            most[order[n]] = np.float32((1 << (8 + extra)) - 1)
    for c in range(d):
        step[c] = wide[c] / most[c]
    each = 16 // extra if extra > 0 else 1
    for i in range(len(unit)):
        start, error, top = 0.0, 0.0, 0.0
        for c in range(d):
            factor = np.float64(q[r, i, c]) * scale
            start += factor * np.float64(begin[c])
            folded[c] = factor * np.float64(step[c])
            error += abs(folded[c])
        shift[i], half[i] = start, error / 2
        for c in range(d):
            top = max(top, abs(folded[c]) * np.float64(most[c] + np.float32(1.0)))
        one = top / 256.0 * 2.0**-29
        unit[i] = one if one > 0 else 1.0
        by = 1.0 / unit[i]
        for c in range(d):
            whole[c] = np.int32(math.floor(folded[c] * by + 0.5))
        for n in range(d // 2 if extra > 0 else 0):  # pair k of a word has the codes k and k + each
            word, k = n // (2 * each), n % (2 * each)
            to = d + 2 * (word * each + k % each) + k // each
            factors[i, 0, to] = np.int16(whole[order[n]] >> 15)
            factors[i, 1, to] = np.int16(whole[order[n]] & 32767)
        if extra > 0:
            for n in range(d // 2):
                whole[order[n]] <<= extra
        for c in range(d // 2):
            factors[i, 0, c] = np.int16(whole[2 * c] >> 15)
            factors[i, 1, c] = np.int16(whole[2 * c] & 32767)
            factors[i, 0, d // 2 + c] = np.int16(whole[2 * c + 1] >> 15)
            factors[i, 1, d // 2 + c] = np.int16(whole[2 * c + 1] & 32767)


@compiled
def _scaled(products, unit, shift, softcap, logits, at):
    """Write a tile's logits to logits[i, at ..] from its `_tile_products`."""
    for i in range(len(unit)):
        upper, lower, start = np.float32(unit[i] * 32768.0), np.float32(unit[i]), np.float32(shift[i])
        for t in range(TILE):
            logits[i, at + t] = (
                np.float32(products[i, 0, t]) * upper + np.float32(np.uint32(products[i, 1, t])) * lower + start
            )
        if softcap > 0:
            for t in range(TILE):
                logits[i, at + t] = np.float32(softcap * math.tanh(np.float64(logits[i, at + t]) / softcap))


@compiled
def _tile_products(words, fine, full, short, extra, factors, m, out):
    """Write the products of a tile's codes with all m queries' factors to out: `_code_products`."""
    for t in range(0, TILE, 16):
        i = 0
        while i < m:
            if m - i >= 4:
                _code_products(words, fine, t, (full, short), extra, factors, i, 4, out)
                i += 4
            elif m - i == 3:
                _code_products(words, fine, t, (full, short), extra, factors, i, 3, out)
                i += 3
            elif m - i == 2:
                _code_products(words, fine, t, (full, short), extra, factors, i, 2, out)
                i += 2
            else:
                _code_products(words, fine, t, (full, short), extra, factors, i, 1, out)
                i += 1


@compiled
def _exponentials(x, i, n, top):
    """Turn the logits x[i, :n] into weights relative to `top`; return their sum and the sum of their squares."""
    mass, square = 0.0, 0.0
    for tile in range(0, n, TILE):
        one, two = np.float32(0.0), np.float32(0.0)
        for t in range(tile, tile + TILE):
            away = x[i, t] - top
            weight = np.float32(0.0) if away < np.float32(LEAST) else exponential(max(away, np.float32(LEAST)))
            x[i, t] = weight
            one += weight
            two += weight * weight
        mass += np.float64(one)
        square += np.float64(two)
    return mass, square


@compiled
def _lighter(x, i, n, limit):
    """Return how many weights x[i, :n] are above the limit, and the sum of the squares of the others."""
    count, square = 0, 0.0
    for tile in range(0, n, TILE):
        some, two = np.int32(0), np.float32(0.0)
        for t in range(tile, tile + TILE):
            above = x[i, t] > limit
            some += np.int32(above)
            two += np.float32(0.0) if above else x[i, t] * x[i, t]
        count += some
        square += np.float64(two)
    return count, square


@compiled
def _limit(x, i, n, square):
    """Return a weight such that at most HEAVY of x[i, :n] are above it, and those stand out; square: of all of them."""
    limit, before = np.float32(math.sqrt(square / HEAVY)), -1
    for _ in range(4):
        count, rest = _lighter(x, i, n, limit)
        if count == before:
            break
        lower = np.float32(math.sqrt(rest / HEAVY))
        if _lighter(x, i, n, lower)[0] > HEAVY:
            break
        limit, before = lower, count
    return limit


# ---- the second time: values ----------------------------------------------------------------------------------------


@compiled
def _decoded(packed, start, dv, table, planes, numbers, norms):
    """Write the levels of a tile's values, (TILE * dv), and their norms (TILE), without the values' scales."""
    for at in range(0, TILE * dv, 64):
        _look_up_bytes(packed, start + at, table, planes, numbers, at)
    for t in range(TILE):
        total = np.float32(0.0)
        for c in range(dv):
            total += numbers[t * dv + c] * numbers[t * dv + c]
        norms[t] = math.sqrt(total)


@compiled
def _add_values(numbers, weights, dv, out):
    """Add a tile's numbers, weighted by weights (n, TILE), to out (n, dv)."""
    n = len(weights)
    for c in range(0, dv, 32):
        i = 0
        while i < n:
            if n - i >= 8:
                _weighted(numbers, weights, i, 8, c, out)
                i += 8
            elif n - i >= 6:
                _weighted(numbers, weights, i, 6, c, out)
                i += 6
            elif n - i >= 4:
                _weighted(numbers, weights, i, 4, c, out)
                i += 4
            else:
                _weighted(numbers, weights, i, 2, c, out)
                i += 2


@compiled
def _weigh(x, at, limit, norms, scales, radii, growth, weights, sums):
    """Write the weights of a tile's values to weights (2 m, TILE), and add to sums (m, 5).

    x (m, slots) weights of tokens; growth (m) bounds on exp(eta) - 1 in this page
    weights  first times the values' scales; then squared, times the scales, 0 for heavy tokens
    sums     of w |v| and (1 + growth) w radius; and, of the tokens that are not heavy, of w^2 |v|^2, of w^2, and of
             (1 + growth)^2 w^2
    """
    m = len(limit)
    for i in range(m):
        a, b, c, e = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for t in range(TILE):
            w = x[i, at + t]
            light = np.float32(0.0) if w > limit[i] else w * w
            size = scales[t] * norms[t]
            weights[i, t] = w * scales[t]
            weights[m + i, t] = light * scales[t]
            a += w * size
            b += w * radii[t]
            c += light * size * size
            e += light
        grown = 1.0 + growth[i]
        sums[i, 0] += np.float64(a)
        sums[i, 1] += grown * np.float64(b)
        sums[i, 2] += np.float64(c)
        sums[i, 3] += np.float64(e)
        sums[i, 4] += grown * grown * np.float64(e)


@compiled
def _flush(part, total):
    """Add part (n, w), float32, to total (n, w), float64, and clear it."""
    for i in range(part.shape[0]):
        for c in range(part.shape[1]):
            total[i, c] += np.float64(part[i, c])
            part[i, c] = np.float32(0.0)


# ---- the bound ------------------------------------------------------------------------------------------------------


@compiled(fast=False)
def _gram(q, r, i, scale, key_gram, row, grown):
    """Return a bound on the root of the sum of squared errors of logits, from the sums of the keys' residuals."""
    d = q.shape[2]
    square, norm, trace = 0.0, 0.0, 0.0
    for c in range(d):
        part = 0.0
        for e in range(d):
            part += np.float64(key_gram[row, c, e]) * np.float64(q[r, i, e])
        square += part * np.float64(q[r, i, c])
        norm += np.float64(q[r, i, c]) ** 2
        trace += np.float64(key_gram[row, c, c])
    return scale * math.sqrt(max(square, 0.0) + grown * norm * trace)


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


@compiled
def _sum_fresh(q, r, i, scale, softcap, keys, values, row, places, count, logits, sizes):
    """Write the logits of the uncoded tokens at `places` of a row to logits[i]; return their keys' largest norm.

    sizes (tokens): their values' norms.
    """
    d, dv, widest = keys.shape[2], values.shape[2], 0.0
    for f in range(count):
        at = places[f]
        total, square, size = 0.0, 0.0, 0.0
        for c in range(d):
            total += np.float64(q[r, i, c]) * np.float64(keys[row, at, c])
            square += np.float64(keys[row, at, c]) * np.float64(keys[row, at, c])
        for c in range(dv):
            size += np.float64(values[row, at, c]) * np.float64(values[row, at, c])
        total *= scale
        logits[i, f] = softcap * math.tanh(total / softcap) if softcap > 0 else total
        sizes[f] = math.sqrt(size)
        widest = max(widest, square)
    return math.sqrt(widest)


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
                     levels as `_look_up_bytes` takes them
    radius           (slots,) bounds on the norms of the values' residuals, the bits of bfloat16
    key_gram, excess, reach, operator              what `Hot` holds; gram_rounding: allowance for key_gram, relative
    turn             (dv, dv) the rotation of values
    Writes mean (rows, m, dv), and log_mass, error, spread and largest (rows, m).
    """
    m, d, dv = q.shape[1], q.shape[2], mean.shape[2]
    full, short, key_bytes = d // 4, key_fine.shape[1], key_packed.shape[1]
    keys, values, masked = key_packed.ravel(), value_packed.ravel(), hide.shape[0] > 0
    words, fine = np.empty(d * TILE // 4, np.uint32), np.empty(max(1, short) * TILE, np.uint32)
    begins, wide, step, most = np.empty((4, d), np.float32)
    rank, whole, order = np.empty(d, np.int32), np.empty(d, np.int32), np.empty(d, np.int64)
    folded, factors = np.empty(d), np.zeros((m, 2, d + (d // 2 if extra > 0 else 0)), np.int16)
    unit, shift, half, gram, norm, rounding = np.empty((6, m))
    products = np.empty((m, 2, TILE), np.int32)
    numbers, norms = np.empty(TILE * dv, np.float32), np.empty(TILE, np.float32)
    scales, radii, live = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.bool_)
    weights, part, total = np.empty((2 * m, TILE), np.float32), np.zeros((2 * m, dv), np.float32), np.empty((2 * m, dv))
    sums, growth, limit = np.empty((m, 5)), np.empty(m), np.empty(m, np.float32)
    heavy, heavies = np.empty((m, HEAVY), np.int64), np.empty(m, np.int64)
    each, own, apart_each, square = np.empty(HEAVY), np.empty(HEAVY), np.empty(HEAVY), np.empty(HEAVY)
    apart = np.empty(m)
    sorted_each, sorted_own, by_size = np.empty(HEAVY), np.empty(HEAVY), np.empty(HEAVY, np.int64)
    places = np.empty(first + ring, np.int64)
    fresh_logits, fresh_sizes = np.empty((m, first + ring)), np.empty(first + ring)
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
        for i in range(m):
            square_sum = 0.0
            for c in range(d):
                square_sum += np.float64(q[r, i, c]) ** 2
            norm[i] = scale * math.sqrt(square_sum)
            size = _sum_fresh(q, r, i, scale, softcap, fresh_k, fresh_v, r, places, fresh, fresh_logits, fresh_sizes)
            fixed = UNIT * (16.0 - LEAST + 8.0 * softcap)
            rounding[i] = UNIT * (12.0 + d * (1 << extra) / 64.0 + d / 64.0) * norm[i] * reach[r] + fixed
            half_rounding = UNIT * norm[i] * size + fixed
            gram[i] = _gram(q, r, i, scale, key_gram, r, gram_rounding) * (1 + 1e-6)
            wild[i] = not norm[i] * max(np.float64(reach[r]), size) < 1e6
            apart[i] = half_rounding  # of the uncoded tokens
            top[i] = HIDDEN
        for page in range(pages):
            _ranges(low, high, span, r, page, begins, wide)
            if extra > 0:
                _order(wide, rank, order)
            _fold(q, r, scale, extra, begins, wide, step, most, order, folded, whole, factors, unit, shift, half)
            for i in range(m):
                doubt[i, page] = min((half[i] + norm[i] * excess[r]) * (1 + 1e-6), gram[i]) + rounding[i]
            for start in range(page * group, (page + 1) * group, TILE):
                place = offset[r] + start
                turn_words(keys, place * key_bytes, key_bytes, 4, full, words)
                for w in range(short):
                    for t in range(TILE):
                        fine[w * TILE + t] = key_fine[place + t, w]
                _tile_products(words, fine, full, short, extra, factors, m, products)
                _scaled(products, unit, shift, softcap, x, start)
                for i in range(m):
                    for t in range(start, min(first, start + TILE)):
                        x[i, t] = HIDDEN
                    if masked:
                        for t in range(start, start + TILE):
                            x[i, t] = HIDDEN if hide[r, i, t] else x[i, t]
                    best = top[i]
                    for t in range(start, start + TILE):
                        best = max(best, x[i, t])
                    top[i] = best
        for i in range(m):
            if wild[i]:
                continue
            for f in range(fresh):
                p = f if f < min(first, count[r]) else n + f - min(first, n)
                if masked and hide[r, i, p]:
                    fresh_logits[i, f] = HIDDEN
                top[i] = max(top[i], np.float32(fresh_logits[i, f]))
            mass[i], whole_square = _exponentials(x, i, n, top[i])
            limit[i] = _limit(x, i, n, whole_square)
            heavies[i] = 0
            largest[r, i] = np.float32(0.0)
        longest = 0.0
        total[:] = 0.0
        sums[:] = 0.0
        for start in range(0, n, TILE):
            place = offset[r] + start
            _decoded(values, place * dv, dv, table, planes, numbers, norms)
            least = np.float32(0.0)
            for t in range(TILE):
                dead = start + t < first
                scales[t] = np.float32(0.0) if dead else short_float(value_scale[place + t])
                radii[t] = np.float32(0.0) if dead else short_float(radius[place + t])
            for t in range(TILE):
                size = scales[t] * norms[t]
                longest = max(longest, np.float64(size + radii[t]))
                least = max(least, size * np.float32(1 - UNIT * (4 * dv + 64)) - radii[t])
            for i in range(m):
                growth[i] = math.expm1(min(doubt[i, start // group], DOUBT))
                if not masked:
                    largest[r, i] = max(largest[r, i], least)
                else:
                    for t in range(TILE):
                        if not hide[r, i, start + t]:
                            size = scales[t] * norms[t] * np.float32(1 - UNIT * (4 * dv + 64)) - radii[t]
                            largest[r, i] = max(largest[r, i], size)
            _weigh(x, start, limit, norms, scales, radii, growth, weights, sums)
            _add_values(numbers, weights, dv, part)
            if start % CHUNK == CHUNK - TILE:
                _flush(part, total)
            for i in range(m):
                found = False
                for t in range(TILE):
                    found |= x[i, start + t] > limit[i]
                if found:
                    for t in range(TILE):
                        if x[i, start + t] > limit[i] and heavies[i] < HEAVY:
                            heavy[i, heavies[i]] = start + t
                            heavies[i] += 1
        _flush(part, total)
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
            fresh_mass, fresh_size, fresh_largest = 0.0, 0.0, np.float32(0.0)
            plain[:] = 0.0
            for f in range(fresh):
                away = np.float32(fresh_logits[i, f]) - top[i]
                if away >= np.float32(LEAST):
                    weight = np.float64(exponential(away))
                    fresh_mass += weight
                    fresh_size += weight * fresh_sizes[f]
                    for c in range(dv):
                        plain[c] += weight * np.float64(fresh_v[r, places[f], c])
                if fresh_logits[i, f] > HIDDEN:
                    fresh_largest = max(fresh_largest, np.float32(fresh_sizes[f] * (1 - UNIT)))
                    longest = max(longest, fresh_sizes[f])
            whole_mass = mass[i] + fresh_mass
            for a in range(dv):
                moved = total[i, lane(a)]
                for b in range(dv):
                    moved += turn[a, b] * plain[b]
                turned[a] = moved / whole_mass
            center_square = 0.0
            for a in range(dv):
                center[lane(a)] = turned[a]
                center_square += turned[a] * turned[a]
            long = math.sqrt(center_square)
            for b in range(dv):
                plain[b] = 0.0
            for a in range(dv):
                for b in range(dv):
                    plain[b] += turn[a, b] * turned[a]
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
            floor = count[r] * math.exp(LEAST)
            log = np.float64(top[i]) + math.log(whole_mass)
            terms = UNIT * (CHUNK / 2 + 64)
            told = terms + 4 * UNIT * (abs(log) + 1)
            loose = (1 + UNIT * (count[r] / 64 + 4 * dv + 256)) * (1 + told)
            off = (about + min(by_norm, by_radius) + floor * (longest + long)) / whole_mass
            off = (off + terms * lengths * math.exp(widest)) * loose
            wide_off = ((over + floor) / whole_mass + told) * loose
            checked = off + wide_off + by_norm + by_radius + long
            if widest >= DOUBT or not checked < np.inf:
                off = wide_off = np.inf
            log_mass[r, i] = np.float32(log)
            error[r, i], spread[r, i] = np.float32(off), np.float32(wide_off)
            largest[r, i] = max(largest[r, i], fresh_largest)
