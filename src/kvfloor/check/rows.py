"""Check that rows, the (batch item, kv head) streams that one state holds, are independent of each other.

A method is a KV-cache compressor; its state is the cache of the tokens that it was given, empty when `Method.open`
makes it. A check tests one law of docs/contract.md on a method under a setting `at` (dtype of the cache, size of the
GQA group, seed), and raises `Broken` if the law fails. An answer is the attention output for a query. A row's row id is
a number in the spec, the sizes and constants that a state is opened for; with the seed it determines the row's random
draws.
"""

from __future__ import annotations

import torch

from kvfloor.check.law import Setting, require
from kvfloor.check.streams import Stream, of_rows, play, require_same_memory, rows_of, spec_for, stream_for
from kvfloor.check.tolerance import require_agreement, require_same_bits
from kvfloor.core.method import Method
from kvfloor.core.state import State


def _row(state: State, *index: int) -> State:
    """Return a copy of the state that has only the rows at `index`."""
    part = state.clone()
    part.select_rows(torch.tensor(index))
    return part


def _fill(method: Method, at: Setting, stream: Stream) -> list[list[int]]:
    """Feed a stream to a new state piece by piece, and return each row's saved size in bytes after each piece.

    The result is indexed [piece][row]. A piece has at most `method.block` tokens, the number between two evictions. If
    the results for two streams differ, some row held more tokens after a piece of one stream than after that piece of
    the other.
    """
    state, sizes = method.open(spec_for(method, at)), []

    def look(i: int) -> None:
        del i
        sizes.append([len(_row(state, row).to_bytes()) for row in range(state.spec.rows)])

    play(state, stream, cuts=range(0, stream.n, method.block), after=look)
    return sizes


def check_row_order(method: Method, at: Setting) -> None:
    """Require that permuting the rows of the input permutes the rows of answers and state, and changes nothing else."""
    spec, stream = spec_for(method, at), stream_for(method, at)
    order = [(r + 1) % spec.rows for r in range(spec.rows)]
    state = method.open(spec)
    outputs = play(state, stream)
    other = of_rows(method, order).open(spec.select(torch.tensor(order)))
    permuted = play(other, stream.rows(order))
    require_agreement(permuted, outputs[order], at.dtype, "the outputs of rows in another order")
    require_same_memory(other, _row(state, *order), at, "rows in another order")


def check_row_isolation(method: Method, at: Setting) -> None:
    """Require that changed tokens in one row never change a bit of the other rows' answers and stored data.

    If the changed row then holds a different number of tokens, matrix products over all rows change shape, and with it
    their rounding. In that case the other rows' answers need to agree up to rounding only, while their stored data must
    still have the same bits.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    changed, intruder = spec.rows - 1, stream_for(method, at, salt=1)
    other = stream_for(method, at)
    other.q[changed], other.k[changed], other.v[changed] = (
        intruder.q[changed],
        3.0 * intruder.k[changed],
        intruder.v[changed],
    )
    one, two = method.open(spec), method.open(spec)
    outputs, beside = play(one, stream), play(two, other)
    for row in range(spec.rows - 1):
        what = f"the outputs of row {row} beside two different neighbours"
        if torch.equal(outputs[row], beside[row]) or _fill(method, at, stream) == _fill(method, at, other):
            require_same_bits(outputs[row], beside[row], what)
        else:
            require_agreement(beside[row], outputs[row], at.dtype, what)
        same = _row(one, row).to_bytes() == _row(two, row).to_bytes()
        require(same, f"what row {row} remembers depends on its neighbour")


def check_row_alone(method: Method, at: Setting) -> None:
    """Require that a row holds the same tokens in a state of its own as in a batch, given the same row id.

    The answers must agree too.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    state = method.open(spec)
    outputs = play(state, stream)
    for row in range(spec.rows):
        alone = of_rows(method, [row]).open(spec.select(torch.tensor([row])))
        answers = play(alone, stream.rows([row]))
        require_agreement(answers, outputs[row : row + 1], at.dtype, f"the outputs of row {row} alone and in a batch")
        require_same_memory(alone, _row(state, row), at, f"row {row} alone and in a batch")


def check_select_rows(method: Method, at: Setting) -> None:
    """Require that rows kept by `select_rows` answer as they would in the batch, and copies of a row are independent.

    The call `select_rows` of a state keeps the rows that are named, in the given order, as beam search needs. A row may
    be named repeatedly, which copies it.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    last = rows_of(method) - 1
    index, middle = [last, 0, last], stream.prompt + 5
    state = method.open(spec)
    play(state, stream, stop=middle)
    chosen = _row(state, *index)
    expected = list(spec.select(torch.tensor(index)).row_ids or ())
    require(
        list(chosen.spec.row_ids or ()) == expected,
        f"rows {index} should have ids {expected}, not {chosen.spec.row_ids}",
    )
    fork = stream.rows(index)
    fork.k[2, middle:], fork.v[2, middle:] = -fork.k[2, middle:], -fork.v[2, middle:]
    answers, outputs = play(chosen, fork, start=middle), play(state, stream, start=middle)
    for place, row in enumerate(index[:2]):
        require_agreement(
            answers[place], outputs[row], at.dtype, f"the outputs of row {row}, selected and in its batch"
        )
        require_same_memory(_row(chosen, place), _row(state, row), at, f"row {row}, selected and in its batch")
    beam = of_rows(method, [last]).open(spec.select(torch.tensor([last])))
    play(beam, fork.rows([2]))
    require_same_memory(_row(chosen, 2), beam, at, "the second copy of a repeated row and the stream it was fed")
