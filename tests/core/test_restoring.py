"""A message under a good digest is restored only where its fields fit the method, the spec and each other."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfloor import CorruptState, Method, Spec, State, parse
from kvfloor.core import message
from kvfloor.methods.grammar import default_method
from kvfloor.methods.registry import TABLE
from tests.core.edited import live_on, played, redigested

SMALL = {"subgen_sketch": "subgen_sketch(s=8)", "subgen_tensor": "subgen_tensor(s=8)", "balance": "balance(batch=8)"}
VARIANTS = (
    "h2o(prefill=dense)@32",
    "snapkv(window=4,prefill=stream,decode=evict)@32",
    "raas(page=4,sinks=2,block=4)@32",
    "ridge_leverage(centre=True,kind=count,sketch=3)@32",
    "expected(heads=each)@32",
    "window+value_sample(copies=2,groups=3)@32",
    "window+moments(covariance=diagonal)@32",
    "window+value_sum@32:20",
    "h2o|pages(page=4,pages=2)@32",
    "exact|pages(page=4,pages=2)",
    "sinks|best_first(k=4,page=4)@32",
    "h2o|hip(k=8,key_block=2)@32",
    "exact|hip(k=8,key_block=2)",
    "h2o|zeta(k=4,chunk=8)@32",
    "exact|zeta(k=4,chunk=8)",
    "quant(bits=2,group=8)",
    "subgen_sketch(s=8,radius=2.0)",
    "subgen_sketch@64",
    "balance@64",
    "balance(batch=8,radius=3.0,spread=4.0,horizon=1000)",
    "tensor",
    "tensor(store=h2o)@32",
    "subgen_tensor(s=8)",
    "exact:k4v4",
    "h2o(block=8):k3v2(first=2)@24",
    "window+value_sum|pages(pages=2,page=4):k2v8(first=0)@20:32",
)
METHODS = tuple(dict.fromkeys([*(SMALL.get(name, str(default_method(name))) for name in TABLE), *VARIANTS]))


@cache
def state_of(text: str, sealed: bool) -> State:
    return played(parse(text), 1, sealed)


def require_refused_or_living(method: Method, data: bytes, draw: random.Random, told: list[str]) -> bool:
    """Whether it was restored; a restored state answers and goes on."""
    try:
        state = method.from_bytes(data)
    except CorruptState:
        return False
    try:
        live_on(state, draw)
    except Exception as error:
        raise AssertionError(f"{method} with {told} was restored and raised {type(error).__name__}") from error
    return True


@pytest.mark.parametrize("text", METHODS)
@settings(max_examples=12, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans(), st.integers(1, 2))
def test_an_edited_state_is_refused_or_lives_on(text: str, draw: random.Random, sealed: bool, edits: int) -> None:
    data, told = redigested(state_of(text, sealed), draw, edits)
    require_refused_or_living(parse(text), data, draw, told)


@pytest.mark.slow
@pytest.mark.parametrize("text", METHODS)
def test_edited_states_are_refused_or_live_on(text: str) -> None:
    method, restored = parse(text), 0
    for seed in range(600):
        draw = random.Random(seed)
        data, told = redigested(state_of(text, bool(seed % 2)), draw, 1 + seed % 3 // 2)
        restored += require_refused_or_living(method, data, draw, told)
    assert 0 < restored < 500


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("sealed", [False, True])
def test_an_unedited_state_is_restored(text: str, sealed: bool) -> None:
    state = state_of(text, sealed)
    assert state.method.from_bytes(state.to_bytes()).to_bytes() == state.to_bytes()


def edited(text: str, edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """The state's message after `edit` changed its fields and spec."""
    header, fields = message.unpack(state_of(text, True).to_bytes())
    edit(fields, header["spec"])
    return message.pack(header, fields)


def set_entry(*path: str, to: float, at: int = 0) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    def edit(fields: dict[str, Any], spec: dict[str, Any]) -> None:
        for name in path[:-1]:
            fields = fields[name]
        fields[path[-1]].view(-1)[at] = to

    return edit


def set_field(*path: str, to: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    def edit(fields: dict[str, Any], spec: dict[str, Any]) -> None:
        for name in path[:-1]:
            fields = fields[name]
        fields[path[-1]] = to

    return edit


@pytest.mark.parametrize(
    "text, edit, said",
    [
        ("h2o@64", set_entry("seen", to=-1), "seen has entries below 0"),
        ("h2o@64", set_entry("seen", to=2**62), "seen has entries above"),
        ("h2o@64", set_entry("seen", to=44), "position lies beyond"),
        ("h2o@64", set_field("seen", to=torch.tensor([45, 30, 1])), r"seen has shape \(3,\), not \(2\)"),
        ("h2o@64", set_field("seen", to=torch.tensor([45.0, 30.0])), "seen is torch.float32, not a torch.int64"),
        ("h2o@64", set_entry("budget", to=63), "tokens of the budget"),
        ("h2o@64", set_field("pins", to=torch.zeros(2, 1, 3, dtype=torch.int64)), "pins has shape"),
        ("h2o@64", set_field("pins", to=torch.tensor([[[0, 62]], [[0, 62]]])), "too small for h2o"),
        ("h2o@64", set_field("pins", to=torch.tensor([[[4, 3]], [[4, 3]]])), "start below its stop"),
        ("h2o@64", set_entry("slots", "held", to=97), "rows hold"),
        ("h2o@64", set_entry("slots", "held", to=-3), "slots/held has entries below 0"),
        ("h2o@64", set_entry("slots", "capacity", to=1), "rows hold"),
        ("h2o@64", set_entry("slots", "capacity", to=2**47), "more than this machine has"),
        ("h2o@64", set_entry("slots", "position", to=1), "the same position"),
        ("h2o@64", set_entry("slots", "k", to=torch.nan), "slots/k has NaN"),
        ("h2o@64", set_field("slots", "columns", to={}), "differ from this release's"),
        ("h2o@64", set_field("sealed", to=1), "sealed is 1, no bool"),
        ("h2o@64", set_field("block", to=0), "block is 0; a state opened for this method and spec has 32"),
        ("h2o@64", set_field("queries", to=None), None),
        ("h2o@64", set_field("seen", to=None), "seen is None, not a torch.int64"),
        ("h2o@64", set_field("slots", "k", to=None), "slots/k is None, not a torch.float32"),
        ("h2o@64", set_field("extra", to=1), "differ from this release's"),
        ("h2o@64", lambda fields, spec: fields.pop("asked"), "differ from this release's"),
        ("h2o@64", lambda fields, spec: spec.update(rows=2**40), "cannot be remembered in"),
        ("h2o@64", lambda fields, spec: spec.update(d=5), "has shape"),
        ("h2o@64", lambda fields, spec: spec.update(colour=5), "colour"),
        ("exact", set_entry("slots", "position", to=3), "the same position"),
        ("quant(bits=2,group=8)", set_entry("slots", "coded", to=8), "coded tokens"),
        ("subgen_sketch(s=8)", set_entry("keys", "count", to=0), "a cluster without keys"),
        ("subgen_sketch(s=8)", set_entry("pairs", "key", to=torch.nan), "pairs/key has entries below"),
        ("balance(batch=8)", set_entry("slots", "columns", "level", to=64), "level is 64 or more"),
        ("exact|zeta(k=4,chunk=8)", set_entry("selection", "sorted", "slot", to=2**20), "slots on a curve"),
        ("exact|zeta(k=4,chunk=8)", set_entry("selection", "sorted", "code", to=2**30), "out of order"),
        ("h2o|hip(k=8,key_block=2)@32", set_entry("selection", "order", "slot", to=99), "order of row 0"),
        ("exact|pages(page=4,pages=2)", set_entry("selection", "boxes", "held", to=10), "2 lists|items|pages"),
        ("tensor", set_entry("seen", to=44), "store/seen"),
        ("tensor", set_field("store", "sealed", to=False), "whether the prompt is over"),
        ("window_sample@64", set_entry("outside", "count", to=9), "tokens outside the window"),
    ],
)
def test_what_is_wrong_is_told(text: str, edit: Callable[..., object], said: str | None) -> None:
    data = edited(text, edit)
    if said is None:
        parse(text).from_bytes(data)
        return
    with pytest.raises(CorruptState, match=f"this is no state of .*({said})"):
        parse(text).from_bytes(data)


def test_rows_that_were_chosen_are_restored_with_their_budgets_and_room() -> None:
    state = parse("h2o@40:64").open(Spec(rows=2, d=4, dv=4))
    state.step(*(torch.randn(2, 1, 300, 4), torch.randn(2, 300, 4), torch.randn(2, 300, 4)))
    state.select_rows(torch.tensor([1, 1, 0]))
    assert state.method.from_bytes(state.to_bytes()).to_bytes() == state.to_bytes()
    exact = parse("exact").open(Spec(rows=2, d=4, dv=4))
    present = torch.ones(2, 3000, dtype=torch.bool)
    present[1, 3:] = False
    exact.append(torch.randn(2, 3000, 4), torch.randn(2, 3000, 4), present)
    exact.select_rows(torch.tensor([1]))  # 3 tokens in the room of 3,000
    assert exact.method.from_bytes(exact.to_bytes()).to_bytes() == exact.to_bytes()
