"""SubGen: the sequential greedy clustering, samples of the stated law, and the moments its theorem needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from tests.support import Draw, filled, many, opened, require_drawn, require_mean


def clustered(draw: Draw, rows: int, n: int, d: int = 4) -> Tensor:
    """Keys around a few far centres, some of them loose: joins and openings both happen all along the stream."""
    centre = draw(rows, 9, d, scale=2.0)
    belongs = (draw(rows, n).abs() * 1e4).long() % 9
    near = centre.gather(1, belongs.unsqueeze(-1).expand(-1, -1, d))
    return near + draw(rows, n, d) * torch.where(draw(rows, n, 1) > 0.5, 0.4, 0.15)


def greedy(k: Tensor, delta: float, cap: int | None = None) -> tuple[list[int], list[int]]:
    """The literal rule: token indices that became centres, and for each token the cluster it joined."""
    centres: list[int] = []
    joined = []
    for i, key in enumerate(k):
        distances = [float((key - k[c]).norm()) for c in centres]
        nearest = min(range(len(centres)), key=distances.__getitem__, default=-1)
        if nearest < 0 or (distances[nearest] > delta and (cap is None or len(centres) < cap)):
            nearest = len(centres)
            centres.append(i)
        joined.append(nearest)
    return centres, joined


@pytest.mark.parametrize("cap", [None, 6])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_clusters_are_those_of_the_sequential_rule(draw: Draw, block: int, cap: int | None) -> None:
    k, v = clustered(draw, 2, 192), draw(2, 192, 4)
    state = filled(f"subgen_sketch(delta=0.8,t=3,s=5,block={block},centres={cap})", k, v)
    for row in range(2):
        centres, joined = greedy(k[row], 0.8, cap)
        assert cap is not None or 5 < len(centres) < 150
        assert torch.equal(state.keys.centre[row, : len(centres)], k[row, centres])
        counts = torch.bincount(torch.tensor(joined), minlength=len(centres))
        assert state.keys.count[row, : len(centres)].tolist() == counts.tolist()
        assert bool((state.keys.count[row, len(centres) :] == 0).all())
        for cluster in range(len(centres)):
            members = {tuple(k[row, i].tolist()) for i, j in enumerate(joined) if j == cluster}
            assert {tuple(key) for key in state.keys.sample[row, cluster].tolist()} <= members


@pytest.mark.parametrize("block", [1, 16])
def test_samples_are_the_same_for_every_block(draw: Draw, block: int) -> None:
    k, v = clustered(draw, 2, 192), draw(2, 192, 4)
    one, other = (opened(f"subgen_sketch(delta=0.8,t=3,s=7,block={b})", rows=2) for b in (64, block))
    one.append(k, v)
    other.append(k, v)
    used = int(one.clusters.max())
    for name in ("centre", "count", "sample", "sample_key"):
        assert torch.equal(getattr(one.keys, name)[:, :used], getattr(other.keys, name)[:, :used]), name
    for name in ("k", "v", "key"):
        assert torch.equal(getattr(one.pairs, name), getattr(other.pairs, name)), name
    torch.testing.assert_close(one.pairs.mu, other.pairs.mu, rtol=1e-14, atol=0)


def test_centres_grow_by_doubling(draw: Draw) -> None:
    state = opened("subgen_sketch(delta=0.001,t=1,s=1,block=1)")
    sizes = []
    for _ in range(130):
        state.append(draw(1, 1, 4), draw(1, 1, 4))
        sizes.append(state.keys.centre.shape[1])
    assert sorted(set(sizes)) == [16, 32, 64, 128, 256]


# ---- the law of the samples, over thousands of row ids -----------------------------------------------------------

ROWS = 4000


def test_key_samples_are_uniform_within_a_cluster() -> None:
    n, t = 20, 2
    k = torch.arange(n, dtype=torch.float64).unsqueeze(1) * 1e-3
    state = many(f"subgen_sketch(delta=1.0,t={t},s=1,block=4)", k, torch.ones(n, 1, dtype=torch.float64), ROWS)
    picked = (state.keys.sample[:, 0, :, 0] * 1e3).round().long()
    require_drawn(picked, n)


def test_the_slots_of_one_cluster_are_independent() -> None:
    n = 8
    k = torch.arange(n, dtype=torch.float64).unsqueeze(1) * 1e-3
    state = many("subgen_sketch(delta=1.0,t=2,s=1,block=8)", k, torch.ones(n, 1, dtype=torch.float64), ROWS)
    picked = (state.keys.sample[:, 0, :, 0] * 1e3).round().long()
    require_drawn(picked[:, 0] * n + picked[:, 1], n * n)


def test_value_pairs_are_kept_with_probability_proportional_to_their_square() -> None:
    n, s = 12, 3
    v = torch.linspace(0.2, 3.0, n, dtype=torch.float64).unsqueeze(1)
    state = many(f"subgen_sketch(delta=1.0,t=1,s={s},block=4)", torch.zeros(n, 1, dtype=torch.float64), v, ROWS)
    picked = (state.pairs.v[:, :, 0].unsqueeze(-1) - v[:, 0]).abs().argmin(-1)
    require_drawn(picked, n, v[:, 0] ** 2 / (v**2).sum())
    assert float(state.pairs.mu[0]) == pytest.approx(float((v**2).sum()), rel=1e-14)


def moments(draw: Draw, s: int, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One query on one stream of 32 tokens: z (rows, dv), tau (rows,), then e^{Kq} (n,), V (n, dv), cluster of each."""
    k, v, q = clustered(draw, 1, 32, 3)[0], draw(32, 3), draw(1, 1, 3, scale=0.7)
    state = many(f"subgen_sketch(delta=0.8,t={t},s={s})", k, v, ROWS)
    assert bool((state.held == 0).all())
    part = state.read(q.expand(ROWS, -1, -1))
    tau = part.log_mass[:, 0].exp()
    _, joined = greedy(k, 0.8)
    return part.mean[:, 0] * tau.unsqueeze(1), tau, torch.exp(k @ q[0, 0]), v, torch.tensor(joined)


@pytest.mark.parametrize(("s", "t"), [(1, 1), (4, 2)])
def test_the_numerator_is_unbiased(draw: Draw, s: int, t: int) -> None:
    z, _, weight, v, _ = moments(draw, s, t)
    require_mean(z, weight @ v)


@pytest.mark.parametrize("s", [1, 4])
def test_the_numerators_variance_is_the_exact_formula(draw: Draw, s: int) -> None:
    """E |z - Ez|^2 = (|V|_F^2 |e^{Kq}|^2 - |e^{Kq}^T V|^2) / s."""
    z, _, weight, v, _ = moments(draw, s, 1)
    mean = weight @ v
    wanted = (v.square().sum() * weight.square().sum() - mean.square().sum()) / s
    require_mean((z - mean).square().sum(1, keepdim=True), wanted)


@pytest.mark.parametrize("t", [1, 3])
def test_the_denominator_is_unbiased_with_the_variance_of_uniform_samples(draw: Draw, t: int) -> None:
    """Var tau = sum over clusters of n'^2 / t times the variance of e^{q.k} within the cluster."""
    _, tau, weight, _, joined = moments(draw, 2, t)
    require_mean(tau.unsqueeze(1), weight.sum())
    wanted = sum((joined == j).sum() ** 2 / t * weight[joined == j].var(correction=0) for j in joined.unique().tolist())
    require_mean((tau - weight.sum()).square().unsqueeze(1), torch.as_tensor(wanted))


def test_a_cluster_of_equal_keys_gives_its_mass_without_error(draw: Draw) -> None:
    k = draw(1, 1, 4).expand(1, 32, 4)
    state = filled("subgen_sketch(delta=0.5,t=1,s=2)", k, draw(1, 32, 4))
    q = draw(1, 1, 4)
    wanted = math.log(32) + float((q[0, 0] * k[0, 0]).sum())
    assert float(state.read(q).log_mass) == pytest.approx(wanted, abs=1e-12)


# ---- zeros ------------------------------------------------------------------------------------------------------


def test_tokens_of_zero_value_are_never_stored_as_pairs(draw: Draw) -> None:
    v = draw(1, 64, 4)
    v[:, ::2] = 0.0
    state = filled("subgen_sketch(delta=0.5,t=1,s=40)", draw(1, 64, 4), v)
    assert bool((state.pairs.v.norm(dim=-1) > 0).all())


def test_nothing_but_zero_values_answers_zero_with_the_right_mass(draw: Draw) -> None:
    state = opened("subgen_sketch(delta=1e-9,t=1,s=4)")
    k, q = draw(1, 32, 4), draw(1, 2, 4)
    state.append(k, torch.zeros(1, 32, 4, dtype=torch.float64))
    part = state.read(q)
    assert bool((part.mean == 0).all())
    torch.testing.assert_close(part.log_mass, torch.logsumexp(q @ k.transpose(1, 2), -1))


def test_values_of_extreme_sizes_stay_finite(draw: Draw) -> None:
    v = draw(1, 32, 4, dtype=torch.float32)
    v[:, ::2] *= 1e15
    v[:, 1::2] *= 1e-15
    state = filled("subgen_sketch(delta=0.5,t=1,s=8)", draw(1, 32, 4, dtype=torch.float32), v)
    assert bool(torch.isfinite(state.read(draw(1, 3, 4, dtype=torch.float32)).mean).all())


def test_an_overfull_sketch_answers_finite_numbers(draw: Draw) -> None:
    """One far key among many in the only cluster: its pair weighs e^200 more than the key sampled for tau."""
    k = torch.zeros(8, 160, 1, dtype=torch.float32)
    k[:, 7] = 200.0
    v = torch.zeros(8, 160, 2, dtype=torch.float32)
    v[:, :, 0] = 1.0
    state = opened("subgen_sketch(delta=0.5,t=1,s=64,centres=1)", rows=8, d=1, dv=2, dtype=torch.float32)
    out = state.step(torch.ones(8, 1, 160, 1), k, v)
    assert bool(torch.isfinite(out).all())


# ---- the guarantee ------------------------------------------------------------------------------------------------


def test_no_guarantee_without_a_radius() -> None:
    assert opened("subgen_sketch").guarantee() is None


def test_the_stated_epsilon_follows_the_constants_of_the_theorem() -> None:
    spec = Spec(1, 4, 5)
    stated = parse("subgen_sketch(delta=0.2,radius=1.5,t=9,s=4000,failure=0.2)").guarantee(spec)
    assert stated is not None
    ratio = math.exp(2 * 0.2 * 1.5)
    numerator = math.sqrt(9 * 5 / (4000 * 0.1))
    denominator = math.sqrt(9 * (ratio - 1) ** 2 / (4 * ratio * 9 * 0.1))
    assert stated.epsilon == pytest.approx(max(numerator, denominator)) and stated.delta == 0.2
    assert stated.holds == (stated.epsilon < 1)


def test_a_vacuous_epsilon_says_so() -> None:
    stated = parse("subgen_sketch(radius=5.0,t=1,s=1)").guarantee(Spec(1, 4, 4))
    assert stated is not None and not stated.holds and "vacuous" in stated.why


def test_the_guarantee_is_withdrawn_past_the_cap_on_centres(draw: Draw) -> None:
    state = opened("subgen_sketch(delta=0.05,radius=0.5,t=4,s=5000,centres=3,failure=0.5)", d=2, dv=1)
    far = torch.eye(2, dtype=torch.float64).repeat(1, 8, 1)
    state.append(far, draw(1, 16, 1))
    kept = state.guarantee()
    assert kept is not None and kept.holds
    state.append(draw(1, 16, 2), draw(1, 16, 1))
    withdrawn = state.guarantee()
    assert withdrawn is not None and not withdrawn.holds and "cap" in withdrawn.why
    assert state.method.from_bytes(state.to_bytes()).guarantee() == withdrawn


@pytest.mark.parametrize("budget", [22, 64, 500])
def test_a_budget_bounds_what_is_stored_whatever_comes(draw: Draw, budget: int) -> None:
    state = opened(f"subgen_sketch(delta=0.01)@{budget}")
    before = state.nbytes
    state.append(draw(1, 640, 4), draw(1, 640, 4))
    assert state.nbytes == before
    s, centres = state.method.sizes()  # type: ignore[attr-defined]
    assert int(state.clusters[0]) == centres
    assert s + centres * (1 + 4) / 2 + 16 <= budget + 0.5


def test_the_guarantee_is_withdrawn_when_a_longer_query_is_asked(draw: Draw) -> None:
    state = opened("subgen_sketch(delta=0.05,radius=2.0,t=4,s=5000,failure=0.5)", d=2, dv=1)
    k, v, q = draw(1, 4, 2), draw(1, 4, 1), torch.zeros(1, 1, 4, 2, dtype=torch.float64)
    q[..., 0] = 1.9
    state.step(q, k, v)
    kept = state.guarantee()
    assert kept is not None and kept.holds
    q[0, 0, 2, 0] = 2.1
    state.step(q, k, v)
    withdrawn = state.guarantee()
    assert withdrawn is not None and not withdrawn.holds and "2.1" in withdrawn.why
