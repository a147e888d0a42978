"""After a failure in the middle of a call a state is as it was, or refuses every further call."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from kvfloor import Bounded, BrokenState, Held, Policy, Spec, State, parse
from kvfloor.check import Setting
from kvfloor.check.breaking import broken, situations
from kvfloor.check.faults import Faults, Injected, operations, public_calls, spread_out
from kvfloor.core.bounded import BoundedState
from kvfloor.core.selector import Selector
from kvfloor.core.slots import View
from kvfloor.methods.grammar import default_method
from kvfloor.methods.policies.window import Window
from kvfloor.methods.registry import TABLE
from kvfloor.methods.variants.visual import NextScale
from tests import support
from tests.support import Draw, Stream, between, stream

QUICK = (
    "exact",
    "sinks(2,block=4)@16",
    "h2o(block=4)@16",
    "window(block=4)+value_sum@16",
    "snapkv(window=4,block=4)@16",
    "exact|pages(pages=2,page=4)",
)
STRIDED = (
    "subgen_sketch(block=4,s=16)",
    "balance@32",
    "quant(group=8)",
    "window(block=4)+taylor@16",
    "exact|zeta(k=8)",
    "tensor(store=sinks(2,block=4))@16",
    "subgen_tensor(t=2,s=8,block=4)",
    "exact:k4v4",
    "h2o(block=4):k3v2@40",
)
EVERY = tuple(dict.fromkeys(str(default_method(name, budget=24)) for name in TABLE)) + STRIDED
MOST = 150  # points of a call in the slow table: it may have thousands of operations


def require_whole(text: str, most: int | None, g: int = 2) -> None:
    for what, (state, call) in situations(parse(text), Setting(g=g)).items():
        tally = broken(state, call, most)
        assert not tally.silent, (what, tally.silent[:3])
        assert tally.points or what == "a seal", what


@pytest.mark.parametrize("text", QUICK)
def test_a_call_that_fails_anywhere_changes_nothing_or_the_state_refuses(text: str) -> None:
    require_whole(text, 12)


@pytest.mark.parametrize("text", STRIDED)
def test_it_is_so_for_sketches_summaries_and_variants(text: str) -> None:
    require_whole(text, 4)


@pytest.mark.parametrize("text", ["exact", "h2o(block=4)@16"])
def test_it_is_so_for_one_token_at_every_operation(text: str) -> None:
    calls = situations(parse(text), Setting(g=2))
    for what in ("a step of one token", "a step of one token that ends a block"):
        tally = broken(*calls[what])
        assert not tally.silent and tally.as_before and tally.refused, (what, tally)


@pytest.mark.slow
@pytest.mark.parametrize("g", [1, 4])
@pytest.mark.parametrize("text", EVERY)
def test_it_is_so_for_every_registered_method(text: str, g: int) -> None:
    require_whole(text, MOST, g)


def test_points_cover_the_whole_call() -> None:
    assert spread_out(5, None) == spread_out(5, 9) == [1, 2, 3, 4, 5]
    points = spread_out(1000, 10)
    assert points[0] == 1 and points[-1] == 1000 and len(points) == 10


# ---- what a broken state does ------------------------------------------------------------------------------


def opened(draw: Draw, text: str = "h2o(block=4)@16", tokens: int = 23, g: int = 2) -> tuple[State, Stream]:
    """A state that has seen these tokens, and the nine that follow."""
    whole = stream(draw, 2, g, tokens + 9, 8, dtype=torch.float32)
    state = support.opened(text, 2, 8, scale=0.3, seed=1, dtype=torch.float32)
    state.step(*between(whole, 0, tokens))
    return state, between(whole, tokens)


def break_off(state: State, more: tuple[Tensor, ...]) -> None:
    twin = state.clone()
    with pytest.raises(Injected), Faults(operations(lambda: twin.step(*more)) - 20):
        state.step(*more)


def test_every_call_refuses_and_says_which_call_broke_off_and_what_to_do(draw: Draw) -> None:
    state, more = opened(draw)
    break_off(state, more)
    for call in public_calls(state).values():
        with pytest.raises(BrokenState, match=r"^step broke off .* reset\(\) .* new state, or load"):
            call()
    assert isinstance(BrokenState("x"), RuntimeError)
    assert state.broken and state.nbytes > 0 and state.held.shape == (2,) and "BoundedState" in repr(state)


def test_a_deep_copy_of_a_broken_state_is_broken_and_an_earlier_one_is_not(draw: Draw) -> None:
    state, more = opened(draw)
    kept, expected = state.clone(), state.clone().step(*more)
    break_off(state, more)
    with pytest.raises(BrokenState):
        copy.deepcopy(state).read(more[0][:, 0])
    assert torch.equal(kept.step(*more), expected)


def test_the_mark_is_no_part_of_bytes_message_or_copy(draw: Draw) -> None:
    state, more = opened(draw)
    plain, nbytes = state.to_bytes(), state.nbytes
    state._underway = "step"
    copied = copy.deepcopy(state)
    assert state.nbytes == nbytes and copied.broken and state.peak_nbytes >= nbytes
    state._underway = None
    assert state.to_bytes() == plain and not state.clone().broken and not state.method.from_bytes(plain).broken
    state.step(*more)
    assert not state.broken and "_underway" not in state.export()


@pytest.mark.parametrize("tokens", [1, 5])
def test_another_group_is_refused_before_anything_changes(draw: Draw, tokens: int) -> None:
    """It used to be found out in the middle."""
    state, (q, k, v) = opened(draw)
    before, other = state.to_bytes(), torch.cat([q, q], 1)
    for call in (state.step, state.step_partial):
        with pytest.raises(ValueError, match="the GQA group was 2 so far and is 4 now"):
            call(other[:, :, :tokens], k[:, :tokens], v[:, :tokens])
    assert state.to_bytes() == before
    state.step(q, k, v)


# ---- whose code may raise ----------------------------------------------------------------------------------


def test_a_listener_that_raises_breaks_the_state_even_with_ctrl_c(draw: Draw) -> None:
    for error in (KeyboardInterrupt, ValueError):
        state, more = opened(draw, "window(block=4)@16")

        def fail(row: Tensor, position: Tensor, error: type[BaseException] = error) -> None:
            raise error("in the middle")

        assert isinstance(state, BoundedState)
        state.on_evict = fail
        with pytest.raises(error):
            state.step(*more)
        with pytest.raises(BrokenState):
            state.read(more[0][:, 0])


def test_a_listener_that_asks_the_state_is_refused(draw: Draw) -> None:
    state, more = opened(draw, "window(block=4)@16")
    assert isinstance(state, BoundedState)
    state.on_evict = lambda row, position: print(state.read(more[0][:, 0]))
    with pytest.raises(BrokenState, match="has not returned yet"):
        state.step(*more)


@dataclass(frozen=True)
class Moody(Policy):
    """Fails at the third eviction."""

    name: ClassVar[str] = "moody"
    calls: list[int] = field(default_factory=list, compare=False)

    def priority(self, held: Held) -> Tensor:
        self.calls.append(1)
        if len(self.calls) == 3:
            raise ZeroDivisionError("a policy's mistake")
        return held.position.double()


@dataclass(frozen=True)
class Sulky(Selector):
    """Fails once it is asked with more than ten slots."""

    name: ClassVar[str] = "sulky"

    def hide(self, q: Tensor, view: View, spec: Spec, hide: Tensor | None) -> Tensor | None:
        if view.k.shape[1] > 10:
            raise ZeroDivisionError("a selector's mistake")
        return hide

    def bytes_read(self, held: Tensor, spec: Spec) -> int:
        return 0


@pytest.mark.parametrize(
    "method", [Bounded(Moody(), budget=6, block=2), Bounded(Window(), selector=Sulky(), budget=16, block=4)]
)
def test_a_third_partys_mistake_breaks_the_state(draw: Draw, method: Bounded) -> None:
    state = method.open(Spec(rows=1, d=4, dv=4))
    q, k = draw(1, 1, 40, 4, dtype=torch.float32), draw(1, 40, 4, dtype=torch.float32)
    with pytest.raises(ZeroDivisionError):
        for i in range(40):
            state.step(q[:, :, i : i + 1], k[:, i : i + 1], k[:, i : i + 1])
    with pytest.raises(BrokenState, match="step broke off"):
        state.append(k[:, :1], k[:, :1])


def test_a_scale_of_which_only_a_part_was_learnt_breaks_its_driver(draw: Draw) -> None:
    for at in range(1, 400, 13):
        state, (q, k, v) = opened(draw, "h2o(block=4)@16")
        driver = NextScale(state)
        twin = state.clone()
        expected = NextScale(twin).step(q, k, v)
        try:
            with Faults(at):
                driver.step(q, k, v)
        except Injected:
            try:
                assert torch.equal(driver.step(q, k, v), expected) and state.to_bytes() == twin.to_bytes()
            except BrokenState:
                continue
