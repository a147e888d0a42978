"""The kernel of certified reads: its answers err at most by its own bounds, which are about as small as torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.certify.certified import Certified
from kvfloor.methods.stores import fused
from kvfloor.methods.tiered import kernel, kernel_library
from kvfloor.methods.tiered.fetch import CertifiedReader
from kvfloor.methods.tiered.tiered import Tiered, TieredState
from tests.certify.families import FAMILIES, queries
from tests.certify.test_trials import truth
from tests.faulty_c import faulty
from tests.support import seeded

pytestmark = pytest.mark.skipif(not kernel.installed(), reason="the kernel needs a C compiler, such as gcc or clang")

WIDTHS = ((64, 64), (32, 128), (96, 64), (128, 64))
ALL = 1e6  # an epsilon with which nothing is fetched
M = 6


def filled(
    k: Tensor, v: Tensor, softcap: float | None = None, present: Tensor | None = None, **how: Any
) -> TieredState:
    """Return a state of tokens k (rows, n, d) and v (rows, n, dv), in pages of 32 unless `how` says otherwise."""
    rows, _, d = k.shape
    options: dict[str, Any] = {"page": 32, "recent": 32} | how
    state = Tiered(**options).open(Spec(rows, d, v.shape[2], d**-0.5, softcap, dtype=k.dtype))
    state.append(k, v, *(() if present is None else (present,)))
    return state


def drawn(seed: int, n: int, d: int = 64, dv: int = 64, rows: int = 2, scale: float = 1.0) -> tuple[Tensor, ...]:
    draw = seeded(seed)
    k, v, q = (draw(rows, t, w, dtype=torch.float32) for t, w in ((n, d), (n, dv), (M, d)))
    return k * scale, v, q


def hot(state: TieredState) -> Any:
    assert state.hot is not None and kernel.serves(state.hot)
    return state.hot


def in_torch(state: TieredState, q: Tensor, hide: Tensor | None = None) -> Certified:
    """Return what torch answers, without fetching."""
    reader = CertifiedReader(state.spec, hot(state), state.slots, ALL)  # type: ignore[arg-type]
    return reader._read(q.unsqueeze(1), hide, torch.ones(q.shape[:2], dtype=torch.bool), None)[0]


def wrong(found: Certified, exact: Tensor) -> int:
    """Return how many answers err more than their bound."""
    return int((~((found.partial.mean.double() - exact).norm(dim=-1) <= found.bound)).sum())


def alike(state: TieredState, q: Tensor, k: Tensor, v: Tensor) -> Certified:
    """Raise AssertionError unless the kernel's answers to q and torch's agree, and bound their errors alike."""
    mine, wanted, exact = kernel.read(hot(state), q, None), in_torch(state, q), truth(q, k, v, state.spec)
    assert not wrong(mine, exact)
    apart = (mine.partial.mean - wanted.partial.mean).norm(dim=-1)
    assert bool((apart <= 2e-5 * wanted.largest).all())
    torch.testing.assert_close(mine.partial.log_mass, wanted.partial.log_mass, rtol=1e-5, atol=2e-5)
    assert bool((mine.largest >= wanted.largest * (1 - 1e-4)).all())  # which torch takes from the codes
    assert bool((mine.largest <= v.double().norm(dim=-1).amax(-1, keepdim=True)).all())
    for name in ("error", "spread"):
        size = wanted.largest if name == "error" else 1.0
        assert bool((getattr(mine, name) <= 1.05 * getattr(wanted, name) + 2e-4 * size).all())
    return mine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", WIDTHS)
def test_widths_bits_and_dtypes(widths: tuple[int, int], dtype: torch.dtype) -> None:
    for extra in (0, 1, 2, 4):
        k, v, q = (x.to(dtype) for x in drawn(extra, 300, *widths))
        for softcap in (None, 3.0):
            state = filled(k, v, softcap, extra=extra, page=32 if extra % 4 else 64)
            if extra == 1 and widths[0] < 128 and widths[0] != 64:
                assert state.hot is not None and not kernel.serves(state.hot)  # further bits that fill no whole words
                continue
            alike(state, q, k, v)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_answer_errs_more_than_its_bound(name: str) -> None:
    """Over adversarial keys and values of all sizes, with the heaviest tokens among the coded ones."""
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        draw = seeded(100 * seed + 7)
        d, dv = WIDTHS[seed]
        k = FAMILIES[name](draw, 2, 230, d).to(dtype)
        v = (draw(2, 230, dv) * torch.logspace(-1, 1, 230, dtype=torch.float64).unsqueeze(1)).to(dtype)
        q = queries(draw, k.double(), 24).to(dtype)
        state = filled(k, v, (None, 4.0)[seed % 2], recent=0)
        for start in range(0, 24, fused.MOST_QUERIES):
            asked = q[:, start : start + fused.MOST_QUERIES]
            found, exact = kernel.read(hot(state), asked, None), truth(asked, k, v, state.spec)
            assert not wrong(found, exact)
            for epsilon in (0.05, 1e-3):  # what the kernel leaves unsure is fetched
                answer = state.read_certified(asked, epsilon)
                assert not wrong(answer, exact)


def test_a_long_row_and_sharp_queries() -> None:
    k, v, q = drawn(3, 3000, rows=1)
    state = filled(k, v, page=64, recent=256)
    for scale in (0.0, 0.1, 1.0, 8.0):
        alike(state, q * scale, k, v)


def test_few_tokens_and_none() -> None:
    for n in (1, 3, 5, 31, 32, 33, 64, 65, 97):
        for recent in (0, 32):
            k, v, q = drawn(n, n)
            alike(filled(k, v, recent=recent), q, k, v)
    k, v, q = drawn(1, 70)
    alike(filled(k, v, recent=0, first=50), q, k, v)
    alike(filled(k, v, recent=0, first=0), q, k, v)
    none = kernel.read(hot(filled(k[:, :0], v[:, :0])), q, None)
    assert bool((none.partial.log_mass == -torch.inf).all()) and not bool(none.partial.mean.any())
    assert not bool(none.bound.any())


def test_rows_of_different_lengths_answer_as_each_row_alone() -> None:
    k, v, q = drawn(5, 400, rows=4)
    present = torch.arange(400) < torch.tensor([400, 130, 3, 0]).unsqueeze(1)
    state = filled(k, v, present=present, page=64)
    found = kernel.read(hot(state), q, None)
    for row, n in enumerate((400, 130, 3)):
        here = slice(row, row + 1)
        alone = kernel.read(hot(filled(k[here, :n], v[here, :n], page=64)), q[here], None)
        for name in ("error", "spread", "largest"):  # the longest row decides how much the sums of all are allowed
            torch.testing.assert_close(getattr(alone, name)[0], getattr(found, name)[row], rtol=1e-4, atol=0)
        assert torch.equal(alone.partial.mean[0], found.partial.mean[row])
        assert not wrong(alone, truth(q[here], k[here, :n], v[here, :n], state.spec))
    assert bool((found.partial.log_mass[3] == -torch.inf).all())


def test_hidden_tokens_are_no_part_of_an_answer() -> None:
    k, v, q = drawn(6, 200)
    v[:, 60] *= 50.0  # the largest value
    state = filled(k, v)
    mask = torch.rand(2, M, 200, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.6, 0.97):
        hide = mask < share
        hide[:, 0, 60], hide[:, 0, 199] = True, False
        found = kernel.read(hot(state), q, hide)
        logits = (q.double() @ k.double().transpose(1, 2) * state.spec.scale).masked_fill(hide, -torch.inf)
        seen = ~hide.all(-1)
        exact = torch.softmax(logits, -1) @ v.double()
        assert not wrong(found, exact.where(seen.unsqueeze(-1), torch.zeros((), dtype=torch.float64)))
        most = v.double().norm(dim=-1).unsqueeze(1).masked_fill(hide, 0).amax(-1)
        assert bool((found.largest <= most).all()) and bool((found.largest >= 0.97 * most).all())
    everything = kernel.read(hot(state), q, torch.ones(2, M, 200, dtype=torch.bool))
    assert bool((everything.partial.log_mass == -torch.inf).all()) and not bool(everything.error.any())


def test_what_the_kernel_leaves_unsure_is_fetched_for_these_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v, q = drawn(7, 300, rows=3)
    q = torch.cat((q[:1] * 0.01, q[1:2] * 12, q[2:] * 0.01))
    state, asked, real = filled(k * 3, v), [], CertifiedReader._read

    def counted(self: Any, q: Tensor, hide: Tensor | None, real_: Tensor, rows: Tensor | None) -> Any:
        asked.append(None if rows is None else rows.tolist())
        return real(self, q, hide, real_, rows)

    monkeypatch.setattr(CertifiedReader, "_read", counted)
    grouped = q.view(3, 3, 2, 64)
    found = state.read_certified(grouped, 0.002)
    assert asked == [[1]] and state.tally.queries == 6 and state.tally.unfetched == 4 and state.tally.tokens > 0
    assert bool(found.within(0.002).all())
    exact = truth(q, k * 3, v, state.spec).view(3, 3, 2, 64)
    assert not wrong(found, exact)
    state.read_certified(grouped * 0.01, 0.05)
    assert len(asked) == 1


def test_steps_answer_alike_with_and_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded chunks, single tokens, chosen rows and dropped tokens; the saved state has the same bytes."""
    draw = seeded(8)
    k, v, q = (draw(*shape, dtype=torch.float32) for shape in ((3, 240, 64), (3, 240, 64), (3, 2, 240, 64)))
    present = torch.rand(3, 240, generator=torch.Generator().manual_seed(2)) > 0.4

    def lived() -> tuple[TieredState, list[Tensor]]:
        state = Tiered(epsilon=0.01, page=32, recent=32).open(Spec(3, 64, 64, 0.125))
        answers, at = [], 0
        for size, padded in ((150, False), *[(1, False)] * 20, (3, True), *[(1, True)] * 20, (4, False)):
            cut = slice(at, at + size)
            given = (present[:, cut],) if padded else ()
            answers.append(state.step(q[:, :, cut], k[:, cut], v[:, cut], *given))
            at += size
        state.select_rows(torch.tensor([2, 0, 0]))
        answers.append(state.step(q[:, :, at : at + 1], k[:, at : at + 1], v[:, at : at + 1]))
        state.forget(torch.tensor([0, 0]), torch.tensor([7, 60]))
        answers.append(state.attend(q[:, :, at : at + 1]))
        return state, answers

    calls, real = [], kernel.RefinedReading
    monkeypatch.setattr(kernel, "RefinedReading", lambda *given: (calls.append(1), real(*given))[1])
    mine, answers = lived()
    count = len(calls)
    monkeypatch.setattr(kernel, "serves", lambda hot: False)
    theirs, wanted = lived()
    assert count == len(calls) and count > 40
    assert mine.to_bytes() == theirs.to_bytes() and mine.nbytes == theirs.nbytes
    assert mine.tally.queries == theirs.tally.queries
    most = float(v.norm(dim=-1).max())
    for one, other in zip(answers, wanted, strict=True):
        assert bool(((one - other).norm(dim=-1) <= 2 * 0.01 * most).all())


def test_numbers_that_are_not_finite_bound_nothing() -> None:
    k, v, q = drawn(9, 200)
    state = filled(k, v)
    for q_scale in (1e37, 1e20):
        huge = kernel.read(hot(state), q * q_scale, None)
        assert bool(huge.bound.isinf().all()) and bool(huge.partial.mean.isfinite().all())
    hot(state).codes.columns.radius[hot(state).codes.offset[1] + 50] = torch.nan
    found = kernel.read(hot(state), q, None)
    assert bool(found.bound[1].isinf().all()) and bool(found.bound[0].isfinite().all())
    spoilt = filled(k, v)
    hot(spoilt).reach[0] = torch.inf
    assert bool(kernel.read(hot(spoilt), q, None).bound[0].isinf().all())


def test_where_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v, q = drawn(10, 100)
    state = filled(k, v)
    assert kernel.serves(hot(state))
    for other in (
        filled(k.double(), v.double()),
        filled(k[..., :40], v),
        filled(k, v[..., :48]),
        filled(k, v, page=16),
        filled(k, v, delta=1e-3),
        filled(k, v, planes=True),
    ):
        assert other.hot is not None and not kernel.serves(other.hot)
    tied = Tiered(page=32).open(Spec(2, 64, 64, tied=True))
    assert tied.hot is not None and not kernel.serves(tied.hot)
    state.forget(torch.tensor([0]), torch.tensor([9]))
    assert state.hot is not None and not kernel.serves(state.hot)
    state = filled(k, v)
    monkeypatch.setattr(kernel, "RefinedReading", lambda *given: pytest.fail("the kernel was asked"))
    with pytest.raises(pytest.fail.Exception):
        state.read_certified(q)
    state.read_certified(torch.cat((q, q), 1))
    monkeypatch.setattr(kernel, "installed", lambda: False)
    state.read_certified(q)


def test_the_kernels_exponential_errs_by_less_than_is_allowed_for() -> None:
    x = np.concatenate([np.linspace(-80, 0, 1 << 18), -np.geomspace(1e-8, 80, 1 << 16)]).astype(np.float32)
    out = np.empty_like(x)
    library = kernel_library.library()
    assert library is not None
    library.exponentials(x.ctypes.data, out.ctypes.data, len(x))
    exact = np.exp(x.astype(np.float64))
    assert float(np.abs(out / exact - 1).max()) < 2.0**-22


# ---- values that are not read ----------------------------------------------------------------------------------------


def unread(state: TieredState, q: Tensor, epsilon: float, **changes: Any) -> tuple[Certified, Tensor]:
    """Return the kernel's answers to q, and the share of each query's mass whose values it did not read."""
    given = kernel.arguments(hot(state), q, None, epsilon) | changes
    kernel.run(given, 1)
    return kernel.found(given), given["unread"]


def tilted(n: int = 2048) -> tuple[Tensor, ...]:
    """Return tokens whose light ones all have the value e_1, and whose heavy ones have -e_1: the worst to leave out."""
    k, v, q = drawn(21, n, rows=1)
    v = v * 1e-3
    v[..., 0] = -(k @ q[0, 0] > 2).float() * 2 + 1
    return k, v, q[:, :1] * 2


def test_values_of_light_tokens_stay_unread_and_are_allowed_for() -> None:
    for (k, v, q), epsilons in ((drawn(20, 3000, rows=1), (0.0, 0.05, 0.1, 0.3)), (tilted(), (0.0, 0.1, 0.3))):
        state = filled(k, v, page=64, recent=64)
        exact, before = truth(q, k, v, state.spec), -1.0
        for epsilon in epsilons:
            found, left = unread(state, q, epsilon)
            assert not wrong(found, exact)
            assert float(left.mean()) > before and bool((left <= epsilon).all())
            assert epsilon == 0 or bool(found.within(epsilon).all())
            before = float(left.mean())


def test_what_is_certified_with_all_values_is_certified_without_some() -> None:
    """Where unread values would make a bound too large, they are read."""
    k, v, q = drawn(22, 3000, rows=2)
    state = filled(k, v, page=64, recent=64)
    whole = kernel.read(hot(state), q, None)
    for epsilon in (0.8, 1.0, 1.2, 2.0):
        most = epsilon * float(whole.relative.median())
        for share in (0.5, 5.0, 50.0):  # far more than the kernel takes
            found, _ = unread(state, q, most, share=share)
            assert bool((found.within(most) | ~whole.within(most * 0.97)).all())


def test_an_answer_does_not_depend_on_other_queries_or_rows() -> None:
    k, v, q = drawn(23, 2000)
    state = filled(k, v, page=64, recent=64)
    together, left = unread(state, q, 0.1)
    assert float(left.min()) > 0
    for i in range(M):
        alone, own = unread(state, q[:, i : i + 1], 0.1)
        torch.testing.assert_close(own[:, 0], left[:, i], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(alone.partial.mean[:, 0], together.partial.mean[:, i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.error[:, 0], together.error[:, i], rtol=1e-3, atol=1e-6)


# ---- tokens that are fetched -----------------------------------------------------------------------------------------


def fetching(state: TieredState, q: Tensor, epsilon: float, hide: Tensor | None = None) -> tuple[Certified, int]:
    """Return the kernel's answers to q (rows, m, d) once it has fetched, and how many tokens it fetched for them."""
    reader = CertifiedReader(state.spec, hot(state), state.slots, epsilon)  # type: ignore[arg-type]
    found, fetched, _ = reader._kernel(q.unsqueeze(1), hide, None)
    return found, int(fetched.sum())


def fetched_rightly() -> None:
    """Raise AssertionError if an answer errs too much once tokens are fetched for it, or if that makes few sure."""
    sure = asked = 0
    for seed, scale in ((31, 1.0), (32, 4.0), (33, 12.0), (34, 60.0)):
        k, v, q = drawn(seed, 1500, rows=2)
        state = filled(k, v, (None, 8.0)[seed % 2], page=64, recent=64)
        exact = truth(q * scale, k, v, state.spec)
        for epsilon in (3e-3, 1e-3, 3e-4):
            found, many = fetching(state, q * scale, epsilon)
            assert not wrong(found, exact)
            before = kernel.read(hot(state), q * scale, None, epsilon).within(epsilon)
            assert bool((found.within(epsilon) | ~before).all()) and (many > 0) == (not bool(before.all()))
            sure, asked = sure + int((found.within(epsilon) & ~before).sum()), asked + int((~before).sum())
    assert asked > 100 and sure > 30
    bounded_as_by_torch()


def bounded_as_by_torch() -> None:
    """Raise AssertionError if a bound with fetched tokens is much less than torch's with the same tokens."""
    k, v, q = drawn(38, 800, rows=1)
    v = v + 2  # so that the light tokens' values have a mean
    state, asked = filled(k, v, page=64, recent=64), q[:, :2, None] * 2  # a token heavy for one is light for the other
    reader = CertifiedReader(state.spec, hot(state), state.slots, 1e-5)  # type: ignore[arg-type]
    one, none = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with kernel.RefinedReading(hot(state), asked.flatten(1, 2), None, 1e-5) as reading:
        token, many = reading.wanted(one, none, 1)
        place = state.slots.at(token.unsqueeze(1), one)
        fetched = [x.squeeze(1) for x in state.slots.pair(place)]  # type: ignore[operator]
        reading.refine(one, none, 1, (token, many, *fetched))
        mine = reading.found().error.clone()
    glimpse, decoded = hot(state).glimpse(asked.flatten(1, 2), None, None)
    glimpse = reader._with(glimpse, asked, decoded, token.unsqueeze(1), place, torch.ones_like(place) > 0)
    wanted = glimpse.answer(0.0)[0].error
    assert bool((mine >= 0.97 * wanted).all() and (mine <= 1.2 * wanted).all())


def test_fetched_tokens_make_queries_sure_and_no_bound_is_broken() -> None:
    fetched_rightly()


def test_a_mass_is_bounded_once_all_that_made_it_large_is_fetched() -> None:
    """What was coded far too large leaves its rounding in the sums."""
    draw = seeded(37)
    k, v, q = (draw(1, *shape, dtype=torch.float32) for shape in ((192, 32), (192, 64), (1, 32)))
    k, q = k * 0.1, q * 3
    k[..., 0], k[..., 1], q[..., :2] = -9.9, 0.0, 4 * 32**0.5
    k[:, 40:52, 0] = -4.0  # coded as 0
    k[:, (60, 124), 0] = -2550.0
    k[:, (61, 62, 125), :2] = torch.tensor([0.0, -15.0])
    state = filled(k, v, page=64, recent=0, extra=0, first=0)
    found, many = fetching(state, q, 0.3)
    mass = ((q.double() @ k.double().transpose(1, 2)) * state.spec.scale).logsumexp(-1)
    assert many >= 12 and bool(((mass - found.partial.log_mass).expm1().abs() <= found.spread).all())


def test_what_is_fetched_is_seen_by_some_query() -> None:
    k, v, q = drawn(35, 600, rows=2)
    state = filled(k, v, page=64, recent=64)
    hide = torch.rand(2, M, 600, generator=torch.Generator().manual_seed(1)) < 0.7
    found, many = fetching(state, q * 6, 1e-3, hide)
    weight = (q * 6).double() @ k.double().transpose(1, 2) * state.spec.scale
    exact = weight.masked_fill(hide, -torch.inf).softmax(-1) @ v.double()
    assert many > 0 and not wrong(found, exact)


def near_as_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise AssertionError if the kernel, fetching from memory itself, differs from a loop that fetches for it."""
    for seed, dtype in ((41, torch.float32), (42, torch.bfloat16)):
        k, v, q = (x.to(dtype) for x in drawn(seed, 900, rows=3))
        present = torch.ones(3, 900, dtype=torch.bool)
        present[1, 500:] = False
        state = filled(k, v, page=64, recent=64, present=present)
        reader = CertifiedReader(state.spec, hot(state), state.slots, 1e-3)  # type: ignore[arg-type]
        asked = q.float() * 8
        for one, real in (
            (asked.unsqueeze(2), None),
            (asked.unflatten(1, (3, 2)), torch.tensor([[1, 1], [1, 0], [0, 1]]) > 0),
        ):
            near = reader._kernel(one, None, real)
            with monkeypatch.context() as patch:
                patch.setattr(kernel.Near, "reached", classmethod(lambda *given: None))
                far = reader._kernel(one, None, real)
            assert int(near[1].sum()) > 50 and torch.equal(near[1], far[1]) and torch.equal(near[2], far[2])
            close = (
                {"rtol": 0.0, "atol": 0.0} if real is None else {"rtol": 1e-5, "atol": 1e-6}
            )  # else in another order
            for name in ("error", "spread", "largest"):
                torch.testing.assert_close(getattr(near[0], name), getattr(far[0], name), **close)
            torch.testing.assert_close(near[0].partial.mean, far[0].partial.mean, **close)


def test_the_kernel_fetches_from_memory_what_a_loop_would_fetch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    near_as_far(monkeypatch)


def test_where_tokens_are_fetched_from_memory() -> None:
    k, v, _ = drawn(43, 100)
    none = torch.zeros(2, 1, dtype=torch.bool)
    for dtype, cold, reached in (
        (torch.float32, "device", True),
        (torch.bfloat16, "device", True),
        (torch.float16, "device", False),
        (torch.float32, "ram", False),
    ):
        state = filled(k.to(dtype), v.to(dtype), cold=cold)
        assert (kernel.Near.reached(state.slots, none, none.long()) is not None) == reached


NEAR_FAULTS = {
    "a row's tokens begin one later": (
        "int64_t place = g->near[r] + w->near_token[f];",
        "int64_t place = g->near[r] + w->near_token[f] + 1;",
    ),
    "16 bits are taken for 32": ("if (!g->halves) memcpy", "if (g->d) memcpy"),
    "padding fetches": ("while (!g->idle[r * g->positions + p] && ", "while ("),
    "they are not counted": ("g->fetched[r * g->positions + p] += count;", ""),
}


@pytest.mark.parametrize("name", NEAR_FAULTS)
def test_a_fault_in_fetching_from_memory_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_a_fault(*NEAR_FAULTS[name], monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        near_as_far(monkeypatch)


def test_memory_that_a_reading_holds_is_given_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v, q = drawn(36, 300, rows=2)
    state = filled(k, v)
    with pytest.raises(RuntimeError, match="stop"), kernel.RefinedReading(hot(state), q * 6, None, 1e-3) as reading:
        assert bool((reading._given["kept"] != 0).all())
        raise RuntimeError("stop")
    assert not bool((reading._given["kept"] != 0).any())
    failing = kernel.RefinedReading(hot(state), q * 6, None, 1e-3)

    def interrupted(*given: Any) -> None:
        certify(*given)
        raise KeyboardInterrupt

    certify = kernel.certify
    monkeypatch.setattr(kernel, "certify", interrupted)
    with pytest.raises(KeyboardInterrupt), failing:
        pass
    assert not bool((failing._given["kept"] != 0).any())


FETCH_FAULTS = {
    "fetched tokens count twice": ("            leave_out(g, w, r, i, token[f]);\n", ""),
    "their values are those of the codes' middle": ("fetched->values[c] += weight * (double)value[c];", ""),
    "they have no weight": ("fetched->mass += weight,", ""),
    "their logits lack the softcap": (
        "return g->softcap > 0 ? g->softcap * tanh(logit / g->softcap) : logit;",
        "return logit;",
    ),
    "light sums keep them": ("light[c] -= two * step * ((double)codes[c] - 128);", "(void)light;"),
    "few are wanted": ("w->needed[i] = taken;", "w->needed[i] = 0;"),
}


@pytest.mark.parametrize("name", FETCH_FAULTS)
def test_a_fault_in_fetching_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_a_fault(*FETCH_FAULTS[name], monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        fetched_rightly()


# ---- mutants ---------------------------------------------------------------------------------------------------------


def changed(monkeypatch: pytest.MonkeyPatch, at: str, change: Any) -> None:
    """Change the argument `at` of the kernel before each call."""
    real = kernel.arguments

    def faulty(*given: Any) -> dict[str, Any]:
        found = real(*given)
        wrong = change(np.asarray(found[at])[()])
        return found | {at: torch.tensor(wrong) if np.ndim(wrong) else wrong}

    monkeypatch.setattr(kernel, "arguments", faulty)


FAULTS = {
    "a page has the range of another": ("low", lambda x: np.roll(x, 1, 1)),
    "a row has the ranges of another": ("span", lambda x: np.roll(x, 1, 0)),
    "the further bits are another token's": ("key_fine", lambda x: np.roll(x, 7, 0)),
    "a value has another's scale": ("value_widest", lambda x: np.roll(x, 1)),
    "the newest token is dropped": ("count", lambda x: x - 1),
    "the first tokens are read from codes": ("first", lambda x: x - 2),
    "slots begin one later": ("offset", lambda x: x + 1),
    "the scale is twice as large": ("scale", lambda x: 2 * x),
    "there is no softcap": ("softcap", lambda x: 0.0),
    "queries are those of another row": ("q", lambda x: np.roll(x, 1, 0)),
    "values are rotated back the wrong way": ("turn", lambda x: np.ascontiguousarray(x.T)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_answer_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v, q = drawn(11, 200)
    v[:, -1] *= 30  # so that the newest token counts
    state = filled(k, v, 3.0)
    alike(state, q * 3, k, v)
    changed(monkeypatch, *FAULTS[name])
    with pytest.raises(AssertionError):
        alike(state, q * 3, k, v)


LOOSE = {
    "the Gram matrix is lost": ("key_gram", lambda x: x * 0),
    "the operator norm is underestimated": ("operator", lambda x: x * 0.1),
    "radii are of other tokens": ("radius", lambda x: x * 0),
}


@pytest.mark.parametrize("name", LOOSE)
def test_a_bound_that_lacks_a_term_is_smaller_than_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v, q = drawn(12, 200)
    state = filled(k, v)
    wanted = in_torch(state, q)
    whole = kernel.read(hot(state), q, None)
    assert bool((whole.error >= 0.95 * wanted.error).all())
    changed(monkeypatch, *LOOSE[name])
    assert bool((kernel.read(hot(state), q, None).error < 0.95 * wanted.error).any())


def test_large_logits_are_allowed_their_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = seeded(13)
    k = (draw(1, 1, 32, dtype=torch.float32) * 30).expand(-1, 100, -1)
    v, q = draw(1, 100, 64, dtype=torch.float32), draw(1, 8, 32, dtype=torch.float32) * 30
    state = filled(k, v, recent=0)
    whole = kernel.read(hot(state), q, None)
    assert not wrong(whole, truth(q, k, v, state.spec))
    changed(monkeypatch, "reach", lambda x: x * 0)
    allowed = 12 * 2.0**-23 * state.spec.scale * q.norm(dim=-1) * k[0, 0].norm()
    assert bool((whole.spread - kernel.read(hot(state), q, None).spread > 0.9 * allowed).all())  # of 92 of 100 tokens


# ---- faults in the source --------------------------------------------------------------------------------------------

SOURCE_FAULTS = {
    "values that are not read are not allowed for": ("about += w->left[i] * (known->widest + length);", ""),
    "they are allowed for only up to the longest one": (
        "about += w->left[i] * (known->widest + length)",
        "about += w->left[i] * length",
    ),
    "half of the unread weights are counted": ("(double)sum(unread[i]);", "(double)sum(unread[i]) / 2;"),
    "the mean is divided by the mass of all tokens": ("+ centre[c]) / read_mass", "+ centre[c]) / whole_mass"),
    "further bits have the steps of the others": ("* times;", ";"),
    "the last tokens of a block are left out": (
        "lanes_from((int32_t)t) < (int32_t)many",
        "lanes_from((int32_t)t) < (int32_t)many - 3",
    ),
    "sums go on from row to row": ("memset(s->total, 0,", "if (0) memset(s->total, 0,"),
    "sums of a chunk are added twice": ("memset(s->part, 0, (size_t)n * sizeof *s->part);", "(void)0;"),
    "further bits are taken for other channels'": ("asked[page->loud[n]] *", "asked[page->loud[n] ^ 1] *"),
    "a query's logits get another's start": ("+ page->start[first + i]", "+ page->start[first]"),
    "heavy tokens have no part in the bound": ("{t, away * more, away * away,", "{t, 0, 0,"),
    "the spread lacks the tokens that are not read": ("tokens, w->lighter[i], slope", "tokens, of[4] + of[8], slope"),
}


def searching() -> None:
    """Raise AssertionError if the kernel's answers or bounds differ from torch's, or an answer errs too much."""
    k, v, q = drawn(24, 360, rows=2)
    paged = k[:, :320].view(2, 5, 64, 64)
    paged[..., 1::2] = paged[..., ::2].flip(2)  # channels of equal ranges, and other numbers
    alike(filled(k, v, page=64, recent=64), q, k, v)
    k, v, q = drawn(25, 300, rows=2)
    state = filled(k * torch.linspace(0.2, 3, 300).unsqueeze(1), v)
    sharp = kernel.read(hot(state), q * 2, None)
    assert bool((sharp.error >= 0.9 * in_torch(state, q * 2).error).all())
    k, v, q = tilted()
    state = filled(k, v, page=64, recent=64)
    found, left = unread(state, q, 0.3)
    whole = kernel.read(hot(state), q, None)
    assert float(left) > 0.1 and not wrong(found, truth(q, k, v, state.spec))
    assert bool((found.spread >= 0.999 * whole.spread).all())
    same, _ = unread(filled(k, torch.ones_like(v), page=64, recent=64), q, 0.3)
    torch.testing.assert_close(same.partial.mean, torch.ones_like(same.partial.mean), rtol=0, atol=0.02)
    least = whole.error + float(left) * 1.9 * found.largest  # unread values may be twice the longest away
    assert bool((found.error >= least - 0.01).all())


def test_the_search_finds_nothing_in_the_source_as_it_is() -> None:
    searching()


def test_processors_without_these_instructions_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel_library, "instructions", lambda: ())
    plain = kernel_library.loaded(tmp_path)
    monkeypatch.setattr(kernel_library, "library", lambda: plain)
    searching()


@pytest.mark.parametrize("name", SOURCE_FAULTS)
def test_a_fault_in_the_source_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_a_fault(*SOURCE_FAULTS[name], monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        searching()


SMALL_FAULTS = {
    "their squares are lost": ("of[8] += (double)two[0];", "of[8] += 0;"),
    "their values are taken for half as long": (
        "(known->decoded + length) * (known->decoded + length);",
        "length * length;",
    ),
    "tokens of other weights are added to a run as well": (
        "where(unmarked(other >> t), load(x + start + t))",
        "load(x + start + t)",
    ),
    "a run has the radii of other tokens": ("from_shorts(g->radius + first + t)", "every(0)"),
    "a list has the steps of other tokens": ("step_of(g, s->place[e]);", "step_of(g, s->place[0]);"),
    "the last block of a chunk is lost": (
        "++runs % (CHUNK / BLOCK) == 0",
        "++runs % (CHUNK / BLOCK) == 0 && (memset(s->part, 0, 4), 1)",
    ),
}
ALL_SMALL = ("SMALL = 0.01;", "SMALL = 1e9;")


def searching_small_weights() -> None:
    """Raise AssertionError if a kernel that takes all light weights for small answers wrongly, or bounds too little."""
    k, v, q = drawn(38, 600, rows=2)
    v = v * torch.logspace(-1, 1, 600).unsqueeze(1)
    state = filled(k, v, page=64, recent=64)
    for sharpness, epsilon in ((0.0, 0.0), (0.3, 0.0), (0.3, 0.3), (4.0, 0.0), (4.0, 0.3)):
        asked = q * sharpness
        given = kernel.arguments(hot(state), asked, None, epsilon)
        kernel.run(given, 1)
        found, wanted = kernel.found(given), in_torch(state, asked)
        assert not wrong(found, truth(asked, k, v, state.spec))
        assert bool((found.error >= 0.999 * wanted.error).all())
        if not epsilon:
            apart = (found.partial.mean - wanted.partial.mean).norm(dim=-1)
            assert bool((apart <= 2e-5 * wanted.largest).all())


def test_tokens_of_small_weight_are_bounded_by_the_longest_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_faults((ALL_SMALL,), monkeypatch, tmp_path)
    searching_small_weights()


@pytest.mark.parametrize("name", SMALL_FAULTS)
def test_a_fault_in_small_weights_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_faults((ALL_SMALL, SMALL_FAULTS[name]), monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        searching_small_weights()


def with_a_fault(right: str, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Replace `right` in the kernel's source by `fault`, and use the kernel that is compiled from it."""
    with_faults(((right, fault),), monkeypatch, tmp_path)


def with_faults(faults: tuple[tuple[str, str], ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_library, "SOURCE", faulty(kernel_library.SOURCE, tmp_path / "source", *faults))
    monkeypatch.setattr(kernel_library, "OPTIONS", ("-O0", *kernel_library.OPTIONS[1:]))
    broken = kernel_library.loaded(tmp_path)
    monkeypatch.setattr(kernel_library, "library", lambda: broken)
