"""Check which tokens a cache holds and how many, and that every evicted token enters the summary once.

A method is the configuration of a cache, a state the cache itself; a row is the stream of one kv head of one sequence.
A slot is the place of one held token. A summary is the part of a method that absorbs evicted tokens in compressed form.
A selector is the part that picks, for each query, the held tokens to read; it may keep an index of the held keys. A
check requires a law, i.e. a property that every method must have, and raises Broken if the law fails. Its argument
`at`, a `Setting`, has the cache's dtype, the size of the GQA group and the seed. The check itself draws a random stream
of tokens (`Stream`) from that seed. An answer is the attention output for a query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.check.law import Broken, Setting, require
from kvfloor.check.reference import unread
from kvfloor.check.streams import (
    Stream,
    play,
    probes,
    small_pieces,
    some_absent,
    spec_for,
    stream_for,
    tokens_of,
)
from kvfloor.check.tolerance import AGREE, apart, require_same_bits
from kvfloor.core.budget import tokens
from kvfloor.core.method import Method
from kvfloor.core.partial import Partial
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.core.summary import Summary, SummaryState


def _budgets(method: Method, rows: int) -> list[int] | None:
    """Return each row's budget in tokens; None for a method without budget, or one that does not keep whole tokens."""
    if method.traits.lossy_values or method.budget is None:
        return None
    return tokens(method.budget, rows)


def check_capacity(method: Method, at: Setting) -> None:
    """Require that a row holds at most `Method.capacity` tokens, and at least its budget, or all tokens if fewer came.

    `Method.capacity` returns the most tokens that a row can hold after the number of tokens given so far. For a method
    without a budget in tokens only the upper limit is checked.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    state, budgets = method.open(spec), _budgets(method, spec.rows)

    def look(i: int) -> None:
        prompt = stream.prompt if state.sealed else None
        most, held = method.capacity(i, prompt=prompt), state.held.tolist()
        require(most is None or max(held) <= most, f"after {i} tokens rows hold {held}, the capacity is {most}")
        for row, budget in enumerate(budgets or []):
            least = min(i, budget)
            require(
                held[row] >= least, f"after {i} tokens row {row} holds {held[row]}, its budget has room for {least}"
            )

    play(state, stream, cuts=small_pieces(stream.n), after=look)


def check_held_tokens(method: Method, at: Setting) -> None:
    """Require that a row holds tokens of its own stream only, unchanged, each at most once.

    A method that claims to store values with an error may code a token once: from then on its numbers never change.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    present = some_absent(stream, at.seed)
    state = method.open(spec)
    real = [stream.rows([row]).packed(present[row]) for row in range(spec.rows)]
    coded: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in real]

    def look(i: int) -> None:
        for row, kept in enumerate(tokens_of(state)):
            where = f"row {row} after {i} tokens"
            count = int(present[row, :i].sum())
            require(len(set(kept.position.tolist())) == len(kept.position), f"{where} holds a token twice")
            inside = bool(((kept.position >= 0) & (kept.position < count)).all())
            require(inside, f"{where} holds a position outside its {count} tokens")
            given = real[row].k[0, kept.position].to(kept.k.dtype), real[row].v[0, kept.position].to(kept.v.dtype)
            if not method.traits.lossy_values:
                require_same_bits(kept.k, given[0], f"{where}: held keys and the stream's")
                require_same_bits(kept.v, given[1], f"{where}: held values and the stream's")
                continue
            for j, position in enumerate(kept.position.tolist()):
                now, true = (kept.k[j], kept.v[j]), (given[0][j], given[1][j])
                if position not in coded[row] and all(map(torch.equal, now, true)):
                    continue
                before = coded[row].setdefault(position, now)
                same = all(map(torch.equal, now, before))
                require(same, f"{where}: the numbers of token {position} change after it was coded")

    play(state, stream, cuts=range(0, stream.n, 13), present=present, after=look)


def check_pinned(method: Method, at: Setting) -> None:
    """Require that tokens pinned by `State.pin` are never evicted, also after a reload, `clone` or `select_rows`.

    A reload saves the state and restores it; `clone` copies it; `select_rows` here reorders its rows. If the budget has
    no room for a pinned token, `pin` may raise ValueError; the state must then be unchanged.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    state = method.open(spec)
    start, stop = 5, 6
    play(state, stream, stop=stop)
    before = state.to_bytes()
    try:
        state.pin(start, stop)
    except ValueError:  # the budget has no room for a pin
        require(state.to_bytes() == before, "a refused pin changed the state")
        return

    def look(i: int) -> None:
        for row, kept in enumerate(tokens_of(state)):
            require(start in kept.position.tolist(), f"after {i} tokens row {row} has lost its pinned token {start}")

    middle = stream.prompt + 3
    play(state, stream, start=stop, stop=middle, cuts=small_pieces(stream.n), after=look)
    for moved in (method.from_bytes(state.to_bytes()), state.clone()):
        state = moved
        play(state, stream, start=middle, after=look)
    state.select_rows(torch.arange(spec.rows - 1, -1, -1))
    play(state, stream, after=look)


@dataclass(frozen=True)
class CountingProbe(Summary):
    """Count the evicted tokens and sum their keys and values: a summary for tests that adds nothing to the answers."""

    name: ClassVar[str] = "tally"

    def open(self, spec: Spec) -> CountingProbeState:
        return CountingProbeState(spec)


class CountingProbeState(SummaryState):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.count = torch.zeros(spec.rows, dtype=torch.int64)
        self.k = torch.zeros(spec.rows, spec.d, dtype=torch.float64)
        self.v = torch.zeros(spec.rows, spec.dv, dtype=torch.float64)

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        del position
        self.count = self.count.index_add(0, row, torch.ones_like(row))
        self.k = self.k.index_add(0, row, k.to(torch.float64))
        self.v = self.v.index_add(0, row, v.to(torch.float64))

    def read(self, q: Tensor) -> Partial:
        return Partial.empty(*q.shape[:2], dv=self.spec.dv, dtype=self.spec.compute_dtype)


def check_absorbed_once(method: Method, at: Setting) -> None:
    """Require that each evicted token is absorbed by the summary exactly once.

    The method is tested with a summary that counts and sums the tokens it absorbs. A method of "unmasked" attention, in
    which evicted tokens keep logit 0, is also asked with queries of zeros, for which every token must have weight 1.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    whole = Stream(
        stream.q, (8 * stream.k).round(), (8 * stream.v).round(), stream.prompt
    )  # sums of integers are exact
    counting = method.with_summary(CountingProbe())
    if counting is not None:
        _check_tally(counting, spec, whole)
    if method.traits.reference == "unmasked":
        _check_weight(method.open(spec), stream, at)


def _check_tally(method: Method, spec: Spec, stream: Stream) -> None:
    present = some_absent(stream, spec.seed)
    state: Any = method.open(spec)

    def look(i: int) -> None:
        tally = state.summary
        for row, kept in enumerate(tokens_of(state)):
            real = stream.rows([row]).packed(present[row])
            seen = int(present[row, :i].sum())
            where = f"row {row} after {i} tokens ({seen} real, {len(kept.position)} held)"
            gone = seen - len(kept.position)
            require(int(tally.count[row]) == gone, f"{where} absorbed {int(tally.count[row])} tokens, not {gone}")
            for name, absorbed, fed, held in (
                ("keys", tally.k, real.k, kept.k),
                ("values", tally.v, real.v, kept.v),
            ):
                left = fed[0, :seen].double().sum(0) - held.double().sum(0)
                require(
                    method.traits.lossy_values or apart(absorbed[row], left) == 0.0,
                    f"{where} absorbed other {name} than those that left",
                )

    play(state, stream, cuts=range(0, stream.n, 17), present=present, after=look)


def _check_weight(state: State, stream: Stream, at: Setting) -> None:
    """Raise Broken unless every token, evicted or held, has the unnormalised weight exp(0) = 1 for a query of zeros.

    This is for methods of "unmasked" attention, in which evicted tokens keep logit 0. The stream is fed to the empty
    `state`, its values replaced by 1, so each answer must be 1. The softmax mass (sum of the weights) must be the
    number of tokens, less the held tokens that the selector skips.
    """
    stream = replace(stream, v=torch.ones_like(stream.v))
    nothing = torch.zeros_like(probes(state.spec, 1))

    def look(i: int) -> None:
        part, hide = state.read(nothing), unread(state.method, state, nothing)
        unread_tokens = 0 if hide is None else state.held.unsqueeze(1) - (~hide).sum(-1)
        error = apart(part.mean, torch.ones_like(part.mean))
        exact = state.method.traits.lossy_values or error <= AGREE[at.dtype]
        require(exact, f"after {i} values of 1 a query of zeros is answered 1 ± {error:.3g}")
        mass = part.log_mass.double().exp()
        error = apart(mass / (i - unread_tokens), torch.ones_like(mass))
        require(error <= AGREE[at.dtype], f"after {i} tokens a query of zeros sees a mass of {mass.max():.6g}")

    play(state, stream, cuts=range(0, stream.n, 17), after=look)


def check_selector_subset(method: Method, at: Setting) -> None:
    """Require that a selector reads only tokens that a query may see, at least one, and that empty slots do nothing.

    An empty slot is storage that holds no token; overwriting it must not change any answer.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    state: Any = method.open(spec)
    play(state, stream, present=some_absent(stream, at.seed))
    slots: Any = state.slots
    q, source = probes(spec), torch.Generator().manual_seed(at.seed)
    if state.selection is None:
        _check_hiding(method.parts.selector, state, q, source)
    else:
        _check_choosing(state, q, source)
    before = state.read(q).mean
    held = torch.zeros(int(slots.capacity.sum()), dtype=torch.bool)
    held[slots.live()] = True
    for _, name, numbers in slots._arrays():
        if name != "position":
            numbers[~held] = 50
    require_same_bits(state.read(q).mean, before, "answers before and after slots that hold no token were overwritten")


def _check_hiding(selector: Any, state: Any, q: Tensor, source: torch.Generator) -> None:
    """Raise Broken unless a selector without an index skips all slots that a query may not see, but never all slots.

    `state` holds tokens; q (rows, m, d) has m queries per row of width d. The slots that each query may not see are
    drawn at random from `source`.
    """
    view = state.slots.view()
    width = view.k.shape[1]
    for hidden_share in (0.0, 0.5, 0.9):
        hide = torch.rand(*q.shape[:2], width, generator=source) < hidden_share
        hide[:, :, 0] = False
        hide = hide if view.live is None else hide | ~view.live.unsqueeze(1)
        answer = selector.hide(q, view, state.spec, hide)
        if answer is None:
            raise Broken(f"asked to hide {int(hide.sum())} slots, the selector reads everything")
        unread = answer.expand(hide.shape)
        require(bool((unread | ~hide).all()), "the selector reads slots that it was told to hide")
        require(bool((~unread).any(-1).all()), "the selector reads nothing at all for some query")


def _check_choosing(state: Any, q: Tensor, source: torch.Generator) -> None:
    """Raise Broken unless a selector with an index chooses slots that a query may see, at least one and none twice.

    `state` holds tokens; q (rows, m, d) has m queries per row of width d. Some of a row's newest tokens are hidden from
    each query, all others are visible. The number of hidden tokens is drawn from `source`, at most the number of tokens
    that came since the last eviction.
    """
    held = state.slots.held.unsqueeze(1)
    newest = torch.minimum(held, (state.seen % state.block).unsqueeze(1).clamp_min(1))
    for share in (1.0, 0.5, 0.1):
        visible = held - (share * torch.rand(q.shape[:2], generator=source) * newest).floor().long()
        chosen = state.selection.choose(q, state.slots, visible)
        live, width = ~chosen.dead, int(state.slots.held.max())
        inside = (chosen.index >= 0) & (chosen.index < visible.unsqueeze(-1))
        require(bool((inside | chosen.dead).all()), "the selector reads slots beyond those that a query may see")
        read = (~chosen.unread(width)).sum(-1)
        require(torch.equal(read, live.sum(-1)), "the selector reads a slot twice for some query")
        require(bool((read > 0).all()), "the selector reads nothing at all for some query")
