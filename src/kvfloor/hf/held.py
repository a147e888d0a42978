"""Measure the bytes that a method's states take after a prompt, by feeding zeros to states of one and of two rows.

A method is a way to compress a KV cache, and a state is what it stores of one layer's tokens. A row is the stream of
one (batch item, kv head). All rows of a layer hold equally many tokens, so each row takes the same bytes; a state also
takes some bytes once, for all rows. The sizes with one and with two rows give both numbers, and so the size with any
number of rows. Some methods compress a prompt only at its end. A `LayerShape` holds the sizes of one layer: kv heads,
query heads per kv head, and the widths of a key and of a value. Bytes are those of the rows that a state or a
`LayerShape` has: all kv heads of a layer in a `LayerShape`, this process's kv heads in a state of a sharded model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvfloor.core.budget import resolve
from kvfloor.core.exact import ExactState
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.hf.layer_shape import LayerShape


@dataclass(frozen=True)
class StateBytes:
    """Hold the bytes of a method's states at a prompt's end: before and after the compression that is done then."""

    before: int
    after: int


def held_bytes(
    method: Method, layers: tuple[LayerShape, ...], tokens: int, dtype: torch.dtype, batch: int
) -> tuple[Method, StateBytes]:
    """Return the method with its budget converted to tokens, and the bytes of its states summed over these layers.

    The bytes are those at the end of a prompt of `tokens` tokens per batch item, fed in one forward. A budget given in
    bytes is for the states of all layers and the whole batch together. If layers have different shapes, such a budget
    can mean different numbers of tokens in them; the returned method has the number of the first layer. A method that
    has one per layer is returned as it is. Raises ValueError for a budget that is too small.
    """
    known: dict[tuple[object, ...], tuple[Method, StateBytes]] = {}
    found = []
    for place, layer in enumerate(layers):
        own = method.of_layer(place)
        sizes = (own, layer.heads, layer.d, layer.dv, layer.g, layer.tied)
        if sizes not in known:
            rows = batch * layer.heads
            sized = resolve(own, _spec(layer, dtype, rows), layers=len(layers), length=tokens, g=layer.g)
            known[sizes] = (sized, _held(sized, layer, tokens, dtype, rows))
        found.append(known[sizes])
    sized = found[0][0] if method.of_layer(0) == method else method
    return sized, StateBytes(sum(held.before for _, held in found), sum(held.after for _, held in found))


def _held(method: Method, layer: LayerShape, tokens: int, dtype: torch.dtype, rows: int) -> StateBytes:
    one = zeros_held(method, _spec(layer, dtype, 1), layer.g, tokens)
    if rows == 1:
        return one
    two = zeros_held(method, _spec(layer, dtype, 2), layer.g, tokens)
    more = rows - 1
    return StateBytes(one.before + more * (two.before - one.before), one.after + more * (two.after - one.after))


def zeros_held(method: Method, spec: Spec, g: int, tokens: int, spare: bool = True) -> StateBytes:
    """Return the bytes of a new state after every row has received `tokens` tokens of all zeros.

    spec   sizes, dtype and constants of the state; g: query heads per kv head
    spare  False: a state that keeps every token has room for these, and for no more. True: it has the spare room that
           it makes when tokens come in one forward
    A state of constant memory allocates everything at its first token, so for such a state one token is enough. Only
    the first token comes with queries, because answering them all would take time that grows with the square of the
    context.
    """
    state = method.open(spec)
    if not spare and isinstance(state, ExactState):
        state.reserve(g, tokens)
    first, *rest = (1,) if method.traits.constant_memory or tokens == 1 else (1, tokens - 1)
    state.step(torch.zeros(spec.rows, g, first, spec.d, dtype=spec.dtype, device=spec.device), *_pair(spec, first))
    for n in rest:
        state.append(*_pair(spec, n))
    before = state.nbytes
    state.seal()
    return StateBytes(before, state.nbytes)


Shares = dict[tuple[object, ...], float]
"""Sizes of a state -> its bytes at 16 bits, divided by its bytes."""


def bytes_at_16_bits(states: Sequence[State], g: Sequence[int], tokens: int, known: Shares) -> int:
    """Return the bytes that these states would hold if their dtype had 16 bits, after a prompt of `tokens` tokens.

    Keys, values and what else is stored in the state's dtype shrink; codes, positions and scores do not. Each state's
    bytes are multiplied by a ratio: the bytes of a state in bfloat16, divided by those of one in its own dtype, both
    after `tokens` tokens of all zeros.
    g      query heads per kv head, one number per state
    known  {sizes of a state: ratio} of the ratios measured in earlier calls, which are not measured again; new ones are
           added
    """
    total = 0.0
    for state, group in zip(states, g, strict=True):
        spec = state.spec
        sizes = (str(state.method), spec.rows, spec.d, spec.dv, spec.tied, spec.dtype, group, tokens)
        if sizes not in known:
            of_16_bits = replace(spec, dtype=torch.bfloat16) if spec.dtype.itemsize > 2 else spec
            now, then = (zeros_held(state.method, one, group, tokens).after for one in (spec, of_16_bits))
            known[sizes] = then / now
        total += state.nbytes * known[sizes]
    return math.ceil(total)


def _pair(spec: Spec, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of n tokens for the spec's rows: all zeros, expanded from one token to save memory."""
    kind = {"dtype": spec.dtype, "device": spec.device}
    one = torch.zeros(1, 1, spec.d, **kind).expand(spec.rows, n, spec.d)
    if spec.tied:
        return one, one
    return one, torch.zeros(1, 1, spec.dv, **kind).expand(spec.rows, n, spec.dv)


def _spec(layer: LayerShape, dtype: torch.dtype, rows: int) -> Spec:
    places = [(layer.layer, row % layer.heads) for row in range(rows)]
    return Spec(rows, layer.d, layer.dv, layer.d**-0.5, dtype=dtype, places=places, tied=layer.tied)
