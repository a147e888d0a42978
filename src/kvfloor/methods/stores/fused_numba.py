"""Compute attention over packed codes, read in place: a numba kernel for CPUs.

A row is one (batch item, kv head) stream, a slot the place of one held token in flat tensors over all rows, a code the
small integer that stands for a number. The module `fused` says when the kernel is used, and `coded` defines the same
attention in torch. Import this module only where numba is installed. It is one file, as numba's cache on disk notices
changes of a function's own file alone; files that build on it name it in BUILT_ON (`compiled`).

The kernel goes through a row's slots in tiles of TILE. Codes become words: a word has 8 codes of 4 bits, those of
channels 8j .. 8j + 7 of one token. For codes above 4 bits a second word has the upper bits. Keys' words are laid out
with neighbouring tokens beside each other, so that one vector instruction handles one channel of many tokens; values'
words are those of one token after the other.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir  # pyright: ignore[reportMissingImports]
from numba import njit, types  # pyright: ignore[reportMissingImports]
from numba.core import cgutils  # pyright: ignore[reportMissingImports]
from numba.extending import intrinsic  # pyright: ignore[reportMissingImports]

TILE = 32
"""Slots that are read at a time."""
CHUNK = 4096
"""Slots of a row that are read one after the other; the results of a row's chunks are joined in their order."""
HIDDEN = np.float32(-1e30)
"""Stand-in for the logit of a token that is not seen: finite, so that the compiler may reorder sums."""

_LANES = 16
_INDEX = ir.IntType(32)
_INDICES = ir.VectorType(_INDEX, _LANES)
_NUMBERS = ir.VectorType(ir.FloatType(), _LANES)
_SPREADING: dict[int, list[tuple[int, int]]] = {
    1: [(12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)],
    2: [(8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)],
    4: [],
    8: [],
}
"""Shifts and masks that spread 8 codes of so many bits over 8 places of 4 bits."""
_NARROWING = [(4, 0x00FF00FF00FF00FF), (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)]
"""Shifts and masks that gather the lower 4 bits of 8 bytes."""
_FLAGS = {"reassoc", "contract", "nsz", "arcp"}


@lru_cache(maxsize=8)
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def compiled(function: Any = None, signature: Any = None, fast: bool = True) -> Any:
    """Compile a function: now if it has a signature, and kept for later processes if there is a folder to write to.

    fast: True if sums may be reordered, and products and sums rounded as one. A compiled function is kept until its
    file changes, or one of those that its module names in BUILT_ON.
    """
    if function is None:
        return lambda found: compiled(found, signature, fast)
    options = {"fastmath": _FLAGS if fast else False, "nogil": True, "error_model": "numpy"}
    try:
        made = njit(cache=True, **options)(function)
        kept = made._cache._cache_file
        kept._source_stamp = (kept._source_stamp, *map(_digest, function.__globals__.get("BUILT_ON", ())))
    except RuntimeError:  # no folder that can be written
        made = njit(**options)(function)
    if signature is not None:
        made.compile(signature.args)
        made.disable_compile()
    return made


# ---- vector operations that numba does not have ---------------------------------------------------------------------


def instruction(function: Any) -> Any:
    """Make a function of compiled code of one that writes its LLVM instructions; calls leave out its `context`."""
    return intrinsic(function)


@instruction
def as_float(context: Any, bits: Any) -> Any:
    """Return the float32 whose 32 bits are those of an integer."""
    del context

    def code(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), code


def addresses(target: Any, builder: Any, signature: Any, arguments: Any, *which: int) -> list[Any]:
    """Return the addresses of the numbers of some arguments that are arrays."""
    proxies = (cgutils.create_struct_proxy(signature.args[i])(target, builder, arguments[i]) for i in which)
    return [proxy.data for proxy in proxies]


def address(builder: Any, data: Any, index: Any, kind: Any) -> Any:
    """Return the address of entry `index` of the numbers at `data`, as that of a vector of type `kind`."""
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def permutes_halves(features: str) -> bool:
    """Return True if a processor with these features permutes 8 numbers at once, and not 16."""
    return "+avx2" in features and "+avx512f" not in features


def _levels(target: Any, builder: Any, words: Any, shifts: list[list[int]], table: Any) -> list[Any]:
    """Return vectors of levels: lane i of vector p has that of the 4 bits from shifts[p][i] on in lane i of words."""
    if permutes_halves(target.codegen().magic_tuple()[2]):  # features of the processor that is compiled for
        return _levels_by_halves(builder, words, shifts, table)
    entries = builder.load(builder.bitcast(table, _NUMBERS.as_pointer()), align=4)
    found = []
    for shift in shifts:
        index = builder.and_(builder.lshr(words, ir.Constant(_INDICES, shift)), ir.Constant(_INDICES, [15] * _LANES))
        vector = ir.Constant(_NUMBERS, ir.Undefined)
        for i in range(_LANES):  # compiled to one permutation where the processor has it
            lane = ir.Constant(_INDEX, i)
            one = builder.extract_element(entries, builder.extract_element(index, lane))
            vector = builder.insert_element(vector, one, lane)
        found.append(vector)
    return found


def _levels_by_halves(builder: Any, words: Any, shifts: list[list[int]], table: Any) -> list[Any]:
    """Do the work of `_levels` on processors whose permutations are of 8 numbers (AVX2)."""
    numbers, indices = ir.VectorType(ir.FloatType(), 8), ir.VectorType(_INDEX, 8)
    start = builder.bitcast(table, numbers.as_pointer())
    entries = [builder.load(builder.gep(start, [_INDEX(half)]), align=4) for half in range(2)]
    lanes = [range(8), range(8, 16)]
    parts = [builder.shuffle_vector(words, words, ir.Constant(indices, list(part))) for part in lanes]
    kind = ir.FunctionType(numbers, [numbers, indices])
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.permps")
    found = []
    for shift in shifts:
        halves = []
        for part, word in zip(lanes, parts, strict=True):
            by = [shift[lane] for lane in part]
            index = builder.lshr(word, ir.Constant(indices, by))  # only the lowest 3 bits count
            lower, upper = (builder.call(permute, [entry, index]) for entry in entries)
            fourth = builder.shl(word, ir.Constant(indices, [28 - x for x in by]))  # the sign
            above = builder.icmp_signed("<", fourth, ir.Constant(indices, [0] * 8))
            halves.append(builder.select(above, upper, lower))
        found.append(builder.shuffle_vector(*halves, ir.Constant(_INDICES, list(range(_LANES)))))
    return found


def scaled_onto(builder: Any, total: Any, factor: Any, vector: Any) -> Any:
    """Return total + factor * vector, for one number as the factor."""
    kind, lane = vector.type, ir.Constant(_INDEX, 0)
    start = builder.insert_element(ir.Constant(kind, ir.Undefined), factor, lane)
    every = ir.Constant(ir.VectorType(_INDEX, kind.count), [0] * kind.count)
    spread = builder.shuffle_vector(start, ir.Constant(kind, ir.Undefined), every)
    return builder.fadd(total, builder.fmul(spread, vector, flags=("contract",)), flags=("contract",))


@instruction
def _look_up(context: Any, words: Any, at: Any, table: Any, out: Any, to: Any) -> Any:
    """Write the levels of the 64 codes in 8 words to out[to .. to + 63], that of code p of word j where `spot` says.

    words are read from entry `at` on of a uint32 or uint8 array; table has 16 levels.
    """
    del context
    half = ir.VectorType(_INDEX, _LANES // 2)

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, levels, into = addresses(target, builder, signature, arguments, 0, 2, 3)
        eight = builder.load(address(builder, source, arguments[1], half), align=1)
        twice = ir.Constant(_INDICES, [*range(8), *range(8)])
        words = builder.shuffle_vector(eight, ir.Constant(half, ir.Undefined), twice)
        shifts = [[4 * p] * 8 + [4 * (p + 4)] * 8 for p in range(4)]
        for p, found in enumerate(_levels(target, builder, words, shifts, levels)):
            start = builder.add(arguments[4], ir.Constant(arguments[4].type, _LANES * p))
            builder.store(found, address(builder, into, start, _NUMBERS), align=4)
        return target.get_dummy_value()

    return types.void(words, types.intp, table, out, types.intp), code


@instruction
def level(context: Any, table: Any, code: Any) -> Any:
    """Return table[code], by a load of its own, which is faster than the processor's loads of many places at once."""
    del context

    def load(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (levels,) = addresses(target, builder, signature, arguments, 0)
        pointer = builder.bitcast(builder.gep(levels, [arguments[1]]), _INDEX.as_pointer())
        return builder.bitcast(builder.load_atomic(pointer, "unordered", 4), ir.FloatType())

    return types.float32(table, types.intp), load


@instruction
def _look_up_eight(context: Any, packed: Any, at: Any, table: Any, out: Any, to: Any) -> Any:
    """Write the levels of the 8 codes from packed[at] on, of 8 bits, to out: that of code p to out[to + spot(p)]."""
    del context

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, levels, into = addresses(target, builder, signature, arguments, 0, 2, 3)
        start, first = builder.gep(source, [arguments[1]]), builder.gep(into, [arguments[4]])
        for p in range(8):  # loads one by one, as in `level`
            index = builder.zext(builder.load(builder.gep(start, [_INDEX(p)])), arguments[1].type)
            pointer = builder.bitcast(builder.gep(levels, [index]), _INDEX.as_pointer())
            number = builder.bitcast(builder.load_atomic(pointer, "unordered", 4), ir.FloatType())
            builder.store(number, builder.gep(first, [_INDEX(p % 4 * 16 + p // 4 * 8)]))
        return target.get_dummy_value()

    return types.void(packed, types.intp, table, out, types.intp), code


@instruction
def fetch(context: Any, packed: Any, at: Any) -> Any:
    """Ask the processor to bring byte `at` of a uint8 array, and those around it, closer; it need not exist."""
    del context

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (source,) = addresses(target, builder, signature, arguments, 0)
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), flag, flag, flag])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [builder.gep(source, [arguments[1]]), flag(0), flag(3), flag(1)])
        return target.get_dummy_value()

    return types.void(packed, types.intp), code


@instruction
def largest(context: Any, numbers: Any, row: Any) -> Any:
    """Return the largest of numbers[row], TILE of them."""
    del context
    wide = ir.VectorType(ir.FloatType(), TILE)

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (source,) = addresses(target, builder, signature, arguments, 0)
        start = builder.mul(arguments[1], ir.Constant(arguments[1].type, TILE))
        vector = builder.load(address(builder, source, start, wide), align=4)
        kind = ir.FunctionType(ir.FloatType(), [wide])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{TILE}f32")
        return builder.call(reduce, [vector])

    return types.float32(numbers, types.intp), code


@instruction
def _add_products(context: Any, words: Any, at: Any, table: Any, q: Any, column: Any, out: Any, to: Any) -> Any:
    """Add, for each query i, q[i, column + p] times the levels of code p of 16 words to out[i, to .. to + 15], all p.

    words, uint32, are read from index `at` on; table has 16 levels.
    """
    del context

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, levels = addresses(target, builder, signature, arguments, 0, 2)
        asked, result = (cgutils.create_struct_proxy(signature.args[i])(target, builder, arguments[i]) for i in (3, 5))
        loaded = builder.load(address(builder, source, arguments[1], _INDICES), align=4)
        found = _levels(target, builder, loaded, [[4 * p] * _LANES for p in range(8)], levels)
        m, width = cgutils.unpack_tuple(builder, asked.shape)
        length = cgutils.unpack_tuple(builder, result.shape)[1]
        with cgutils.for_range(builder, m) as loop:
            first = builder.add(builder.mul(loop.index, width), arguments[4])
            place = address(builder, result.data, builder.add(builder.mul(loop.index, length), arguments[6]), _NUMBERS)
            even, odd = builder.load(place, align=4), ir.Constant(_NUMBERS, [0.0] * _LANES)
            for p, vector in enumerate(found):
                entry = builder.add(first, ir.Constant(first.type, p))
                factor = builder.load(builder.gep(asked.data, [entry]))
                if p % 2:
                    odd = scaled_onto(builder, odd, factor, vector)
                else:
                    even = scaled_onto(builder, even, factor, vector)
            builder.store(builder.fadd(even, odd), place, align=4)
        return target.get_dummy_value()

    return types.void(words, types.intp, table, q, types.intp, out, types.intp), code


@instruction
def _add_eight(
    context: Any, numbers: Any, at: Any, step: Any, factors: Any, row: Any, first: Any, out: Any, to: Any
) -> Any:
    """Add factors[row, first + k] times numbers[at + step k + lane] to out[row, to + lane], for k < 8, lane < TILE."""
    del context
    wide = ir.VectorType(ir.FloatType(), TILE)

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (source,) = addresses(target, builder, signature, arguments, 0)
        given, result = (cgutils.create_struct_proxy(signature.args[i])(target, builder, arguments[i]) for i in (3, 6))
        at, step, row, first, to = (arguments[i] for i in (1, 2, 4, 5, 7))
        start = builder.add(builder.mul(row, cgutils.unpack_tuple(builder, given.shape)[1]), first)
        into = builder.add(builder.mul(row, cgutils.unpack_tuple(builder, result.shape)[1]), to)
        place = address(builder, result.data, into, wide)
        sums = [builder.load(place, align=4), ir.Constant(wide, [0.0] * TILE)]
        for k in range(8):
            index = ir.Constant(start.type, k)
            factor = builder.load(builder.gep(given.data, [builder.add(start, index)]))
            vector = builder.load(address(builder, source, builder.add(at, builder.mul(step, index)), wide), align=4)
            sums[k % 2] = scaled_onto(builder, sums[k % 2], factor, vector)
        builder.store(builder.fadd(*sums), place, align=4)
        return target.get_dummy_value()

    integer = types.intp
    return types.void(numbers, integer, integer, factors, integer, integer, out, integer), code


@instruction
def _words(context: Any, packed: Any, at: Any, plane: Any, count: Any, above: Any, low: Any, high: Any, to: Any) -> Any:
    """Write `count` words of codes of `plane` bits, which begin at byte `at`, to low[to .. to + count - 1].

    plane, count, above  literals. plane is 1, 2, 4 or 8; with 8, the upper 4 bits go to high. With above > 0, codes are
                         put `above` bits further up, beside those that are in low already
    """
    del context
    if not all(isinstance(x, types.IntegerLiteral) for x in (plane, count, above)):
        return None
    bits, length, shift = plane.literal_value, count.literal_value, above.literal_value
    wide = ir.IntType(64 if bits == 8 else 32)
    whole, result = ir.VectorType(wide, length), ir.VectorType(_INDEX, length)

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, *into = addresses(target, builder, signature, arguments, 0, 5, 6)

        def same(value: int) -> Any:
            return ir.Constant(whole, [value] * length)

        words = builder.load(
            address(builder, source, arguments[1], ir.VectorType(ir.IntType(8 * bits), length)), align=1
        )
        found = [words if 8 * bits == wide.width else builder.zext(words, whole)]
        if bits == 8:
            found = [builder.and_(x, same(0x0F0F0F0F0F0F0F0F)) for x in (words, builder.lshr(words, same(4)))]
            for by, mask in _NARROWING:
                found = [builder.and_(builder.or_(x, builder.lshr(x, same(by))), same(mask)) for x in found]
            found = [builder.trunc(x, result) for x in found]
        for by, mask in _SPREADING[bits]:
            found = [builder.and_(builder.or_(x, builder.shl(x, same(by))), same(mask)) for x in found]
        for part, data in zip(found, into, strict=False):
            place = address(builder, data, arguments[7], result)
            if shift:
                part = builder.or_(builder.shl(part, same(shift)), builder.load(place, align=4))
            builder.store(part, place, align=4)
        return target.get_dummy_value()

    return types.void(packed, types.intp, plane, count, above, low, high, types.intp), code


@instruction
def _transpose(context: Any, words: Any, at: Any, step: Any, out: Any, to: Any, out_step: Any) -> Any:
    """Write out[to + out_step j + i], for i, j < 8, the word j of 8 that follow one another from words[at + step i] on.

    words is a uint32 array, or a uint8 one.
    """
    del context
    whole = ir.VectorType(_INDEX, 8)

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, into = addresses(target, builder, signature, arguments, 0, 3)

        def place(data: Any, start: Any, stride: Any, i: int) -> Any:
            return address(builder, data, builder.add(start, builder.mul(stride, ir.Constant(stride.type, i))), whole)

        rows = [builder.load(place(source, arguments[1], arguments[2], i), align=1) for i in range(8)]
        for size in (4, 2, 1):  # swap the off-diagonal squares of this size
            kept = [i if i & size == 0 else i - size + 8 for i in range(8)]
            moved = [i + size if i & size == 0 else i + 8 for i in range(8)]
            swapped = list(rows)
            for i in range(8):
                if i & size == 0:
                    pair = rows[i], rows[i + size]
                    swapped[i] = builder.shuffle_vector(*pair, ir.Constant(whole, kept))
                    swapped[i + size] = builder.shuffle_vector(*pair, ir.Constant(whole, moved))
            rows = swapped
        for j, row in enumerate(rows):
            builder.store(row, place(into, arguments[4], arguments[5], j), align=4)
        return target.get_dummy_value()

    return types.void(words, types.intp, types.intp, out, types.intp, types.intp), code


# ---- words ----------------------------------------------------------------------------------------------------------


@compiled
def _last_word(packed, at, bits, width, low, high, to):
    """Write the word of a token's last width % 8 channels to low[to] and, for codes above 4 bits, high[to]."""
    lower, upper = 0, 0
    for c in range(width // 8 * 8, width):
        start, found, code = at, 0, 0
        for plane in (8, 4, 2, 1):
            if bits & plane:
                byte = np.int64(packed[start + c * plane // 8])
                code |= ((byte >> (c * plane % 8)) & ((1 << plane) - 1)) << found
                start, found = start + (width * plane + 7) // 8, found + plane
        lower |= (code & 15) << (4 * (c % 8))
        upper |= (code >> 4) << (4 * (c % 8))
    low[to], high[to] = lower, upper


@compiled
def tile_words(packed, start, size, stride, bits, width, low, high, step):
    """Write the words of `size` tokens: low[step t + j] and, for codes above 4 bits, the same of high.

    packed  uint8; token t's codes begin at start + stride t, and lie as `packing.pack` says
    """
    full = width // 8
    many = full // 8 * 8
    twos = (width + 1) // 2 if bits & 4 else 0
    ones = twos + (width + 3) // 4 if bits & 2 else twos
    if bits < 4 and width % 64 == 0:  # the loop below without its branches
        for t in range(size):
            for j in range(0, many, 8):
                _words(packed, start + stride * t + 2 * j, 2, 8, 0, low, high, step * t + j)
                if bits == 3:
                    _words(packed, start + stride * t + ones + j, 1, 8, 2, low, high, step * t + j)
        return
    for t in range(size):
        at, to = start + stride * t, step * t
        two, one, upper = at + twos, at + ones, high if bits & 4 else low
        if bits == 8:
            for j in range(0, many, 8):
                _words(packed, at + 8 * j, 8, 8, 0, low, high, to + j)
            for j in range(many, full):
                _words(packed, at + 8 * j, 8, 1, 0, low, high, to + j)
        if bits & 4:
            for j in range(0, many, 8):
                _words(packed, at + 4 * j, 4, 8, 0, low, high, to + j)
            for j in range(many, full):
                _words(packed, at + 4 * j, 4, 1, 0, low, high, to + j)
        if bits & 2:
            for j in range(0, many, 8):
                _words(packed, two + 2 * j, 2, 8, 0, upper, high, to + j)
            for j in range(many, full):
                _words(packed, two + 2 * j, 2, 1, 0, upper, high, to + j)
        if bits & 3 == 3:
            for j in range(0, many, 8):
                _words(packed, one + j, 1, 8, 2, upper, high, to + j)
            for j in range(many, full):
                _words(packed, one + j, 1, 1, 2, upper, high, to + j)
        elif bits & 1:
            for j in range(0, many, 8):
                _words(packed, one + j, 1, 8, 0, upper, high, to + j)
            for j in range(many, full):
                _words(packed, one + j, 1, 1, 0, upper, high, to + j)
        if width % 8:
            _last_word(packed, at, bits, width, low, high, to + full)


@compiled
def turn_words(words, start, step, size, lanes, out):
    """Write word j < lanes of each token t of a tile, words[start + step t + size j], to out[TILE j + t].

    words is a uint32 array, with size 1, or a uint8 one, with size 4.
    """
    for t in range(0, TILE, 8):
        for j in range(0, lanes, 8):
            _transpose(words, start + step * t + size * j, step, out, TILE * j + t, TILE)


# ---- attention ------------------------------------------------------------------------------------------------------


@compiled
def short_float(bits):
    """Return the bfloat16 number whose bits are those of an int16, in float32."""
    return as_float(np.int32(np.int32(bits) << 16))


@compiled(fast=False)
def exponential(x):
    """Return exp(x) for x <= 0 in float32, to within 2^-22 of it; 0 below -87."""
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # the first product has no rounding
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(0.5)
    p = p * r * r + r + np.float32(1.0)
    power = as_float((np.int32(n) + np.int32(127)) << np.int32(23))
    return np.float32(0.0) if x < np.float32(-87.0) else p * power


@compiled
def spot(channel):
    """Return where a channel's number is among those of a token, as `_look_up` lays them out."""
    word, p = channel // 8, channel % 8
    return word // 8 * 64 + p % 4 * 16 + p // 4 * 8 + word % 8


@compiled
def add_logits(low, high, tall, table, q, words, codes, logits):
    """Add the products of queries q (m, 8 words) with the numbers of a tile of keys to logits (m, TILE).

    low, high  (words * TILE), word j of token t at j TILE + t. tall: True if codes have more than 4 bits
    table      the number of each code, at least 16 of them
    codes      scratch, (8 * TILE)
    """
    for j in range(words):
        at = j * TILE
        if tall:
            for p in range(8):
                shift = np.uint32(4 * p)
                for t in range(TILE):
                    upper = ((high[at + t] >> shift) & np.uint32(15)) << np.uint32(4)
                    codes[p * TILE + t] = level(table, ((low[at + t] >> shift) & np.uint32(15)) | upper)
            for i in range(len(q)):
                _add_eight(codes, 0, TILE, q, i, 8 * j, logits, 0)
        else:
            for t in range(0, TILE, _LANES):
                _add_products(low, at + t, table, q, 8 * j, logits, t)


@compiled
def look_up_words(low, start, size, high, tall, table, words, numbers):
    """Write the numbers of a tile's values, 8 * words for each token, with channels where `spot` says.

    low, high  (TILE * words), word j of token t at t words + j; words is a multiple of 8. Otherwise as in `add_logits`.
               If not tall, low may be uint8 too: its first word is at `start`, the next one `size` entries further
    """
    for at in range(0, TILE * words, 8):
        if tall:
            for p in range(8):
                shift, to = np.uint32(4 * p), 8 * at + p % 4 * 16 + p // 4 * 8
                for j in range(8):
                    upper = ((high[at + j] >> shift) & np.uint32(15)) << np.uint32(4)
                    numbers[to + j] = level(table, ((low[at + j] >> shift) & np.uint32(15)) | upper)
        else:
            _look_up(low, start + size * at, table, numbers, 8 * at)


@compiled
def look_up_bytes(packed, start, size, width, table, words, numbers):
    """Do the work of `look_up_words` for `size` tokens whose codes, of 8 bits, are the bytes from `start` on."""
    for t in range(size):
        at, to = start + width * t, 8 * words * t
        for word in range(width // 8):
            _look_up_eight(packed, at + 8 * word, table, numbers, to + spot(8 * word))
        for c in range(width // 8 * 8, width):
            numbers[to + spot(c)] = level(table, packed[at + c])


@compiled
def add_values(numbers, weights, mean):
    """Add a tile's values, weighted by weights (m, TILE), to mean (m, w), both with channels where `spot` says.

    numbers  (TILE * w), w is a multiple of 64
    """
    width = mean.shape[1]
    for t in range(0, TILE, 8):
        for i in range(len(weights)):
            for c in range(0, width, TILE):
                _add_eight(numbers, t * width + c, width, weights, i, t, mean, c)


@compiled
def weigh(logits, live, factors, highest, masses, mean):
    """Turn a tile's logits (m, TILE) into softmax weights relative to the highest logit so far, times factors (TILE,).

    live  bool (TILE,), False for tokens that no query sees
    Raises highest (m,) where a logit is higher, and scales masses (m,) and mean (m, w) down to it; adds to masses.
    """
    for i in range(len(logits)):
        for t in range(TILE):
            logits[i, t] = logits[i, t] if live[t] else HIDDEN
        before = highest[i]
        top = max(before, largest(logits, i))
        if top > before:
            factor = exponential(before - top)
            highest[i] = top
            masses[i] *= factor
            for c in range(mean.shape[1]):
                mean[i, c] *= factor
        added = np.float32(0.0)
        for t in range(TILE):
            weight = np.float32(0.0) if logits[i, t] <= HIDDEN else exponential(logits[i, t] - top)
            added += weight
            logits[i, t] = np.float32(0.0) if weight == 0 else weight * factors[t]
        masses[i] += added


@compiled
def fold(q, low, high, span, row, group, steps, start, step, folded, shift):
    """Fold a group's middles and steps into the queries q (m, w) of a row: write folded (m, w).

    Write the products of the queries with the middles of the ranges to shift (m). Codes count from the middle, which
    rounds less than counting from the least number.
    low, high (rows, groups, d) and span (rows, groups, 4) are the coded ranges (`ChannelCodes`), steps is 2^bits - 1.
    start, step  scratch, (d)
    """
    d = low.shape[2]
    from_low, by_low, from_high, by_high = span[row, group]
    for c in range(d):
        begin = from_low + np.float32(low[row, group, c]) * by_low
        end = from_high + np.float32(high[row, group, c]) * by_high
        wide = max(end - begin, np.float32(0.0))
        start[c], step[c] = begin + wide * np.float32(0.5), wide / steps
    for i in range(len(folded)):
        total = np.float32(0.0)
        for c in range(d):
            folded[i, c] = q[i, c] * step[c]
            total += q[i, c] * start[c]
        shift[i] = total


_BOOLS, _SHORTS, _FLOATS = types.boolean[:, :, :], types.int16[::1], types.float32[::1]
_BYTES, _INTEGERS, _CUBE = types.uint8[:, ::1], types.int64[::1], types.float32[:, :, ::1]
_SHARED = types.uint8[:, :, ::1]
_KEYS = (types.int64, types.int64, types.boolean, _BYTES, _SHORTS, _FLOATS, _SHARED, _SHARED, _CUBE)
_VALUES = (types.int64, types.int64, _BYTES, _SHORTS, _FLOATS)
_TOKENS = (
    _INTEGERS,
    _INTEGERS,
    _INTEGERS,
    _INTEGERS,
    types.int32[::1],
    types.boolean,
    types.int64,
    types.int64,
    types.int64,
    types.int64,
    _BOOLS,
)
_OUT = (types.float32[:, :, :, ::1], _CUBE, _CUBE, _SHARED)
_MATRIX, _FLOAT = types.float32[:, ::1], types.float32
_SIGNATURE = types.void(types.int64, types.int64, _CUBE, _MATRIX, _FLOAT, _FLOAT, *_TOKENS, *_KEYS, *_VALUES, *_OUT)


@compiled(signature=_SIGNATURE)
def attend_chunks(
    begin,
    stop,
    q,
    bias,
    scale,
    softcap,
    row,
    offset,
    count,
    coded,
    position,
    ordered,
    first,
    group,
    lead,
    ring,
    hide,
    d,
    key_bits,
    linear,
    key_packed,
    key_scale,
    key_table,
    key_low,
    key_high,
    key_range,
    dv,
    value_bits,
    value_packed,
    value_scale,
    value_table,
    mean,
    top,
    mass,
    fresh,
):
    """Compute attention of q over the coded tokens of the chunks begin .. stop - 1, counted row by row.

    q         (r, m, d)
    bias      (r, m), added to the products of coded tokens with the queries
    scale     the factor on products and bias, before the softcap
    softcap   c: a logit x becomes c tanh(x / c); 0: no cap
    row       (r,) index of each row in key_low, key_high and key_range
    offset    (r,) first slot of each row; count: (r,) number of its slots that are read
    coded     (r,) number of tokens before those without codes: `CodedSlots.coded`
    position  (slots,) arrival index of each slot's token; unread if `ordered`, when slot i holds token i
    first     number of a row's first tokens that are never coded. group: tokens that are coded together
    lead      number of tokens that a row's first group lacks: `CodedSlots.lead`; ring: `CodedSlots.ring`
    hide      bool (r, m, slots), True for slots that a query does not see; or empty
    d, key_bits, dv, value_bits   widths and bits of keys and values
    linear    True: keys are coded per channel; key_low, key_high (rows, groups, d) and key_range are their ranges.
              False: each by itself, with the lengths key_scale, the bits of bfloat16
    key_table, value_table        the number that each code stands for; if `linear`, key_table has those of the lower 4
              bits of a code, from the middle, then those of the upper bits
    key_packed, value_packed      (slots, bytes) codes
    Writes mean (r, chunks, m, dv), not yet divided by mass; top and mass (r, chunks, m), the largest logit and the
    softmax mass relative to it; and marks in fresh (r, m, first + ring) the uncoded tokens that a query sees.
    """
    m, chunks = q.shape[1], mean.shape[1]
    words, key_lanes, lanes = (d + 7) // 8, (d + 63) // 64 * 8, (dv + 63) // 64 * 8
    keys_low, keys_high = np.zeros(key_lanes * TILE, np.uint32), np.zeros(key_lanes * TILE, np.uint32)
    low = np.zeros(max(key_lanes, lanes) * TILE, np.uint32)
    high = np.zeros_like(low)
    codes = np.empty(8 * TILE, np.float32)
    numbers = np.zeros(TILE * 8 * lanes, np.float32)
    logits, total = np.empty((m, TILE), np.float32), np.empty((m, 8 * lanes), np.float32)
    highest, masses = np.empty(m, np.float32), np.empty(m, np.float32)
    folded, shift = np.zeros((m, 8 * words), np.float32), np.zeros(m, np.float32)
    asked, raised = np.zeros((m, 8 * words), np.float32), np.empty(m, np.float32)
    begins, widths = np.empty(d, np.float32), np.empty(d, np.float32)
    live, factors = np.empty(TILE, np.bool_), np.zeros(TILE, np.float32)
    all_keys, all_values = key_packed.ravel(), value_packed.ravel()
    key_bytes, value_bytes = key_packed.shape[1], value_packed.shape[1]
    plain_keys, plain_values = key_bits == 4 and d % 64 == 0, value_bits == 4 and dv % 64 == 0  # bytes are words
    steps, masked = np.float32(2**key_bits - 1), hide.shape[0] > 0
    for task in range(begin, stop):
        r, chunk = task // chunks, task % chunks
        for i in range(m):
            highest[i], masses[i] = HIDDEN, np.float32(0.0)
            raised[i] = bias[r, i] * scale
            for c in range(d):
                asked[i, c] = q[r, i, c] * scale
            for c in range(8 * lanes):
                total[i, c] = np.float32(0.0)
        folded_group = -1
        end = min(count[r], (chunk + 1) * CHUNK - lead)
        for tile in range(chunk * CHUNK - lead, end, TILE):
            start = max(tile, 0)
            place, size, found = offset[r] + start, min(tile + TILE, end) - start, False
            inner = ordered and size == TILE and start >= first and start + TILE <= coded[r]
            for t in range(TILE):
                live[t] = inner
            if not inner:
                for t in range(size):
                    came = start + t if ordered else np.int64(position[place + t])
                    if came < first or came >= coded[r]:
                        into = came if came < first else first + came % ring
                        for i in range(m):
                            fresh[r, i, into] = not masked or not hide[r, i, start + t]
                    else:
                        live[t] = found = True
                if not found:
                    continue
            for at in range(0, TILE * key_bytes, 64):
                fetch(all_keys, (place + TILE) * key_bytes + at)
            for at in range(0, TILE * value_bytes, 64):
                fetch(all_values, (place + TILE) * value_bytes + at)
            if plain_keys and size == TILE:
                turn_words(all_keys, place * key_bytes, key_bytes, 4, key_lanes, keys_low)
            else:
                tile_words(all_keys, place * key_bytes, size, key_bytes, key_bits, d, low, high, key_lanes)
                turn_words(low, 0, key_lanes, 1, key_lanes, keys_low)
                if key_bits > 4:
                    turn_words(high, 0, key_lanes, 1, key_lanes, keys_high)
            for i in range(m):
                for t in range(TILE):
                    logits[i, t] = np.float32(0.0)
            if linear:
                if (start + lead) // group != folded_group:
                    folded_group = (start + lead) // group
                    fold(
                        asked, key_low, key_high, key_range, row[r], folded_group, steps, begins, widths, folded, shift
                    )
                add_logits(keys_low, keys_high, False, key_table, folded, words, codes, logits)
                if key_bits > 4:
                    for i in range(m):
                        for c in range(8 * words):
                            folded[i, c] *= np.float32(16.0)
                    add_logits(keys_high, keys_high, False, key_table[16:], folded, words, codes, logits)
                    folded_group = -1
                for i in range(m):
                    for t in range(TILE):
                        logits[i, t] += shift[i]
            else:
                add_logits(keys_low, keys_high, key_bits > 4, key_table, asked, words, codes, logits)
                for t in range(size):
                    factors[t] = short_float(key_scale[place + t])
                for i in range(m):
                    for t in range(TILE):
                        logits[i, t] = logits[i, t] * factors[t] + raised[i]
            if softcap > 0:
                for i in range(m):
                    for t in range(size):
                        logits[i, t] = softcap * np.float32(math.tanh(logits[i, t] / softcap))
            if masked:
                for i in range(m):
                    for t in range(size):
                        logits[i, t] = HIDDEN if hide[r, i, start + t] else logits[i, t]
            for t in range(size):
                factors[t] = short_float(value_scale[place + t])
            weigh(logits, live, factors, highest, masses, total)
            at = place * value_bytes
            if value_bits == 8:
                look_up_bytes(all_values, at, size, dv, value_table, lanes, numbers)
            elif plain_values and size == TILE:
                look_up_words(all_values, at, 4, high, False, value_table, lanes, numbers)
            else:
                tile_words(all_values, at, size, value_bytes, value_bits, dv, low, high, lanes)
                look_up_words(low, 0, 1, high, value_bits > 4, value_table, lanes, numbers)
            add_values(numbers, logits, total)
        for i in range(m):
            top[r, chunk, i], mass[r, chunk, i] = highest[i], masses[i]
            for c in range(dv):
                mean[r, chunk, i, c] = total[i, spot(c)]


@compiled(signature=types.void(types.float32[:, :, :, ::1], _CUBE, _CUBE, _CUBE, types.float32[:, ::1]))
def join(mean, top, mass, out, log_mass):
    """Join the chunks of each row that `attend_chunks` wrote: out (r, m, dv) and log_mass (r, m) of all its tokens."""
    rows, chunks, m, dv = mean.shape
    for r in range(rows):
        for i in range(m):
            highest, whole = HIDDEN, np.float32(0.0)
            for chunk in range(chunks):
                highest = max(highest, top[r, chunk, i])
            for c in range(dv):
                out[r, i, c] = np.float32(0.0)
            for chunk in range(chunks):
                if mass[r, chunk, i] != 0:
                    factor = exponential(top[r, chunk, i] - highest)
                    whole += factor * mass[r, chunk, i]
                    for c in range(dv):
                        out[r, i, c] += factor * mean[r, chunk, i, c]
            for c in range(dv):
                out[r, i, c] = out[r, i, c] / whole if whole != 0 else np.float32(0.0)
            log_mass[r, i] = highest + np.float32(math.log(whole)) if whole != 0 else np.float32(-np.inf)


@compiled(signature=types.void(_CUBE, _FLOAT, _FLOAT, _INTEGERS, _CUBE, _CUBE, _SHARED, _CUBE, _MATRIX))
def add_given(q, scale, softcap, row, keys, values, seen, mean, log_mass):
    """Add tokens that are kept as they were given to the result over others, mean (r, m, dv) and log_mass (r, m).

    q, scale, softcap, row  as in `attend_chunks`
    keys, values            (rows, n, d) and (rows, n, dv)
    seen                    (r, m, n), 1 for the tokens that a query sees
    """
    m, n, d, dv = q.shape[1], keys.shape[1], keys.shape[2], values.shape[2]
    logits = np.empty(n, np.float32)
    for r in range(len(q)):
        at = row[r]
        for i in range(m):
            top, some = log_mass[r, i], False
            for t in range(n):
                if seen[r, i, t]:
                    logit = np.float32(0.0)
                    for c in range(d):
                        logit += q[r, i, c] * keys[at, t, c]
                    logit *= scale
                    if softcap > 0:
                        logit = softcap * np.float32(math.tanh(logit / softcap))
                    logits[t], some = logit, True
                    if not logit <= top:  # a NaN stays
                        top = logit
            if not some:
                continue
            total = exponential(log_mass[r, i] - top)
            for c in range(dv):
                mean[r, i, c] *= total
            for t in range(n):
                if seen[r, i, t]:
                    weight = exponential(logits[t] - top)
                    total += weight
                    for c in range(dv):
                        mean[r, i, c] += weight * values[at, t, c]
            for c in range(dv):
                mean[r, i, c] /= total
            log_mass[r, i] = top + np.float32(math.log(total))
