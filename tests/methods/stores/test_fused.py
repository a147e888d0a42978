"""The kernel that reads codes in place answers as the torch form does, and decides nothing."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfloor.core.partial import Partial
from kvfloor.methods.stores import fused
from kvfloor.methods.stores.coded import CodedView
from tests.support import Stream, fed, opened, seeded, stream

pytest.importorskip("numba", reason='the kernel of stores needs numba: pip install "kvfloor[fast]", or make test-fast')

WIDTHS = ((1, 3), (5, 7), (12, 10), (64, 64), (80, 96), (128, 128), (130, 66))
BITS = range(2, 9)
METHODS = (
    *("exact:k{}v{}", "exact:k{}v{}(first=0)", "exact:k{}v{}(recent=16)", "exact:k{}v{}(first=0,recent=37)"),
    *("h2o(block=8):k{}v{}@70", "window(block=24):k{}v{}(first=2)@60"),
)
ROUNDING = 4e-6


def held(text: str, n: int, d: int, dv: int, rows: int = 3, ragged: bool = False, **spec: Any) -> Any:
    """Return a state of float32 that has seen n tokens per row or, if ragged, row i about a third less than row i + 1.

    Where the kernel must not look, behind the held tokens and at those that are not coded, codes are garbage.
    """
    state = opened(text, rows, d, dv, **({"dtype": torch.float32, "scale": d**-0.5} | spec))
    _, k, v = stream(seeded(n + d), rows, 1, n, d, dv, dtype=state.spec.dtype)
    present = None
    if ragged:
        present = torch.arange(n) < (torch.arange(1, rows + 1) * n // rows).unsqueeze(1)
    state.append(k + seeded(d)(1, 1, d, dtype=state.spec.dtype), v, *(() if present is None else (present,)))
    slots = state.slots
    for row, (offset, count, capacity) in enumerate(zip(slots.offset, slots.held, slots.capacity, strict=True)):
        place = torch.arange(int(offset), int(offset + capacity))
        at = slots.arrived(place)
        dead = (torch.arange(int(capacity)) >= count) | (at >= slots.coded[row]) | (at < slots.first)
        for part in (slots.key_codes, slots.value_codes):
            part.packed[place[dead]] = 173
            if hasattr(part, "scale"):
                part.scale[place[dead]] = torch.nan
    return state


def alike(view: CodedView, q: Tensor, spec: Any, hide: Tensor | None = None) -> None:
    """Raise AssertionError unless the kernel answers as the torch form does, up to float32 rounding.

    Both sum products in an order of their own, so a logit differs by units of the sum of these products' sizes. That
    counts for sharp queries: at a sum of 16 it is what is allowed for everything else.
    """
    assert fused.serves(view.owner) and q.shape[1] <= fused.MOST_QUERIES
    clean = {id(part): part.scale.clone() for part in (view.owner.key_codes, view.owner.value_codes) if part.turns}
    mine = view.over(q, spec, hide)
    for part in (view.owner.key_codes, view.owner.value_codes):
        if part.turns:
            part.scale.nan_to_num_(0)
    wanted = view.unpacked(q, spec, hide)
    k = view.owner.numbers("k", view.rows, view.width).float().abs()
    size = float((q.float().abs() @ k.transpose(1, 2)).amax()) * spec.scale if view.width else 0.0
    rounding = ROUNDING * max(1.0, size / 16)
    for part in (view.owner.key_codes, view.owner.value_codes):
        if part.turns:
            part.scale.copy_(clean[id(part)])
    assert mine.mean.dtype == mine.log_mass.dtype == torch.float32
    torch.testing.assert_close(mine.mean, wanted.mean, rtol=0, atol=rounding)
    torch.testing.assert_close(mine.log_mass, wanted.log_mass, rtol=1e-6, atol=rounding)


def asked(state: Any, m: int, rows: int | None = None, scale: float = 1.0) -> Tensor:
    return seeded(7)(rows or state.spec.rows, m, state.spec.d, dtype=torch.float32, scale=scale)


def visible(state: Any) -> tuple[CodedView, Tensor | None]:
    """Return a view of all slots, and a mask of those that hold no token."""
    view = state.slots.view()
    return view, None if view.live is None else ~view.live.unsqueeze(1)


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_every_number_of_bits(text: str, bits: int) -> None:
    for d, dv in WIDTHS:
        state = held(text.format(bits, 10 - bits), 140, d, dv)
        alike(*[visible(state)[0], asked(state, 3), state.spec])


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_rows_that_hold_different_numbers_of_tokens(text: str, softcap: float | None) -> None:
    for m in (1, 2, 5, 8):
        for n in (3, 31, 100, 150):
            state = held(text.format(4, 3), n, 20, 24, ragged=True, softcap=softcap)
            view, hide = visible(state)
            alike(view, asked(state, m), state.spec, hide)


@pytest.mark.parametrize("text", METHODS)
def test_few_tokens_and_none(text: str) -> None:
    for n in (1, 2, 5, 31, 32, 33, 64):
        state = held(text.format(3, 4), n, 16, 16)
        alike(visible(state)[0], asked(state, 2), state.spec)
    state = held(text.format(3, 4), 2, 16, 16, ragged=True)  # row 0 has none
    view, hide = visible(state)
    alike(view, asked(state, 2), state.spec, hide)
    empty = view.over(asked(state, 2), state.spec, hide)
    assert bool((empty.log_mass[0] == -torch.inf).all()) and not bool(empty.mean[0].any())


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_caches_of_16_bits(text: str, dtype: torch.dtype) -> None:
    state = held(text.format(4, 4), 150, 32, 40, dtype=dtype)
    alike(visible(state)[0], asked(state, 3), state.spec)


@pytest.mark.parametrize("text", METHODS)
def test_what_a_query_does_not_see(text: str) -> None:
    state = held(text.format(4, 4), 150, 16, 16, ragged=True)
    view, dead = visible(state)
    assert dead is not None
    drawn = torch.rand(3, 4, view.width, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.5, 0.98, 1.0):
        alike(view, asked(state, 4), state.spec, dead | (drawn < share))
        alike(view, asked(state, 4), state.spec, dead | (drawn[:, :1] < share))
    alike(view, asked(state, 4), state.spec, dead | (drawn[:1] < 0.5))


@pytest.mark.parametrize("text", METHODS)
def test_some_rows_and_the_first_slots(text: str) -> None:
    state = held(text.format(4, 5), 150, 16, 18)
    for rows, width in ((torch.tensor([2, 0]), 41), (torch.tensor([1]), 64), (None, 33)):
        view = state.slots.view(rows, width)
        alike(view, asked(state, 3, 3 if rows is None else len(rows)), state.spec)


@pytest.mark.parametrize("recent", [0, 16])
def test_sharp_queries_and_more_tokens_than_a_chunk(recent: int) -> None:
    for scale in (0.0, 1.0, 60.0):
        state = held(f"exact:k4v3(recent={recent})", 9000, 8, 8, ragged=True)
        view, hide = visible(state)
        alike(view, asked(state, 2, scale=scale), state.spec, hide)


def test_a_row_s_bits_do_not_depend_on_the_rows_beside_it() -> None:
    state = held("exact:k3v4", 9000, 24, 16, rows=4, ragged=True)
    view, hide = visible(state)
    q = asked(state, 3)
    whole, seen = fused.over_codes(view, q, state.spec, hide)
    for row in range(4):
        alone = state.slots.view(torch.tensor([row]))
        part, mine = fused.over_codes(alone, q[row : row + 1], state.spec, None)
        assert torch.equal(part.mean[0], whole.mean[row]) and torch.equal(part.log_mass[0], whole.log_mass[row])
        assert torch.equal(mine[0], seen[row])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_give_the_same_bits(two_threads: None) -> None:
    state = held("exact:k4v4", 9000, 16, 16)
    q, view = asked(state, 3), visible(state)[0]
    several = fused.over_codes(view, q, state.spec, None)[0]
    torch.set_num_threads(1)
    one = fused.over_codes(view, q, state.spec, None)[0]
    assert torch.equal(one.mean, several.mean) and torch.equal(one.log_mass, several.log_mass)


@pytest.mark.parametrize("halves", [True, False])
def test_both_forms_of_looking_levels_up(halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of processors which permute 8 numbers at once, and that of all others; codes 0 .. 15 stand everywhere."""
    numba, kernels = pytest.importorskip("numba"), fused._kernels()
    features = pytest.importorskip("llvmlite.binding").get_host_cpu_features()
    if halves and not features.get("avx2"):
        pytest.skip("this processor has no AVX2")
    asked: list[str] = []
    monkeypatch.setattr(kernels, "permutes_halves", lambda features: asked.append(features) or halves)
    look_up = kernels._look_up

    @numba.njit
    def both(words: Any, table: Any, out: Any) -> None:
        look_up(words, 0, table, out, 0)

    codes = np.random.default_rng(1).permutation(64) % 16
    words = (codes.reshape(8, 8).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)).sum(1, dtype=np.uint32)
    table = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    out = np.zeros(64, np.float32)
    both(words, table, out)
    assert asked and set(codes) == set(range(16))
    assert np.array_equal(out[[kernels.spot.py_func(c) for c in range(64)]], table[codes])


def test_nan_is_not_hidden() -> None:
    state = held("exact:k4v4", 100, 16, 16)
    q = asked(state, 2)
    q[1, 0, 3] = torch.nan
    out = visible(state)[0].over(q, state.spec).mean
    assert bool(out[1, 0].isnan().all()) and not bool(out[0].isnan().any()) and not bool(out[1, 1].isnan().any())


# ---- where it is used ------------------------------------------------------------------------------------------------


def steps(text: str, tokens: Stream, **spec: Any) -> tuple[Any, Tensor]:
    """Step through tokens one by one; return the state and all answers."""
    _, k, v = tokens
    state = opened(text, len(k), k.shape[2], v.shape[2], **({"dtype": k.dtype} | spec))
    return state, fed(state, tokens, *range(k.shape[1]))


@pytest.mark.parametrize("text", ["exact:k4v4", "h2o(block=8):k4v3@40", "sinks(2,block=8)+value_sum:k4v4@24"])
def test_steps_answer_alike_and_end_in_the_same_state(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = stream(seeded(3), 3, 2, 80, 16, 12, dtype=torch.float32)
    state, answers = steps(text, tokens)
    monkeypatch.setattr(fused, "serves", lambda slots: False)
    other, wanted = steps(text, tokens)
    torch.testing.assert_close(answers, wanted, rtol=0, atol=ROUNDING)
    assert state.to_bytes() == other.to_bytes()


@pytest.mark.parametrize("text", ["h2o(block=8):k4v3@40", "tova:k4v4@40", "snapkv(window=4,block=8):k4v4@40"])
def test_answers_decide_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = stream(seeded(4), 3, 2, 120, 16, 16, dtype=torch.float32)
    state, _ = steps(text, tokens)

    def garbage(view: CodedView, q: Tensor, spec: Any, hide: Tensor | None) -> Partial:
        return Partial(q.new_full((*q.shape[:2], spec.dv), 7.0), q.new_zeros(q.shape[:2]))

    monkeypatch.setattr(fused, "attention", garbage)
    other, answers = steps(text, tokens)
    assert bool((answers == 7).any()) and state.to_bytes() == other.to_bytes()


def test_where_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> Partial:
        raise AssertionError("the kernel was asked")

    monkeypatch.setattr(fused, "attention", refuse)
    state = held("exact:k4v4", 70, 16, 16)
    with pytest.raises(AssertionError, match="was asked"):
        visible(state)[0].over(asked(state, 8), state.spec)
    visible(state)[0].over(asked(state, 9), state.spec)
    for spec in ({"dtype": torch.float64}, {"tied": True}):
        _, k, v = stream(seeded(5), 3, 1, 70, 16, dtype=spec.get("dtype", torch.float32))
        other = opened("exact:k4v4", 3, 16, **({"dtype": torch.float32} | spec))
        other.append(k, k if "tied" in spec else v)
        other.slots.view().over(asked(other, 2), other.spec)
    monkeypatch.setattr(fused, "installed", lambda: False)
    visible(state)[0].over(asked(state, 8), state.spec)


# ---- mutants ---------------------------------------------------------------------------------------------------------


def changed(kernel: str, at: str, change: Any) -> Any:
    """Return the kernels, with one of them whose argument `at` is changed before each call."""
    kernels = fused._kernels()
    names = ("attend_chunks", "join", "add_given", "CHUNK", "TILE")
    right = getattr(kernels, kernel)
    index = right.py_func.__code__.co_varnames.index(at)

    def call(*given: Any) -> None:
        right(*given[:index], change(given[index]), *given[index + 1 :])

    return SimpleNamespace(**{name: getattr(kernels, name) for name in names} | {kernel: call})


@pytest.mark.parametrize(
    ("kernel", "at", "change"),
    [
        ("attend_chunks", "key_low", lambda x: np.roll(x, 1, 1)),  # the ranges of the group before
        ("attend_chunks", "key_range", lambda x: np.roll(x, -1, 1)),
        ("attend_chunks", "row", lambda x: x * 0),
        ("attend_chunks", "offset", lambda x: x + 1),
        ("attend_chunks", "coded", lambda x: x - 32),
        ("attend_chunks", "first", lambda x: x + 1),
        ("attend_chunks", "softcap", lambda x: 2 * x),
        ("attend_chunks", "value_scale", lambda x: np.roll(x, 1)),
        ("attend_chunks", "count", lambda x: x - 1),
        ("attend_chunks", "q", lambda x: np.roll(x, 1, 2)),
        ("add_given", "seen", lambda x: np.roll(x, 1, 2)),
        ("add_given", "seen", lambda x: x * 0),
        ("add_given", "row", lambda x: x * 0),
        ("add_given", "softcap", lambda x: 2 * x),
        ("add_given", "values", lambda x: np.roll(x, 1, 1)),
        ("add_given", "log_mass", lambda x: x + np.float32(0.01)),
    ],
)
def test_a_wrong_kernel_is_found(kernel: str, at: str, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state = held("exact:k4v4", 200, 16, 16, softcap=2.0)
    alike(visible(state)[0], asked(state, 2), state.spec)
    wrong = changed(kernel, at, change)
    monkeypatch.setattr(fused, "_kernels", lambda: wrong)
    with pytest.raises((AssertionError, IndexError)):
        alike(visible(state)[0], asked(state, 2), state.spec)
