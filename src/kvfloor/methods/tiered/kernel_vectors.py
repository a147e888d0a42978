"""Define the vector operations of the kernel of `tiered` that numba does not have, by their LLVM instructions.

A channel is one entry of a key or value, a code the small integer that stands for it, a word 32 bits of codes, a tile
TILE tokens. Where the processor has instructions for a whole step (AVX-512 BW and VBMI), they are named; elsewhere the
same numbers come from plain instructions. Import this module only where numba is installed.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir  # pyright: ignore[reportMissingImports]
from numba import types  # pyright: ignore[reportMissingImports]
from numba.core import cgutils, config  # pyright: ignore[reportMissingImports]

from kvfloor.methods.stores import fused_numba
from kvfloor.methods.stores.fused_numba import TILE, address, addresses, compiled, instruction, scaled_onto

BUILT_ON = (fused_numba.__file__,)

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


def _splat(builder: Any, value: Any, count: int) -> Any:
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_INDEX, 0))
    return builder.shuffle_vector(
        one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_INDEX, count), [0] * count)
    )


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
def code_logits(
    context: Any,
    words: Any,
    fine: Any,
    at: Any,
    counts: Any,
    extra: Any,
    factors: Any,
    by: Any,
    first: Any,
    many: Any,
    out: Any,
    to: Any,
) -> Any:
    """Write the logits of 16 tokens and `many` queries from `first` on to out[first .., to .. to + 15].

    words, fine  uint32 (count * TILE), word j of token t at j TILE + t: 4 codes of 8 bits, 32 / extra of extra bits
    at           the first token
    counts       number of words, of fine words, of pairs of codes in a fine word
    factors, by  int16 (m, 2, width) and float32 (m, 4) as `_fold` writes them
    """
    del context
    if not isinstance(many, types.IntegerLiteral):
        return None
    number = many.literal_value

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        coarse, loud, given, scales, result = addresses(target, builder, signature, arguments, 0, 1, 5, 6, 9)
        whole = arguments[2].type
        full, short, each = cgutils.unpack_tuple(builder, arguments[3], 3)

        def width(which: int) -> Any:
            shape = cgutils.create_struct_proxy(signature.args[which])(target, builder, arguments[which]).shape
            return cgutils.unpack_tuple(builder, shape)[-1]

        queries = [builder.add(arguments[7], ir.Constant(whole, i)) for i in range(number)]
        plane = builder.lshr(width(5), ir.Constant(whole, 1))  # in pairs
        starts = [builder.mul(builder.mul(i, ir.Constant(whole, 2)), plane) for i in queries]
        pairs = builder.bitcast(given, _INDEX.as_pointer())
        zero = ir.Constant(_INDICES, [0] * _LANES)
        upper, lower, finest = ([cgutils.alloca_once_value(builder, zero) for _ in queries] for _ in range(3))

        def add(totals: list[Any], half: int, codes: Any, pair: Any) -> None:
            for start, total in zip(starts, totals, strict=True):
                place = builder.add(start, builder.add(pair, plane) if half else pair)
                found = _pair_products(builder, codes, builder.load(builder.gep(pairs, [place])))
                builder.store(builder.add(builder.load(total), found), total)

        def load(data: Any, word: Any) -> Any:
            place = builder.add(builder.mul(word, ir.Constant(whole, TILE)), arguments[2])
            return builder.load(address(builder, data, place, _INDICES), align=4)

        mask = ir.Constant(_INDICES, [0x00FF00FF] * _LANES)
        with cgutils.for_range(builder, full) as loop:
            four = load(coarse, loop.index)
            odd = builder.lshr(four, ir.Constant(_INDICES, [8] * _LANES))
            for codes, pair in ((four, loop.index), (odd, builder.add(full, loop.index))):
                codes = builder.and_(codes, mask)
                add(upper, 0, codes, pair)
                add(lower, 1, codes, pair)
        bits = builder.trunc(arguments[4], _INDEX)
        ones = builder.sub(builder.shl(ir.Constant(_INDEX, 1), bits), ir.Constant(_INDEX, 1))
        both = _splat(builder, builder.or_(ones, builder.shl(ones, ir.Constant(_INDEX, 16))), _LANES)
        with cgutils.for_range(builder, short) as outer:
            word = load(loud, outer.index)
            begin = builder.add(builder.add(full, full), builder.mul(outer.index, each))
            with cgutils.for_range(builder, each) as inner:
                by = _splat(builder, builder.mul(bits, builder.trunc(inner.index, _INDEX)), _LANES)
                add(finest, 0, builder.and_(builder.lshr(word, by), both), builder.add(begin, inner.index))
        row = width(9)
        for n, i in enumerate(queries):
            factors = [
                builder.load(
                    builder.gep(scales, [builder.add(builder.mul(i, ir.Constant(whole, 4)), ir.Constant(whole, j))])
                )
                for j in range(4)
            ]
            total = _splat(builder, factors[3], _LANES)
            for j, (sums, turn) in enumerate(
                ((upper, builder.sitofp), (lower, builder.uitofp), (finest, builder.sitofp))
            ):
                total = scaled_onto(builder, total, factors[j], turn(builder.load(sums[n]), _NUMBERS))
            place = builder.add(builder.mul(i, row), arguments[10])
            builder.store(total, address(builder, result, place, _NUMBERS), align=4)
        return target.get_dummy_value()

    integer = types.intp
    triple = types.UniTuple(integer, 3)
    return types.void(words, fine, integer, triple, integer, factors, by, integer, many, out, integer), code


@instruction
def write_halves(context: Any, whole: Any, factors: Any, row: Any) -> Any:
    """Write the upper and lower halves of integers whole (d), int32, to factors[row]: the even ones, then the odd ones.

    factors is int16 (m, 2, width), with the upper halves in [row, 0, :d] and the lower 15 bits in [row, 1, :d]; d is a
    multiple of 32.
    """
    del context
    halves = ir.VectorType(_SHORT, _LANES)

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, into = addresses(target, builder, signature, arguments, 0, 1)
        given, result = (cgutils.create_struct_proxy(signature.args[i])(target, builder, arguments[i]) for i in (0, 1))
        (d,) = cgutils.unpack_tuple(builder, given.shape, 1)
        width, kind = cgutils.unpack_tuple(builder, result.shape)[2], d.type
        start = builder.mul(builder.mul(arguments[2], ir.Constant(kind, 2)), width)
        wide = ir.VectorType(_INDEX, 32)
        with cgutils.for_range(builder, builder.sdiv(d, ir.Constant(kind, 32))) as block:
            whole = builder.load(
                address(builder, source, builder.mul(block.index, ir.Constant(kind, 32)), wide), align=4
            )
            for odd in range(2):
                picked = ir.Constant(_INDICES, [2 * i + odd for i in range(_LANES)])
                mine = builder.shuffle_vector(whole, ir.Constant(wide, ir.Undefined), picked)
                upper = builder.ashr(mine, ir.Constant(_INDICES, [15] * _LANES))
                lower = builder.and_(mine, ir.Constant(_INDICES, [32767] * _LANES))
                first = builder.mul(block.index, ir.Constant(kind, _LANES))
                if odd:
                    first = builder.add(first, builder.sdiv(d, ir.Constant(kind, 2)))
                for half, numbers in enumerate((upper, lower)):
                    at = builder.add(start, builder.add(first, width) if half else first)
                    builder.store(builder.trunc(numbers, halves), address(builder, into, at, halves), align=2)
        return target.get_dummy_value()

    return types.void(whole, factors, types.intp), code


@instruction
def write_ranks(context: Any, wide: Any, rank: Any) -> Any:
    """Write, for each number wide[c] >= 0, how many are larger, or equal and before it, to rank (d), int32.

    d is a multiple of 16.
    """
    del context

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, into = addresses(target, builder, signature, arguments, 0, 1)
        shape = cgutils.create_struct_proxy(signature.args[0])(target, builder, arguments[0]).shape
        (d,) = cgutils.unpack_tuple(builder, shape, 1)
        bits, lanes = (
            builder.bitcast(source, _INDEX.as_pointer()),
            ir.Constant(d.type, _LANES),
        )  # ordered like the numbers
        ones, blocks = ir.Constant(_INDICES, [1] * _LANES), builder.sdiv(d, lanes)
        with cgutils.for_range(builder, blocks) as block:
            start = builder.mul(block.index, lanes)
            mine = builder.load(address(builder, bits, start, _INDICES), align=4)
            below = builder.sub(mine, ones)  # where an equal number counts too
            total = cgutils.alloca_once_value(builder, ir.Constant(_INDICES, [0] * _LANES))

            def count(from_block: Any, to_block: Any, less: Any) -> None:
                with cgutils.for_range_slice(builder, from_block, to_block, ir.Constant(d.type, 1)) as (other, _):
                    numbers = builder.load(address(builder, bits, builder.mul(other, lanes), _INDICES), align=4)
                    found = builder.load(total)
                    for k in range(_LANES):
                        every = ir.Constant(_INDICES, [k] * _LANES)
                        each = builder.shuffle_vector(numbers, ir.Constant(_INDICES, ir.Undefined), every)
                        found = builder.sub(found, builder.sext(builder.icmp_signed(">", each, less(k)), _INDICES))
                    builder.store(found, total)

            def among(k: int) -> Any:
                after = ir.Constant(ir.VectorType(ir.IntType(1), _LANES), [c > k for c in range(_LANES)])
                return builder.select(after, below, mine)

            following = builder.add(block.index, ir.Constant(d.type, 1))
            count(ir.Constant(d.type, 0), block.index, lambda k: below)
            count(block.index, following, among)
            count(following, blocks, lambda k: mine)
            builder.store(builder.load(total), address(builder, into, start, _INDICES), align=4)
        return target.get_dummy_value()

    return types.void(wide, rank), code


@instruction
def look_up_levels(
    context: Any, packed: Any, at: Any, table: Any, planes: Any, out: Any, to: Any, squares: Any, token: Any
) -> Any:
    """Write the levels of the 64 bytes from packed[at] on to out[to .. to + 63], that of byte c where `_lane_of` says.

    Adds their squares to the 16 numbers from squares[16 token] on, four to each.
    table   float32 (256), the level of each code; table[255 - c] = -table[c]
    planes  uint8 (3, 128), the three upper bytes of table[128 + i], the lowest of them first; the fourth byte is 0
    """
    del context

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, levels, parts, into, sums = addresses(target, builder, signature, arguments, 0, 2, 3, 4, 6)
        at, to, whole = arguments[1], arguments[5], arguments[1].type
        begin = builder.mul(arguments[7], ir.Constant(whole, _LANES))
        place = address(builder, sums, begin, _NUMBERS)
        if "avx512vbmi" not in _HAS:
            first = builder.gep(sums, [begin])
            square = builder.load(first)
            for c in range(64):
                byte = builder.zext(builder.load(builder.gep(source, [builder.add(at, ir.Constant(whole, c))])), whole)
                number = builder.load(builder.gep(levels, [byte]))
                builder.store(number, builder.gep(into, [builder.add(to, ir.Constant(whole, _lane_of(c)))]))
                square = builder.fadd(square, builder.fmul(number, number))
            builder.store(square, first)
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
        squares = builder.load(place, align=4)
        for half in range(2):
            lower = builder.bitcast(unpacked(_BYTES, none, first, half), _PAIRS)
            above = builder.bitcast(unpacked(_BYTES, second, third, half), _PAIRS)
            for part in range(2):
                numbers = builder.bitcast(unpacked(_PAIRS, lower, above, part), _NUMBERS)
                start = builder.add(to, ir.Constant(whole, 16 * (2 * half + part)))
                builder.store(numbers, address(builder, into, start, _NUMBERS), align=4)
                square = builder.fmul(numbers, numbers, flags=("contract",))
                squares = builder.fadd(squares, square, flags=("contract",))
        builder.store(squares, place, align=4)
        return target.get_dummy_value()

    integer = types.intp
    return types.void(packed, integer, table, planes, out, integer, squares, integer), code


@instruction
def sums_of_16(context: Any, numbers: Any, at: Any, out: Any, to: Any) -> Any:
    """Write the sums of 16 numbers each, numbers[at + 16 t ..], for t < 16, to out[to + t]."""
    del context

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, into = addresses(target, builder, signature, arguments, 0, 2)
        places = [builder.add(arguments[1], ir.Constant(arguments[1].type, _LANES * t)) for t in range(_LANES)]
        rows = [builder.load(address(builder, source, place, _NUMBERS), align=4) for place in places]
        halves = [ir.Constant(_INDICES, [2 * i + odd for i in range(_LANES)]) for odd in range(2)]
        while len(rows) > 1:
            pairs = zip(rows[::2], rows[1::2], strict=True)
            rows = [builder.fadd(*(builder.shuffle_vector(*pair, half) for half in halves)) for pair in pairs]
        builder.store(rows[0], address(builder, into, arguments[3], _NUMBERS), align=4)
        return target.get_dummy_value()

    return types.void(numbers, types.intp, out, types.intp), code


def _lane_of(c: int) -> int:
    """Return where `look_up_levels` writes the level of byte c of 64."""
    return c % 16 // 4 * 16 + c // 16 * 4 + c % 4


@compiled
def lane(channel):
    """Return where a channel's number is among those of a token, as `look_up_levels` writes them."""
    c = channel % 64
    return channel - c + c % 16 // 4 * 16 + c // 16 * 4 + c % 4


@instruction
def highest(context: Any, x: Any, at: Any) -> Any:
    """Return the largest of the TILE numbers of x (m, n) from entry `at` of all on."""
    del context
    wide = ir.VectorType(ir.FloatType(), TILE)

    def code(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (source,) = addresses(target, builder, signature, arguments, 0)
        vector = builder.load(address(builder, source, arguments[1], wide), align=4)
        kind = ir.FunctionType(ir.FloatType(), [wide])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{TILE}f32")
        return builder.call(reduce, [vector])

    return types.float32(x, types.intp), code


@instruction
def add_weighted(context: Any, numbers: Any, weights: Any, first: Any, many: Any, column: Any, out: Any) -> Any:
    """Add a tile's numbers, weighted by the rows first .. first + many - 1 of weights, to out, for 32 channels.

    numbers  (TILE * w), weights (n, TILE), out (n, w); the channels are those from `column` on
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
                builder.load(
                    address(builder, source, builder.add(start, ir.Constant(whole, half * _LANES)), _NUMBERS), align=4
                )
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
