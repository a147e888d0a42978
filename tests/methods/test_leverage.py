"""Ridge leverage of keys: exact where nothing is sketched, within the theorem's factors where something is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.bounded import Bounded
from kvfloor.core.policy import Held
from kvfloor.core.rotation import Rotation
from kvfloor.methods.policies.leverage import RidgeLeverage, leverage
from tests.literal import Rule, Token, keeps_alike, run
from tests.support import Draw, positions, wrong

PLAIN = RidgeLeverage(sinks=0, recent=0)


def exact(keys: Tensor, asked: Tensor, ridge: float, centre: bool = False) -> Tensor:
    """k' (K'K + lambda I)^-1 k for K (n, d) and every k of asked (s, d), by an inverse; lambda = ridge tr(K'K) / d."""
    mean = keys.mean(0) if centre else torch.zeros(keys.shape[1], dtype=keys.dtype)
    keys, asked = keys - mean, asked - mean
    gram = keys.T @ keys
    size = ridge * gram.trace() / keys.shape[1]
    inverse = torch.linalg.inv(gram + size * torch.eye(keys.shape[1], dtype=keys.dtype))
    return torch.stack([k @ inverse @ k for k in asked])


def scores(state: Any) -> tuple[Tensor, Tensor]:
    """Positions held (rows, s) and their scores (rows, s), at the end of a block."""
    held = state._held(None, int(state.held.max()))
    return held.position, state.method.policy.priority(held)


class Leverage(Rule):
    def __init__(self, policy: RidgeLeverage, keys: Tensor, budget: int) -> None:
        super().__init__(0.5, policy.sinks, policy.protected_last(budget))
        self.policy, self.keys = policy, keys

    def worth(self, held: list[Token], seen: int, budget: int) -> list[float]:
        mine = torch.stack([token.k for token in held])
        over = self.keys[:seen] if self.policy.over == "seen" else mine
        return exact(over, mine, self.policy.ridge, self.policy.centre).tolist()


def agrees(policy: RidgeLeverage, draw: Draw, budget: Any = 12, block: int = 1) -> bool:
    k, v = draw(2, 60, 6) * torch.linspace(0.2, 3.0, 6) + 1.0, draw(2, 60, 6)
    return keeps_alike(policy, lambda row, b: Leverage(policy, k[row], b), (None, k, v), budget, block)


@pytest.mark.parametrize("over", ["seen", "held"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("block", [1, 7])
def test_what_is_kept_has_the_highest_exact_leverage(draw: Draw, over: Any, centre: bool, block: int) -> None:
    assert agrees(replace(PLAIN, over=over, centre=centre), draw, block=block)
    assert agrees(RidgeLeverage(ridge=0.5, over=over, centre=centre), draw, (9, 21), block)


def absolute(self: RidgeLeverage, held: Held) -> Tensor:
    x, (gram, _, _) = held.k, held.memory.moments(held.rows)
    inverse = torch.linalg.inv(gram + self.ridge * torch.eye(6, dtype=torch.float64))
    return torch.einsum("rsi,rij,rsj->rs", x, inverse, x)


def uncentred(self: RidgeLeverage, held: Held) -> Tensor:
    gram, total, n = held.memory.moments(held.rows)
    return leverage(held.k - (total / n).unsqueeze(1), gram, self.ridge, 6)


WRONG = {
    "the highest leverage leaves": lambda self, held: -RidgeLeverage.priority(self, held),
    "lambda does not grow with the keys": absolute,
    "the Gram matrix keeps the mean that the keys have lost": uncentred,
}


@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_line_is_rejected(draw: Draw, mutant: str) -> None:
    kind = wrong(RidgeLeverage, priority=WRONG[mutant])
    assert not agrees(kind(sinks=0, recent=0, ridge=0.5, centre=WRONG[mutant] is uncentred), draw, block=7)


# ---- the sketch ------------------------------------------------------------------------------------------------


def distortion(sketch: Tensor, keys: Tensor) -> float:
    """The e for which (1 - e) ||u||^2 <= ||S'u||^2 <= (1 + e) ||u||^2 holds on the span of the keys (n, d)."""
    basis = torch.linalg.svd(keys, full_matrices=False)[2][: torch.linalg.matrix_rank(keys)]
    image = basis @ sketch
    return float((torch.linalg.eigvalsh(image @ image.T) - 1.0).abs().max())


@pytest.mark.parametrize("kind", ["gaussian", "count"])
@pytest.mark.parametrize("ridge", [0.01, 1.0, 3000.0])
@pytest.mark.parametrize("seed", range(2))
def test_sketched_scores_are_within_the_theorems_factors_of_the_exact_ones(
    draw: Draw, kind: Any, ridge: float, seed: int
) -> None:
    """Keys of rank 3 in 128 dimensions through a sketch of 64."""
    keys = draw(1, 90, 3) @ draw(1, 3, 128)
    policy = RidgeLeverage(sinks=0, recent=0, sketch=64, kind=kind, ridge=ridge)
    state = run(policy, 32, None, keys, keys, block=10, seed=seed)
    position, found = scores(state)
    e = distortion(state.shared["key sketch"], keys[0])
    wanted = exact(keys[0], keys[0, position[0]], ridge)
    assert 0.0 < e < 0.9
    ratio = found[0] / wanted
    assert (1 - e) / (1 + e) - 1e-5 <= float(ratio.min()) and float(ratio.max()) <= (1 + e) / (1 - e) + 1e-5
    # The mutant whose lambda is a share of tr / sketch: twice as large, which shows once lambda decides.
    x = keys[0, position[0]] @ state.shared["key sketch"]
    gram, _, _ = state.memory.moments(None)
    doubled = leverage(x.unsqueeze(0), gram, ridge, 64)[0] / wanted
    if ridge == 3000.0:
        assert float(doubled.max()) < float(ratio.max()) / 1.8


def test_a_wide_sketch_of_keys_of_low_rank_is_accurate(draw: Draw) -> None:
    """Rank 2, sketch 150 of 160: e is about 2 sqrt(2 / 150) = 0.23, and lambda is small: scores within a few %."""
    keys = draw(1, 60, 2) @ draw(1, 2, 160)
    state = run(RidgeLeverage(sinks=0, recent=0, sketch=150), 40, None, keys, keys, block=60)
    position, found = scores(state)
    wanted = exact(keys[0], keys[0, position[0]], 0.01)
    assert distortion(state.shared["key sketch"], keys[0]) < 0.3
    torch.testing.assert_close(found[0], wanted, rtol=0.05, atol=0.0)


def test_keys_of_full_rank_are_not_kept_by_a_narrow_sketch(draw: Draw) -> None:
    """The bound asks for sketch >> rank: with 16 of 64 dimensions seen, the scores still tell, but not exactly."""
    keys = draw(1, 400, 64) * torch.linspace(0.1, 2.0, 64)
    state = run(RidgeLeverage(sinks=0, recent=0, sketch=16), 200, None, keys, keys, block=400)
    position, found = scores(state)
    wanted = exact(keys[0], keys[0, position[0]], 0.01)
    assert distortion(state.shared["key sketch"], keys[0]) >= 1.0
    assert 0.0 < float(torch.corrcoef(torch.stack([found[0], wanted]))[0, 1]) < 0.95


@pytest.mark.parametrize("kind", ["gaussian", "count"])
def test_the_sketch_is_unbiased_public_and_fixed_by_the_seed(kind: Any) -> None:
    policy = RidgeLeverage(sketch=8, kind=kind)
    drawn = [policy.shared(Spec(2, 16, 4, seed=seed))["key sketch"] for seed in range(600)]
    mean = torch.stack([s @ s.T for s in drawn]).mean(0)
    assert float((mean - torch.eye(16)).abs().max()) < 5 * (2 / 8 / 600) ** 0.5
    assert torch.equal(drawn[3], policy.shared(Spec(5, 16, 9, seed=3, row_ids=[9, 8, 7, 6, 5]))["key sketch"])
    assert not torch.equal(drawn[3], drawn[4])
    if kind == "count":
        assert drawn[0].abs().sum(1).tolist() == [1.0] * 16 and drawn[0].min() == -1.0


def test_a_sketch_as_wide_as_the_keys_is_left_out() -> None:
    assert RidgeLeverage(sketch=16).shared(Spec(1, 16, 4)) == {}
    assert parse("ridge_leverage@64").open(Spec(1, 16, 4)).shared == {}


def test_memory_is_the_gram_matrix_whatever_the_length(draw: Draw) -> None:
    spec = Spec(2, 32, 32)
    state = parse("ridge_leverage(sketch=8)@32").open(spec)
    window = parse("window@32").open(spec)
    assert state.nbytes - window.nbytes == 2 * (8 * 8 * 4 + 8)  # the matrix and a clock per row; not the sketch
    before = state.nbytes
    state.append(draw(2, 500, 32, dtype=torch.float32), draw(2, 500, 32, dtype=torch.float32))
    assert state.nbytes == before and state.memory.met.tolist() == [480, 480]
    held = parse("ridge_leverage(over=held)@32").open(spec)
    assert held.memory is None and held.nbytes == window.nbytes


def test_every_key_is_met_once_whatever_seals_and_pads_there_are(draw: Draw) -> None:
    k = draw(2, 90, 6)
    present = torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) < 0.7
    for prefill in ("stream", "dense"):
        state = parse(f"ridge_leverage(sinks=0,recent=0,block=8,prefill={prefill})@16").open(Spec(2, 6, 6))
        x = k.to(torch.float32)
        for a, b in ((0, 13), (13, 41), (41, 90)):
            state.append(x[:, a:b], x[:, a:b], present[:, a:b])
            if b == 41:
                state.seal()
        for row in range(2):
            real = k[row, present[row]]
            met = real[: int(state.memory.met[row])]
            assert len(met) >= len(real) - 7
            torch.testing.assert_close(state.memory.gram[row], (met.T @ met).float(), rtol=1e-5, atol=1e-4)


def test_a_long_stream_does_not_wear_out_the_float32_memory(draw: Draw) -> None:
    k = draw(1, 20000, 8, dtype=torch.float32) + 3.0
    state = run(PLAIN, 16, None, k, k, block=64)
    met = k[0, : int(state.memory.met)].double()
    gram = met.T @ met
    assert float(((state.memory.gram[0].double() - gram) / gram).abs().max()) < 2e-6


def test_like_keys_gain_by_leaving_only_where_the_held_are_weighed(draw: Draw) -> None:
    """100 like keys, then 100 others: the last of the like ones stays only if those that left no longer count."""
    like = torch.eye(6, dtype=torch.float64)[0] + 0.01 * draw(1, 100, 6)
    others = 0.6 * torch.nn.functional.normalize(draw(1, 100, 6) * torch.tensor([0.0, 1, 1, 1, 1, 1]), dim=-1)
    k = torch.cat([like, others], 1)
    found = {over: positions(run(replace(PLAIN, over=over), 20, None, k, k, block=4))[0] for over in ("seen", "held")}
    assert found["seen"][0] >= 100 > found["held"][0]


def test_keys_without_length_have_no_leverage() -> None:
    k = torch.zeros(1, 20, 4, dtype=torch.float64)
    assert positions(run(PLAIN, 8, None, k, k, block=4)) == [list(range(12, 20))]


@pytest.mark.parametrize("over", ["seen", "held"])
def test_keys_before_their_rotation_are_scored_where_the_rotation_is_known(draw: Draw, over: Any) -> None:
    """Rotated keys under `keys=unrotated` leave the tokens that the bare keys leave; without `applied` they do not."""
    rotation = Rotation((1.0, 0.3, 0.05))
    bare = draw(2, 90, 6) * torch.linspace(0.2, 3.0, 6) + 1.0
    turned = rotation.turned(bare, rotation.circle(torch.arange(90) + 7, bare.dtype))

    def kept(k: Tensor, keys: Any, applied: Rotation | None) -> list[list[int]]:
        policy = replace(PLAIN, over=over, centre=True, keys=keys)
        spec = Spec(2, 6, 6, dtype=k.dtype, applied=applied)
        state: Any = Bounded(policy, budget=24, block=7).open(spec)
        state.append(k, k)
        return positions(state)

    wanted = kept(bare, "cached", None)
    assert kept(turned, "unrotated", rotation) == wanted
    assert kept(turned, "unrotated", None) == kept(turned, "cached", rotation) != wanted
