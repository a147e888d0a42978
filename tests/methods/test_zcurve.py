"""Z-curve: codes, candidates and choice equal the rule written out; recall is what it is, and falls with the width."""

from __future__ import annotations

import bisect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from characterize.lib.recall import recall
from kvfloor import Exact, Spec, parse
from kvfloor.core.selector import Chosen, Everything
from kvfloor.core.slots import Slots
from kvfloor.methods.selectors.morton import cells, interleave
from kvfloor.methods.selectors.top_k import TopK
from kvfloor.methods.selectors.zcurve import ZCurve, ZCurveState, projections
from tests.support import Draw, fed, stream, wrong

# ---- codes -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1023), min_size=1, max_size=5))
@settings(max_examples=25)
def test_codes_interleave_bits(point: list[int]) -> None:
    dims = len(point)
    wanted = sum(((number >> bit) & 1) << (bit * dims + j) for j, number in enumerate(point) for bit in range(10))
    assert int(interleave(torch.tensor(point), 10)) == wanted


def test_codes_that_no_integer_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="63-bit codes; at most 62 fit"):
        interleave(torch.zeros(3, dtype=torch.int64), 21)


def test_cells_are_quantiles_of_the_normal() -> None:
    x = torch.tensor([-40.0, -0.6745, -0.6744, -1e-9, 0.0, 0.6744, 0.6745, 40.0])
    assert cells(x, 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_projections_are_orthonormal_and_follow_the_seed_alone() -> None:
    one, other = (projections(Spec(rows, 16, 16, seed=3), 4) for rows in (1, 5))
    assert torch.equal(one, other)
    torch.testing.assert_close(one @ one.transpose(1, 2), torch.eye(3, dtype=torch.float64).expand(4, 3, 3))
    assert not torch.allclose(one, projections(Spec(1, 16, 16, seed=4), 4))
    assert projections(Spec(1, 2, 2), 4).shape == (4, 2, 2)


# ---- the choice ------------------------------------------------------------------------------------------------


def code(x: Tensor, projection: Tensor, shift: float) -> int:
    """The place of x (d,) on one curve, bit by bit."""
    at = projection @ x / x.norm() * math.sqrt(len(x))
    total, dims = 0, len(at)
    for j in range(dims):
        cell = min(511, int(0.5 * (1.0 + math.erf(float(at[j]) / math.sqrt(2.0))) * 512)) + int(shift * 512)
        total |= sum(((cell >> bit) & 1) << (bit * dims + j) for bit in range(10))
    return total


def slots_read(q: Tensor, keys: Tensor, merged: int, method: ZCurve, planes: Tensor) -> list[int]:
    """Slots that q (d,) reads of keys (s, d), of which `merged` are on the curves: plain loops."""
    candidates = set(range(merged, len(keys)))
    for c, plane in enumerate(planes):
        shift = c / method.curves
        line = sorted((code(key, plane, shift), slot) for slot, key in enumerate(keys[:merged]))
        at = bisect.bisect_left([place for place, _ in line], code(q, plane, shift)) - method.window // 2
        at = max(0, min(at, merged - method.window))
        candidates |= {slot for _, slot in line[at : at + method.window]}
    return sorted(sorted(candidates, key=lambda slot: (float(keys[slot] @ q), slot), reverse=True)[: method.k])


RULE = {"k": 4, "curves": 3, "window": 4, "chunk": 8}


def furthest(method: ZCurve, draw: Draw, chunk: int) -> float:
    """The largest difference of `step`, in calls of `chunk` tokens, from the rule written out."""
    n, d = 37, 6
    q, k, v = stream(draw, 1, 2, n, d)
    spec = Spec(1, d, d, dtype=torch.float64, seed=9)
    state = Exact(method).open(spec)
    out = fed(state, (q, k, v), *range(0, n, chunk))
    planes, worst = projections(spec, 3), 0.0
    for head in range(2):
        for i in range(n):
            read = slots_read(q[0, head, i], k[0, : i + 1], i // 8 * 8, ZCurve(**RULE), planes)
            wanted = torch.softmax(k[0, read] @ q[0, head, i], 0) @ v[0, read]
            worst = max(worst, float((out[0, head, i] - wanted).abs().max()))
    return worst


@pytest.mark.parametrize("chunk", [1, 5, 37])
def test_answers_equal_the_rule_written_out(draw: Draw, chunk: int) -> None:
    assert furthest(ZCurve(**RULE), draw, chunk) <= 1e-12


def repeats(self: ZCurveState, q: Tensor, slots: Slots, visible: Tensor, rows: Tensor | None = None) -> Chosen:
    slot = self._candidates(q, visible, rows)
    dead = slot >= visible.unsqueeze(2)
    logit = self._logits(q, slot.masked_fill(dead, 0), slots, rows).masked_fill(dead, -torch.inf)
    best = logit.argsort(dim=-1, descending=True, stable=True)[..., : self.method.k]
    return Chosen(slot.gather(2, best), logit.gather(2, best) == -torch.inf)


def unshifted(self: ZCurveState, x: Tensor) -> Tensor:
    planes = self.shared["projections"].split(1)
    alone = [ZCurveState(self.spec, Slots(self.spec, [1]), ZCurve(curves=1), {"projections": one}) for one in planes]
    return torch.cat([CODES(one, x) for one in alone], 1)


def early(self: ZCurveState, slots: Slots, before: Tensor) -> None:
    ZCurveState.append(self, slots, before)
    self.close(slots, None)


CODES = ZCurveState._codes
WRONG = {
    "a slot met on two curves is read twice": {"choose": repeats},
    "curves without shifts": {"_codes": unshifted},
    "keys are merged before their chunk is complete": {"append": early},
}


@pytest.mark.parametrize("mutant", WRONG)
def test_the_comparison_notices_a_wrong_line(draw: Draw, mutant: str) -> None:
    def opened(self: ZCurve, spec: Spec, slots: Slots, shared: dict[str, Tensor], in_order: bool) -> ZCurveState:
        ZCurve.open(self, spec, slots, shared, in_order)
        return wrong(ZCurveState, **WRONG[mutant])(spec, slots, self, shared)

    assert furthest(wrong(ZCurve, open=opened)(**RULE), draw, 37) > 1e-3


@pytest.mark.parametrize("text", ["exact", "random(block=4)@30", "window(block=4)@20:30"])
def test_the_curves_hold_every_merged_slot_in_order(draw: Draw, text: str) -> None:
    """After every call, with rows of different length: each list is sorted, and is the slots up to the last merge."""
    head, at, budget = text.partition("@")
    state: Any = parse(f"{head}|zeta(curves=2,chunk=4,window=3){at}{budget}").open(Spec(2, 5, 5))
    for t in (3, 1, 1, 20, 7, 40):
        present = torch.arange(t) >= torch.tensor([[0], [t // 2]])
        state.append(draw(2, t, 5, dtype=torch.float32), draw(2, t, 5, dtype=torch.float32), present)
        lists, slots = state.selection.sorted, state.slots
        waiting = state.seen % 4
        assert torch.equal(lists.held, slots.held - waiting)
        for row in range(2):
            used, offset = int(lists.held[row]), int(slots.offset[row])
            every = torch.tensor([row])
            codes, at_slot = (lists.across(name, every, used)[0] for name in ("code", "slot"))
            assert bool((codes.diff(dim=1) >= 0).all())
            assert torch.equal(at_slot.sort(1).values, torch.arange(used).expand(2, -1).int())
            fresh = state.selection._codes(slots.k[offset : offset + used].unsqueeze(0))[0]
            assert torch.equal(codes, fresh.gather(1, at_slot.long()))


# ---- recall ----------------------------------------------------------------------------------------------------


def random_keys(draw: Draw, d: int) -> tuple[Tensor, Tensor]:
    """200 queries, and 2,048 keys of equal length: among keys of 3 numbers length would decide, not nearness."""
    k = draw(1, 2048, d, dtype=torch.float32)
    return draw(1, 200, d, dtype=torch.float32), k / k.norm(dim=-1, keepdim=True)


def clustered_keys(draw: Draw, d: int) -> tuple[Tensor, Tensor]:
    """2,048 keys around 64 directions, and queries near some of those."""
    centres = draw(1, 64, d, dtype=torch.float32)
    keys = centres.repeat(1, 32, 1) + draw(1, 2048, d, dtype=torch.float32, scale=0.1)
    return centres.repeat(1, 3, 1) + draw(1, 192, d, dtype=torch.float32, scale=0.1), keys


def mean_recall(made: tuple[Tensor, Tensor]) -> float:
    q, k = made
    return float(recall(ZCurve(k=32, curves=4, window=32), q, k, top=32).mean())


def test_recall_on_random_keys_falls_with_their_width(draw: Draw) -> None:
    shares = [mean_recall(random_keys(draw, d)) for d in (3, 8, 32, 128)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] >= 0.8 and shares[-1] <= 0.2


def test_clusters_are_found_where_random_keys_are_not(draw: Draw) -> None:
    assert mean_recall(clustered_keys(draw, 64)) >= 0.4 + mean_recall(random_keys(draw, 64))


def test_recall_counts_what_is_read(draw: Draw) -> None:
    q, k = draw(2, 5, 4), draw(2, 100, 4)
    assert bool((recall(Everything(), q, k, top=10) == 1.0).all())
    assert bool((recall(TopK(10), q, k, top=10) == 1.0).all())
    torch.testing.assert_close(recall(TopK(4), q, k, top=10), torch.full((2, 5), 0.4, dtype=torch.float64))
    assert bool((recall(ZCurve(k=10, window=100, curves=1), q, k, top=10) == 1.0).all())


@pytest.mark.parametrize("top", [0, 101])
def test_a_top_beyond_the_keys_is_refused(draw: Draw, top: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.100"):
        recall(TopK(4), draw(1, 1, 4), draw(1, 100, 4), top)
