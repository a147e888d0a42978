"""Reads from nibble planes: no answer errs more than its bound, however far it refined, and every term is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.certify.planes import BOTH, CENTRE, EXACT_KEY, UPPER, UPPER_VALUE, PlaneGlimpse
from kvfloor.methods.stores.nibbles import NibbleChannels, NibbleTokens
from kvfloor.methods.tiered.coarse import CoarseSums
from kvfloor.methods.tiered.hot import Hot
from kvfloor.methods.tiered.plane_reader import PlaneReader
from kvfloor.methods.tiered.tally import Tally
from kvfloor.methods.tiered.tiered import Tiered, TieredState
from tests.certify.families import FAMILIES, queries
from tests.certify.test_trials import DTYPES, WIDTHS, truth, violations
from tests.support import seeded

EPSILONS = (1e6, 0.1, 0.02, 1e-3)
Patch = pytest.MonkeyPatch


def trial(name: str, seed: int, rows: int, n: int, m: int, epsilons: tuple[float, ...]) -> tuple[int, int]:
    """Run one seeded stream of a family; widths, dtype, page and softcap follow from the seed."""
    draw = seeded(7000 + 1000 * seed + list(FAMILIES).index(name))
    (d, dv), dtype = WIDTHS[seed % 4], DTYPES[seed // 4 % 4]
    k = FAMILIES[name](draw, rows, n, d).to(dtype)
    v = (draw(rows, n, dv) * torch.logspace(-1, 1, n, dtype=torch.float64).unsqueeze(1)).to(dtype)
    q = queries(draw, k.double(), m).to(dtype)
    method = Tiered(page=(16, 64)[seed % 2], recent=(0, 32)[seed % 2], planes=True)
    state = method.open(Spec(rows, d, dv, d**-0.5, (None, 4.0)[seed % 5 == 4], dtype=dtype))
    for start in range(0, n, 70):
        state.append(k[:, start : start + 70], v[:, start : start + 70])
    return violations(state, q, k, v, *epsilons)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_answer_from_planes_errs_more_than_its_bound(name: str) -> None:
    for seed in (2, 5, 12):
        assert trial(name, seed, 2, 100, 12, (1e6, 0.01)) == (2 * 12 * 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_no_answer_from_planes_errs_more_than_its_bound_in_many_trials(name: str) -> None:
    """14 families of 14,336 answers each."""
    found = [trial(name, seed, 4, 400, 28, EPSILONS) for seed in range(100, 132)]
    assert (sum(count for count, _ in found), sum(wrong for _, wrong in found)) == (32 * 4 * 28 * 4, 0)


@pytest.mark.slow
def test_no_answer_from_planes_over_a_models_own_keys_errs_more_than_its_bound() -> None:
    """The built-in model reads one of its texts."""
    from characterize.lib.real_keys import record

    tensors, about = record("builtin", "mixture-0", 1024)
    for layer in range(int(about["layers"])):
        q, k, v = (tensors[f"{layer}.{name}"] for name in "qkv")
        state = Tiered(recent=0, planes=True).open(Spec(len(k), k.shape[2], v.shape[2], float(about["scale"])))
        state.append(k, v)
        count, wrong = violations(state, q[:, :, -32:].flatten(1, 2), k, v, *EPSILONS)
        assert count and not wrong


def opened(seed: int, n: int = 200, d: int = 16, dv: int = 12, size: float = 3.0, **how: Any) -> Any:
    """Return (state, q (2, m, d), k, v), with the options `how` of the method."""
    draw = seeded(seed)
    k, v, q = draw(2, n, d) * size, draw(2, n, dv), draw(2, 24, d)
    state = Tiered(page=16, recent=16, planes=True, **how).open(Spec(2, d, dv, d**-0.5, dtype=torch.float64))
    state.append(k, v)
    return state, q, k, v


def test_both_planes_are_codes_of_eight_bits_and_the_upper_one_errs_by_eight_steps() -> None:
    state, _, k, _ = opened(1)
    codes: Any = state.hot.codes
    place = torch.arange(4, 176)  # of the first row
    keys, steps = codes.key_codes, codes.key_codes.steps(None)[0, place // 16]
    assert isinstance(keys, NibbleChannels) and isinstance(codes.value_codes, NibbleTokens)
    for coarse, half in ((False, 0.5), (True, 8.0)):
        error = (codes.keys(place, coarse=coarse) - k[0, 4:176]).abs()
        assert bool((error <= steps * half * (1 + 1e-9)).all()) and bool((error > steps * half * 0.9).any())
    upper, both = (codes.values(place, coarse=x).sub(opened(1)[3][0, 4:176]).norm(dim=-1) for x in (True, False))
    assert 0 < float(both.max()) < float(upper.min()) < float(upper.max()) < 1


def test_a_query_reads_no_more_planes_than_it_needs_and_counts_their_bytes() -> None:
    state, q, _, _ = opened(2, size=1.0)
    base, last = state.hot.bytes_read, -1
    coded, d, dv = 2 * (176 - 4), 16, 12
    ranges, centre = (2 * d + 4 * 8) / 16, (2 * dv + 2) / 16
    sums = 2 * (d * d + 1 + 2 + 1 + 1) * 8  # Gram matrix, excess, two operators and a third, reach
    assert base == round(coded * (d / 2 + 2 + ranges + centre) + (2 * 200 - coded) * (d + dv) * 8 + sums)
    for epsilon in (1e6, 0.3, 0.1, 0.02, 1e-3, 1e-9):
        state.tally = Tally()
        found = state.read_certified(q, epsilon)
        assert bool((found.relative <= epsilon).all()) or epsilon == 1e-9
        assert last <= state.tally.bytes == state.tally.planes + state.tally.tokens * (d + dv) * 8
        assert state.bytes_read == round(base + state.tally.bytes / 48 * 2)
        last = state.tally.bytes
        if epsilon == 1e6:
            assert state.tally.bytes == 0
        if epsilon == 0.1:
            assert state.tally.planes > 0 and state.tally.tokens == 0
    assert state.tally.tokens == 2 * 24 * 172  # every coded token, exactly


def test_a_group_shares_the_planes_that_it_reads() -> None:
    state, q, k, v = opened(3)
    alone, state.tally = state.read_certified(q, 0.02), Tally()
    state.read_certified(q, 0.02)
    single, state.tally = state.tally, Tally()
    together = state.read_certified(q.unflatten(1, (4, -1)), 0.02)
    assert single.planes / 4 < state.tally.planes < single.planes and state.tally.queries == single.queries / 4
    assert bool(together.within(0.02).all()) and bool(alone.within(0.02).all())
    error = (together.partial.mean - truth(q, k, v, state.spec).unflatten(1, (4, -1))).norm(dim=-1)
    assert bool((error <= together.bound).all())


def test_planes_serve_steps_copies_saved_states_dropped_tokens_and_other_places() -> None:
    state, q, k, v = opened(4)
    wanted = state.read_certified(q, 0.02)
    again = state.method.from_bytes(state.to_bytes())
    cut = Tiered(page=16, recent=16, planes=True, cold="ram").open(state.spec)
    for start in range(0, 200, 7):
        cut.append(k[:, start : start + 7], v[:, start : start + 7])
    for other in (again, state.clone(), cut):
        found = other.read_certified(q, 0.02)
        assert torch.equal(found.partial.mean, wanted.partial.mean) and torch.equal(found.bound, wanted.bound)
    gone = torch.arange(0, 200, 3)
    state.forget(torch.zeros_like(gone), gone)
    kept = torch.ones(200, dtype=torch.bool)
    kept[gone] = False
    for epsilon in (1e6, 0.02, 1e-9):
        found = state.read_certified(q, epsilon)
        for row, stays in ((0, kept), (1, torch.ones_like(kept))):
            here = slice(row, row + 1)
            exact = truth(q[here], k[here, stays], v[here, stays], state.spec)
            assert bool(((found.partial.mean[here] - exact).norm(dim=-1) <= found.bound[here] + 1e-13).all())


def test_steps_of_padded_batches_answer_within_epsilon() -> None:
    draw, g, n = seeded(5), 3, 120
    k, v, q = draw(2, n, 16) * 3, draw(2, n, 12), draw(2, g, n, 16)
    present = torch.ones(2, n, dtype=torch.bool)
    present[1, :30] = False
    k[1, :30] = torch.nan
    state = Tiered(epsilon=0.05, page=16, recent=16, planes=True).open(Spec(2, 16, 12, 0.25, dtype=torch.float64))
    cuts = ((0, 80), (80, 81), (81, 120))
    out = torch.cat([state.step(q[:, :, a:b], k[:, a:b], v[:, a:b], present=present[:, a:b]) for a, b in cuts], 2)
    for row, start in ((0, 0), (1, 30)):
        logits = q[row, :, start:] @ k[row, start:].T * 0.25
        later = torch.ones(n - start, n - start, dtype=torch.bool).triu(1)
        exact = torch.softmax(logits.masked_fill(later, -torch.inf), -1) @ v[row, start:]
        largest = v[row, start:].norm(dim=-1).cummax(0).values
        error = (out[row, :, start:] - exact).norm(dim=-1) / largest
        assert 0 < float(error.max()) <= 0.05
    assert state.tally.queries == n + n - 30


def test_values_that_are_the_keys_are_read_with_them() -> None:
    draw = seeded(6)
    k, q = draw(2, 150, 16) * 2, draw(2, 24, 16)
    state = Tiered(page=16, recent=0, planes=True).open(Spec(2, 16, 16, dtype=torch.float64, tied=True))
    state.append(k, k)
    assert violations(state, q, k, k, 1e6, 0.1, 0.01, 1e-6)[1] == 0
    state.tally = Tally()
    state.read_certified(q, 0.1)
    assert state.tally.planes > 0


def test_planes_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="planes must be True or False, got 1"):
        Tiered(planes=1)  # type: ignore[arg-type]
    method = parse("tiered(planes=True,page=16)")
    assert isinstance(method, Tiered) and method.planes and parse(str(method)) == method


def glimpses(change: Callable[[PlaneGlimpse], dict[str, Tensor]]) -> Callable[[Patch], None]:
    """Return a fault that changes what is known, before each answer."""

    def plant(patch: Patch) -> None:
        real = PlaneGlimpse.answer
        patch.setattr(PlaneGlimpse, "answer", lambda self: real(replace(self, **change(self))))

    return plant


def read_twice(patch: Patch) -> None:
    real = PlaneReader._know_keys

    def faulty(self: PlaneReader, scene: Any, index: Tensor, where: Tensor, k: Tensor) -> None:
        upper = scene.upper.gather(1, index.unsqueeze(-1).expand_as(k))
        real(self, scene, index, where, 2 * k - upper)

    patch.setattr(PlaneReader, "_know_keys", faulty)


def swapped(patch: Patch) -> None:
    real = PlaneReader._refine

    def faulty(self: PlaneReader, *given: Any) -> Any:
        keys: Any = self.hot.codes.key_codes
        keys.packed, keys.fine = keys.fine, keys.packed
        found = real(self, *given)
        keys.packed, keys.fine = keys.fine, keys.packed
        return found

    patch.setattr(PlaneReader, "_refine", faulty)


def halved_columns(patch: Patch) -> None:
    real = Hot.settle

    def faulty(self: Hot, seen: Tensor, rows: Tensor | None) -> None:
        real(self, seen, rows)
        columns: Any = self.codes.columns
        columns.centre_radius.mul_(0.3)
        columns.upper_radius.mul_(0.3)
        assert self.coarse is not None
        self.coarse.operators.mul_(0.3)

    patch.setattr(Hot, "settle", faulty)


def of_the_wrong_plane(patch: Patch) -> None:
    real = CoarseSums.settle

    def faulty(self: CoarseSums, codes: Any, *given: Any) -> None:
        real(self, codes, *given)
        self.key_gram.div_(256)  # as large as the residuals of both planes
        self.excess.zero_()

    patch.setattr(CoarseSums, "settle", faulty)


def left_too_early(patch: Patch) -> None:
    real = PlaneReader._know_keys

    def faulty(self: PlaneReader, scene: Any, index: Tensor, where: Tensor, k: Tensor) -> None:
        before = scene.gone
        real(self, scene, index, where, k)
        scene.gone = (before[UPPER] + scene.whole[..., UPPER, None].square(), scene.gone[BOTH])

    patch.setattr(PlaneReader, "_know_keys", faulty)


def never_in_a_sum(found: PlaneGlimpse) -> dict[str, Tensor]:
    """Take keys that are known from both planes for exact ones."""
    known = found.key == BOTH
    return {
        "key": torch.where(known, EXACT_KEY, found.key),
        "doubt": torch.where(known.unsqueeze(1), found.rounding, found.doubt),
    }


def centres_are_values(found: PlaneGlimpse) -> dict[str, Tensor]:
    return {"radii": found.radii * torch.tensor([0.0, 1.0, 1.0], dtype=found.radii.dtype).view(1, 3, 1)}


def longest_of_all(patch: Patch) -> None:
    real = PlaneReader._least
    patch.setattr(PlaneReader, "_least", lambda *given: real(*given) * 1.5)


FAULTS: dict[str, Callable[[Patch], None]] = {
    "the lower plane is added twice": read_twice,
    "the planes are read in the wrong order": swapped,
    "radii of the coarser readings are not scaled": halved_columns,
    "the upper plane's sum is that of both planes' residuals": of_the_wrong_plane,
    "a refined key takes the whole sum with it": left_too_early,
    "a key known from both planes is taken for exact": glimpses(never_in_a_sum),
    "a centre is taken for the values of its page": glimpses(centres_are_values),
}


def tight() -> list[tuple[TieredState, Tensor, Tensor, Tensor]]:
    """Return states of few coded tokens of width 1, whose bounds are close to the errors; and queries."""
    cases = []
    for seed in range(3):
        for first, n, keys in ((13, 18, 60.0), (0, 34, 60.0), (0, 34, 0.0)):
            draw = seeded(seed)
            k, v, q = draw(1, n, 1) * keys, draw(1, n, 1) * (1 if keys else 3), draw(1, 80, 1) * 2
            method = Tiered(page=16, first=first, recent=0, planes=True)
            state = method.open(Spec(1, 1, 1, 0.5, dtype=torch.float64))
            state.append(k, v)
            cases.append((state, q, k, v))
    return cases


def found_by_trials() -> int:
    return sum(violations(*case, 1e6, 0.3, 0.1, 0.03, 0.01)[1] for case in tight())


def test_without_a_fault_the_trials_find_nothing() -> None:
    assert found_by_trials() == 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, monkeypatch: Patch) -> None:
    FAULTS[name](monkeypatch)
    assert found_by_trials() > 0


def test_the_largest_norm_of_a_value_is_never_overestimated(monkeypatch: Patch) -> None:
    def wrong() -> int:
        count = 0
        for seed in range(3):
            state, q, _, v = opened(seed, size=0.3)
            state.forget(torch.zeros(20, dtype=torch.int64), torch.arange(40, 60))
            stays = torch.ones(200, dtype=torch.bool)
            stays[40:60] = False
            largest = torch.stack((v[0, stays].norm(dim=-1).max(), v[1].norm(dim=-1).max())).unsqueeze(1)
            count += int((state.read_certified(q, 1e6).largest > largest).sum())
        return count

    assert wrong() == 0
    longest_of_all(monkeypatch)
    assert wrong() > 0


def test_bytes_that_are_not_tallied_are_missed(monkeypatch: Patch) -> None:
    """The count of `planes` is that of the planes which are known at the end, of every token."""

    def counted(state: TieredState, q: Tensor) -> tuple[int, int]:
        kept: list[PlaneGlimpse] = []
        real = PlaneGlimpse.answer
        monkeypatch.setattr(PlaneGlimpse, "answer", lambda self: (kept.append(self), real(self))[1])
        state.tally = Tally()
        state.read_certified(q[:1, :1].expand(2, -1, -1), 0.1)
        monkeypatch.setattr(PlaneGlimpse, "answer", real)
        last: dict[int, PlaneGlimpse] = {len(x.key): x for x in kept}
        assert list(last) == [2] and state.tally.tokens == 0  # both rows stop in the same round
        key, value = last[2].key, last[2].value
        read = int((key == BOTH).sum()) * 8 + int(((key == BOTH).any(-1)).sum()) * (16 * 16 + 1) * 8
        read += (
            int(((value > CENTRE) & (value < 3)).sum()) * (6 + 4) + int(((value > UPPER_VALUE) & (value < 3)).sum()) * 8
        )
        return state.tally.planes, read

    draw = seeded(9)
    k, v, q = draw(1, 200, 16), draw(1, 200, 12), draw(1, 1, 16)
    state = Tiered(page=16, recent=16, planes=True).open(Spec(2, 16, 12, 0.25, dtype=torch.float64))
    state.append(k.expand(2, -1, -1), v.expand(2, -1, -1))
    planes, read = counted(state, q)
    assert planes == read > 0
    monkeypatch.setattr(PlaneReader, "_key_bytes", 0)
    planes, read = counted(state, q)
    assert planes < read
