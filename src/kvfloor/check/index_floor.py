"""Check the INDEX lower bound: queries recover no more hidden bits from a method than its memory has bits.

INDEX is the problem of answering for any one of n hidden bits from a message that was written before the question is
known; the message needs about n bits. A method is a KV-cache compressor; its state is the cache of the tokens that it
was given, empty when `Method.open` makes it. A check tests one law of docs/contract.md on a method under a setting `at`
(dtype of the cache, size of the GQA group, seed), and raises `Broken` if the law fails.
"""

from __future__ import annotations

import math

from kvfloor.check.law import Setting, require
from kvfloor.check.streams import of_rows, placed, width_of
from kvfloor.core.method import Method
from kvfloor.game.engine.decode import judge
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances.spike import Spike

_D = 32
_BITS, _MOST_BITS = 8, 24  # hidden per value at first, and at most: a float32 has no more
_LEAST, _MOST = 128, 1024
_ETA = 0.5


def check_index_floor(method: Method, at: Setting) -> None:
    """Require that queries recover at most 8 bits per byte of `nbytes`, and of the saved state (`to_bytes`).

    `nbytes` is the size of the live state in bytes, to which what it keeps outside of its memory (`cold_nbytes`) is
    added. A short game tests the live state and one restored from the saved
    bytes: random bits are hidden in values, the tokens are appended, and the bits are recovered from the attention
    outputs for spike queries, each of which puts nearly all softmax mass on one token. Only certified bits are counted,
    i.e. those that the outputs prove to be in the memory. If the saved bytes have room for more than was hidden, the
    game is played again with finer values, which hide more than the bytes can hold (24 bits per value at most).
    A failure means that the state keeps memory that it does not count. `kvfloor break` plays the same game more
    strictly: there a fresh process answers from the saved bytes alone.
    """
    method = of_rows(method, [0])
    d = width_of(method, _D)
    empty = method.open(placed(method, _spike(d, _LEAST, at.seed, _BITS).spec()))
    # So many tokens that they hide more bits than a memory of constant size can hold.
    n = min(_MOST, max(_LEAST, math.ceil(1.5 * 8 * empty.nbytes / (d * _BITS))))
    size = _require_floor(method, at, d, n, _BITS)
    finer = min(_MOST_BITS, 2 + 8 * size // (n * d))
    if finer > _BITS:
        _require_floor(method, at, d, n, finer)


def _require_floor(method: Method, at: Setting, d: int, n: int, bits: int) -> int:
    """Hide values of `bits` bits in n tokens, and require that no more is answered than the bytes can hold.

    Returns the size of the saved state in bytes.
    """
    instance, hidden = _spike(d, n, at.seed, bits), Hidden()
    levels = hidden.levels(n, d, bits)
    state = method.open(placed(method, instance.spec()))
    instance.feed(state, levels, hidden)
    message = state.to_bytes()
    for side in (state, method.from_bytes(message)):
        where = "the live state" if side is state else "the restored state"
        carried = judge(instance.ask(side, None), levels, bits, _ETA).certified_bits
        for what, size in (("message", len(message)), ("nbytes", side.nbytes + side.cold_nbytes)):
            enough = carried <= 8 * size
            require(enough, f"{where} answers {carried:.0f} hidden bits, its {what} holds {8 * size}")
    return len(message)


def _spike(d: int, n: int, seed: int, bits: int) -> Spike:
    shared = agreed(d=d, dv=None, bits=bits, eta=_ETA, seed=seed)
    return Spike(**shared, n=n, public=keys_for(shared, n))
