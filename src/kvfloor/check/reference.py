"""Check that answers equal exact attention where a method claims it, and that its other claims (`Traits`) hold.

A method is a KV-cache compressor; its state is the cache of the tokens that it was given, empty when `Method.open`
makes it. A check tests one law of docs/contract.md on a method under a setting `at` (dtype of the cache, size of the
GQA group, seed), and raises `Broken` if the law fails. An answer is the attention output for a query. The other claims
are normalised weights, linearity in values and constant memory. A selector is the part of a method that picks, for each
query, the held tokens to read. A slot is the storage of one held token: key, value and position. "unmasked" is the
attention law by which evicted tokens stay in the softmax with logit 0. In shapes, rows are streams of one kv head of
one sequence, m is the number of queries per row, d and dv are the widths of a key and a value. Plain attention is
softmax attention without compression, in the dtype of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvfloor.check.law import Setting, require
from kvfloor.check.plain_attention import attention, causal
from kvfloor.check.streams import Stream, play, probes, small_pieces, spec_for, stream_for, tokens_of
from kvfloor.check.tolerance import AGREE, require_accuracy, require_agreement
from kvfloor.core.blocked import Blocked
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.state import State


def unread(method: Method, state: State, q: Tensor) -> Tensor | None:
    """Return a mask (rows, m, s), True where the method's selector makes a query of q (rows, m, d) skip a slot.

    s is the number of tokens held by the fullest row. Returns None if the queries read all slots.
    """
    slots = state.slots
    if slots is None or method.parts.selector is None or not isinstance(state, Blocked):
        return None
    hide = state.unread(q)
    return None if hide is None else hide.expand(q.shape[0], q.shape[1], int(slots.held.max()))


def waits_whole(method: Method) -> bool:
    """Return True if a state stores the first appended token as it is, with its own key and value in a slot.

    False: the method stores even the first token only in another form, such as quantised.
    """
    state, stream = method.open(spec_for(method, Setting())), stream_for(method, Setting(), n=1)
    state.append(stream.k, stream.v)
    return all(len(row.position) == 1 for row in tokens_of(state)) and state.slots is not None and state.slots.plain


def _nothing_lost(method: Method, state: State, q: Tensor) -> bool:
    """Return True if the state holds every token that it has seen, and every query q (rows, m, d) reads all of them.

    A state without slots is also taken to hold all tokens if its method sets no bound on their number.
    """
    slots = state.slots
    held = state.held if slots is None else slots.held
    whole = bool((held == state.seen).all())
    if slots is None:
        return whole or method.capacity(int(state.seen[0])) is None
    hide = unread(method, state, q)
    return whole and (hide is None or not bool(hide.any()))


def check_reference(method: Method, at: Setting) -> None:
    """Require exact attention until a token is evicted, with at most 1.5 times the error of plain attention.

    Plain attention is computed in the dtype of the cache. Errors are differences from attention in float64. Answers are
    compared as long as the state holds all tokens and queries read all of them, with and without a softcap of the
    logits. A method with a budget of b tokens and no selector must hold all of a row's first b - 15 tokens, unless it
    claims to store values with an error.
    """
    for softcap in (None, 4.0):
        spec, stream = replace(spec_for(method, at), softcap=softcap), stream_for(method, at)
        state, budget = method.open(spec), method.budget
        room = min(budget) if isinstance(budget, tuple) else budget
        whole = 0

        outputs, cuts = [], [*range(1, 9), *range(16, stream.n + 1, 16)]
        for a, b in zip([0, *cuts], cuts, strict=False):
            q = stream.q[:, :, a:b]
            outputs.append(state.step(q, stream.k[:, a:b], stream.v[:, a:b]))
            if not _nothing_lost(method, state, q.flatten(1, 2)):
                break
            whole = b
        if isinstance(room, int) and not method.traits.lossy_values and method.parts.selector is None:
            require(whole + 16 > min(room, stream.n), f"tokens are lost after {whole} of a budget of {room}")
        require(whole > 0, "the first token is lost at once: a method that stores values inexactly claims lossy_values")
        q, k, v = stream.q[:, :, :whole], stream.k[:, :whole], stream.v[:, :whole]
        truth = causal(q.double(), k.double(), v.double(), spec)
        plain = causal(q, k, v, spec)
        answers = torch.cat(outputs, 2)[:, :, :whole]
        what = f"against exact attention over the first {whole} tokens (softcap {softcap})"
        require_accuracy(answers, truth, plain, at.dtype, what)


@dataclass(frozen=True)
class _Kept:
    """Hold the inputs of one row's attention: m queries, and the keys and values of the row's h held tokens.

    q (m, d)              queries
    k (h, d), v (h, dv)   keys and values of the held tokens
    zero_logits (e, dv)   values of the evicted tokens that keep logit 0; None: there are none
    hide (m, h)           True for a held token that the query does not read; None: every query reads all
    """

    q: Tensor
    k: Tensor
    v: Tensor
    zero_logits: Tensor | None
    hide: Tensor | None

    def attention(self, spec: Spec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        zero_logits = None if self.zero_logits is None else self.zero_logits.to(dtype)
        return attention(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), spec, zero_logits, self.hide)


def check_attends_to_held(method: Method, at: Setting) -> None:
    """Require exact attention over the held tokens that are read; "unmasked" methods add evicted ones at logit 0.

    A held token is read unless the method's selector skips it for the query. A method claims the law "unmasked" in
    `Traits.reference`.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    state = method.open(spec)
    q = probes(spec)

    def look(i: int) -> None:
        part, hide = state.read(q), unread(method, state, q)
        slots: Any = state.slots
        for row, (offset, held) in enumerate(zip(slots.offset.tolist(), slots.held.tolist(), strict=True)):
            here = torch.arange(offset, offset + held)
            gone = torch.ones(i, dtype=torch.bool)
            gone[slots.arrived(here)] = False
            left = stream.v[row, :i][gone] if method.traits.reference == "unmasked" else None
            skip = None if hide is None else hide[row, :, :held]
            kept = _Kept(q[row], slots.keys(here), slots.values(here), left, skip)
            truth, plain = kept.attention(spec, torch.float64), kept.attention(spec, at.dtype)
            where = f"row {row} after {i} tokens ({held} held), against attention over what it holds"
            require_accuracy(part.mean[row], truth[0], plain[0], at.dtype, f"the answers of {where}")
            require_accuracy(part.log_mass[row], truth[1], plain[1], at.dtype, f"the log-masses of {where}")

    play(state, stream, cuts=range(0, stream.n, 17), after=look)


def check_hull(method: Method, at: Setting) -> None:
    """Require normalised weights: coordinate by coordinate, an answer lies in the range of the values so far."""
    spec, stream = spec_for(method, at), stream_for(method, at)
    # Values far from 0 reveal weights that do not sum to 1; a different range per coordinate reveals mixed coordinates.
    stream = replace(stream, v=stream.v / 4.0 + torch.linspace(2.0, 6.0, spec.dv).to(at.dtype))
    outputs = play(method.open(spec), stream).double()
    low, high = stream.v.double().cummin(1).values.unsqueeze(1), stream.v.double().cummax(1).values.unsqueeze(1)
    beyond = float(torch.maximum(low - outputs, outputs - high).max())
    allowed = 8.0 * AGREE[at.dtype]
    require(beyond <= allowed, f"an answer lies {beyond:.3g} outside the values given, allowed is {allowed:.3g}")


def check_value_linear(method: Method, at: Setting) -> None:
    """Require that answers are linear in values: f(a v + b w) = a f(v) + b f(w), with f(v) the answers for values v.

    Keys and queries are the same for all values. The state must hold the same tokens, whatever the values.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    one = (4.0 * stream.v).round() / 4.0  # quarters: their combination below is exact in every dtype
    two = (4.0 * stream_for(method, at, salt=1).v).round() / 4.0

    def answers(v: Tensor) -> tuple[Tensor, State]:
        state = method.open(spec)
        return play(state, Stream(stream.q, stream.k, v, stream.prompt)), state

    (first, kept), (second, _), (both, also) = answers(one), answers(two), answers(0.5 * one - 0.25 * two)
    combined = 0.5 * first.double() - 0.25 * second.double()
    require_agreement(both.double(), combined, at.dtype, "the answers to combined values and the combined answers", 2.0)
    for row, (mine, theirs) in enumerate(zip(tokens_of(kept), tokens_of(also), strict=True)):
        same = torch.equal(mine.position, theirs.position)
        require(same, f"row {row} keeps other tokens when only the values change")


def check_constant_memory(method: Method, at: Setting) -> None:
    """Require constant memory: `nbytes`, the size of the state in bytes, never grows after the first step."""
    spec, stream = spec_for(method, at), stream_for(method, at)
    state = method.open(spec)
    play(state, stream, stop=1)
    first = state.nbytes

    def look(i: int) -> None:
        require(
            state.nbytes <= first, f"nbytes was {first} after the first step and is {state.nbytes} after {i} tokens"
        )

    play(state, stream, start=1, cuts=small_pieces(stream.n), after=look)
    state.attend(stream.q[:, :, :3])
    look(stream.n)
