"""Bounds from dithered codes fail no more often than delta, wherever they are nearly tight; planted faults do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.certify import chance, glimpse
from kvfloor.certify.chance import delta_of_answer, log_odds, reach_of_norm
from kvfloor.methods.stores import codes as codes_module
from kvfloor.methods.stores import dithered_tokens
from kvfloor.methods.stores.codes import GroupCodes
from kvfloor.methods.stores.dithered_tokens import DitheredTokens
from kvfloor.methods.tiered import fetch
from kvfloor.methods.tiered.tiered import Tiered, TieredState
from kvfloor.statistics import clopper_pearson_limit
from tests.certify.families import FAMILIES, queries
from tests.certify.test_trials import truth
from tests.support import Draw, seeded

Patch = pytest.MonkeyPatch
LUCK = 1e-4
"""The probability with which a test of coverage may fail by chance, for a bound that fails exactly with delta."""


@dataclass(frozen=True)
class Case:
    """Hold one stream k (n, d), v (n, dv), one query q (d) and the method that reads it.

    exact  True: the values are read as they were given, so that the keys' residuals alone err
    """

    k: Tensor
    v: Tensor
    q: Tensor
    method: Tiered
    exact: bool = False

    def state(self, seeds: int, seed: int = 0) -> TieredState:
        """Open a row of this stream for each of so many independent dithers."""
        spec = Spec(seeds, self.k.shape[1], self.v.shape[1], dtype=torch.float64, seed=seed)
        state = self.method.open(spec)
        state.append(self.k.expand(seeds, -1, -1), self.v.expand(seeds, -1, -1))
        return state

    def failures(self, seeds: int, *deltas: float, seed: int = 0) -> list[int]:
        """Return, for each delta, how many of so many answers err more than their statistical bound."""
        state, wrong = self.state(seeds, seed), []
        assert state.hot is not None
        found = state.hot.glimpse(self.q.expand(seeds, 1, -1), None)[0]
        if self.exact:
            assert found.dither is not None
            given = state.hot.turned(self.v).expand(seeds, -1, -1)
            none, law = torch.zeros_like(found.radius), replace(found.dither, step=None)
            found = replace(found, v=given, radius=none, operator=none[:, 0], dither=law)
        for delta in deltas:
            answer = state.hot.upright(found.answer(delta)[0])
            assert answer.chance is not None
            error = self.error(answer.partial.mean)
            wrong.append(int((error > answer.chance + 1e-13 * float(self.v.norm(dim=-1).max())).sum()))
        return wrong

    def error(self, mean: Tensor) -> Tensor:
        """Return the distances of answers (rows, 1, dv) to the true one."""
        spec = Spec(1, self.k.shape[1], self.v.shape[1])
        return (mean - truth(self.q[None, None], self.k[None], self.v[None], spec)).norm(dim=-1)


def signed(n: int) -> Tensor:
    """Return values (n, 1), 1 and -1 in turn."""
    return 1 - 2.0 * (torch.arange(n, dtype=torch.float64) % 2).unsqueeze(1)


def many_equal_weights() -> Case:
    """Return tokens whose errors add up to a nearly normal number, along one line: the bound's worst case."""
    draw = seeded(1)
    return Case(draw(32, 2), signed(32), draw(2) * 1e-4, Tiered(page=32, first=0, recent=0, extra=0, delta=0.1), True)


def halfway() -> Case:
    """Return keys that lie halfway between two steps, where a dither that is not subtracted errs most.

    All entries of a key are equal, so their errors add up where they have one dither.
    """
    steps = torch.tensor([0.0, 255.0, *(100.5 + i for i in range(62))], dtype=torch.float64)
    k = steps.unsqueeze(1).expand(-1, 4)
    method = Tiered(page=64, first=0, recent=0, extra=0, delta=0.1)
    return Case(k, signed(64), torch.full((4,), 1e-5, dtype=torch.float64), method, True)


def of_values() -> Case:
    """Return keys of zeros, so that only the values' residuals err."""
    draw = seeded(2)
    k, v = torch.zeros(64, 2, dtype=torch.float64), draw(64, 8)
    return Case(k, v, draw(2), Tiered(page=64, first=0, recent=0, delta=0.1, values=4))


def half_of_the_tokens() -> Case:
    """Return a page of equal keys with values -1, then a page of a wide range with values 1, in 4 bits.

    The weights of the second page are too large on average, those of the first are not: what errs is mostly bias.
    """
    n = 8192
    k = torch.zeros(2 * n, 1, dtype=torch.float64)
    k[n] = -2
    v = torch.cat((-torch.ones(n, 1), torch.ones(n, 1))).double()
    method = Tiered(page=n, first=0, recent=0, keys=4, extra=0, delta=0.1)
    return Case(k, v, torch.tensor([9.0], dtype=torch.float64), method, True)


def by_their_weight() -> Case:
    """Return tokens of equal weights, of which a fetch takes those whose weights the codes exaggerate."""
    k = torch.zeros(128, 1, dtype=torch.float64)
    k[64], k[65] = -1, 1
    v = torch.cat((-torch.ones(64, 1), torch.ones(64, 1))).double()
    method = Tiered(page=64, first=64, recent=0, keys=4, extra=0, delta=0.1)
    return Case(k, v, torch.tensor([0.75], dtype=torch.float64), method)


def one_heavy_token() -> Case:
    draw = seeded(5)
    k = draw(64, 4)
    k[7] *= 4
    return Case(k, draw(64, 2), k[7] * 0.2, Tiered(page=32, first=0, recent=0, delta=0.1, keys=6, values=6))


def of_family(name: str) -> Case:
    draw: Draw = seeded(6)
    k = FAMILIES[name](draw, 1, 64, 4)
    method = Tiered(page=16, first=2, recent=16, keys=6, values=6, delta=0.1)
    return Case(k[0], draw(64, 3), queries(draw, k, 2)[0, 1], method)


CASES: dict[str, Callable[[], Case]] = {
    made.__name__: made for made in (many_equal_weights, halfway, of_values, by_their_weight, one_heavy_token)
}
DELTAS = (0.1, 0.01, 0.001)
TRIALS = 2000


def require_covered(wrong: int, trials: int, delta: float) -> None:
    """Fail if so many wrong ones of so many trials show that the probability of failing is above delta.

    The lower limit is exact (Clopper and Pearson): it exceeds delta with probability LUCK at most, if delta is right.
    """
    assert 1 - clopper_pearson_limit(trials - wrong, trials, LUCK) <= delta, (wrong, trials, delta)


@pytest.mark.parametrize("name", CASES)
def test_bounds_fail_no_more_often_than_delta(name: str) -> None:
    for wrong, delta in zip(CASES[name]().failures(TRIALS, *DELTAS), DELTAS, strict=True):
        require_covered(wrong, TRIALS, delta)


def test_bounds_of_what_errs_by_bias_fail_no_more_often_than_delta() -> None:
    (wrong,) = half_of_the_tokens().failures(60, 0.1)
    require_covered(wrong, 60, 0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_bounds_over_adversarial_families_fail_no_more_often_than_delta(name: str) -> None:
    (wrong,) = of_family(name).failures(400, 0.1)
    require_covered(wrong, 400, 0.1)


def test_bounds_after_a_fetch_fail_no_more_often_than_delta(monkeypatch: Patch) -> None:
    assert not fetched_failures(monkeypatch)


def fetched_failures(patch: Patch, seeds: int = 300) -> int:
    """Return how many answers err more than their bound once 32 of 64 coded tokens were fetched, or more."""
    for module in (chance, fetch):
        patch.setattr(module, "FIRST", 32)
    case = by_their_weight()
    asked = case.q.expand(seeds, 1, -1)
    first = case.state(seeds).read_certified(asked, 1e6)
    state = case.state(seeds)
    found = state.read_certified(asked, float(first.relative.min()) * 0.9)
    assert state.tally.unfetched == 0
    return int((case.error(found.partial.mean) > found.bound + 1e-13).sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bounds_fail_no_more_often_than_delta_in_two_hundred_thousand_trials(name: str) -> None:
    deltas, case = (*DELTAS, 0.0001), CASES[name]()
    found = [case.failures(10_000, *deltas, seed=seed) for seed in range(20)]
    for wrong, delta in zip((sum(x) for x in zip(*found, strict=True)), deltas, strict=True):
        require_covered(wrong, 200_000, delta)


# ---- planted faults --------------------------------------------------------------------------------------------------


def half_the_variance(patch: Patch) -> None:
    real = chance.reach_of_norm
    patch.setattr(chance, "reach_of_norm", lambda *given: real(*given) / 2**0.5)


def never_subtracted(patch: Patch) -> None:
    for kind in (GroupCodes, DitheredTokens):
        real = kind.shift
        patch.setattr(kind, "shift", lambda self, *given, real=real: torch.zeros_like(real(self, *given)))


def alike(change: Callable[[Tensor, int], tuple[Tensor, int]]) -> Callable[[Patch], None]:
    """Return a fault that draws dithers of other positions, or for fewer channels, which are repeated."""

    def plant(patch: Patch) -> None:
        for module in (codes_module, dithered_tokens):
            real = module.dither

            def faulty(
                spec: Spec, rows: Tensor | None, position: Tensor, width: int, purpose: str, real: Callable = real
            ) -> Tensor:
                there, fewer = change(position, width)
                return real(spec, rows, there, fewer, purpose).expand(-1, -1, width)

            patch.setattr(module, "dither", faulty)

    return plant


def no_bias(patch: Patch) -> None:
    patch.setattr(chance, "bias", lambda square, off, share: torch.zeros_like(square))


FAULTS: dict[str, tuple[Callable[[Patch], None], Callable[[], Case], float, int]] = {
    "keys have half the variance": (half_the_variance, many_equal_weights, 0.0001, 20_000),
    "values have half the variance": (half_the_variance, of_values, 0.001, TRIALS),
    "the dither is not subtracted": (never_subtracted, halfway, 0.001, TRIALS),
    "all tokens have the same dither": (alike(lambda at, w: (at * 0, w)), by_their_weight, 0.1, 1000),
    "all entries have the same dither": (alike(lambda at, w: (at, 1)), halfway, 0.001, TRIALS),
    "the bias is forgotten": (no_bias, half_of_the_tokens, 0.1, 60),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_more_often_than_delta(name: str, monkeypatch: Patch) -> None:
    plant, case, delta, trials = FAULTS[name]
    plant(monkeypatch)
    (wrong,) = case().failures(trials, delta)
    with pytest.raises(AssertionError):
        require_covered(wrong, trials, delta)


def test_a_bound_that_forgets_that_fetched_tokens_were_chosen_fails(monkeypatch: Patch) -> None:
    monkeypatch.setattr(chance, "log_odds", lambda delta, fetched, tokens: log_odds(delta, 0, tokens))
    assert fetched_failures(monkeypatch) > 100


def test_a_query_that_knows_the_dither_breaks_the_statistical_bound_and_not_the_certain_one() -> None:
    """The bound is oblivious: it says nothing about a query that was made from the codes."""
    draw = seeded(7)
    k, v = draw(64, 144), signed(64)
    state = Case(k, v, k[0], Tiered(page=64, first=0, recent=0, extra=0, keys=4, delta=1e-3)).state(1)
    assert state.hot is not None
    knowing = (v * (k - state.hot.codes.keys(torch.arange(64)))).sum(0)
    for q, fails in ((knowing, True), (draw(144), False)):
        q = q / q.norm() * 0.1
        found = state.read_certified(q[None, None], 1e6)
        error = Case(k, v, q, state.method).error(found.partial.mean)
        assert found.chance is not None
        assert bool(error > found.chance) == fails
        assert bool(error <= found.certain)


# ---- the numbers of the theorem --------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0.7, 2.3, 6.9, 20.0, 300.0])
def test_the_reach_of_a_norm_holds_for_normal_numbers_and_is_no_larger_than_known_bounds(failing: float) -> None:
    tails = {
        1: lambda x: math.erfc(math.sqrt(x / 2)),
        2: lambda x: math.exp(-x / 2),
        4: lambda x: math.exp(-x / 2) * (1 + x / 2),
    }
    for dimensions, tail in tails.items():
        x = reach_of_norm(failing, dimensions) ** 2
        assert tail(x) <= math.exp(-failing) * (1 + 1e-9)
        assert x <= (dimensions + 2 * math.sqrt(dimensions * failing) + 2 * failing) * (1 + 1e-9)
        chernoff = (dimensions * math.log(x / dimensions) + dimensions - x) / 2
        assert chernoff == pytest.approx(-failing, rel=1e-6)


@pytest.mark.parametrize("tokens", [5, 40, 300])
def test_all_that_an_answer_may_have_fetched_fails_with_delta_together(tokens: int) -> None:
    stages, count = [0], chance.FIRST
    while count < 2 * tokens:
        stages.append(min(count, tokens))
        count *= 2
    stages = sorted(set(stages))
    each = [
        math.exp(-log_odds(0.01, fetched, tokens)) * sum(math.comb(tokens, j) for j in range(fetched + 1))
        for fetched in stages
    ]
    assert 0.009 <= sum(each) <= 0.01 * (1 + 1e-9)


@pytest.mark.parametrize("fetched", [False, True])
def test_distances_and_weights_that_the_bound_is_given_bound_the_true_ones(monkeypatch: Patch, fetched: bool) -> None:
    """The theorem is about true weights and true values, of which the codes know bounds alone."""
    draw = seeded(8)
    k, v, q = draw(64, 4), draw(64, 3), draw(4) * 2
    case = Case(k, v, q, Tiered(page=16, first=2, recent=16, keys=5, values=4, delta=0.1))
    state, seen = case.state(3), []
    real = chance.chance_bound
    monkeypatch.setattr(glimpse, "chance_bound", lambda law, delta, sums, *rest: seen.append(sums) or real(
        law, delta, sums, *rest))  # fmt: skip
    answer = state.read_certified(q.expand(3, 1, -1), 0.05 if fetched else 1e6)
    assert bool(state.tally.tokens) == fetched == bool(seen[-1].fetched) and answer.chance is not None
    far = (v - answer.partial.mean).norm(dim=-1).unsqueeze(1)
    logits = k @ q
    logits = logits - state.hot.glimpse(q.expand(3, 1, -1), None)[0].logits.amax(-1, keepdim=True)  # type: ignore[union-attr]
    at_most = seen[-1].weight * seen[-1].doubt.exp()
    if not fetched:
        assert bool((logits.exp() <= at_most * (1 + 1e-9)).all()) and bool((logits.exp() < at_most).any())
    assert bool((far <= seen[-1].far * (1 + 1e-9)).all())


def test_the_proxy_of_a_weights_error_bounds_its_moments() -> None:
    """E exp(t (X - E X)) <= exp(t^2 s^2 / 2) for X = exp(-eta), integrated on a grid in float64."""
    grid = (torch.arange(4001, dtype=torch.float64) - 2000) / 2000.5
    for channels in (1, 2):
        for a in (0.01, 0.3, 1.0):
            eta = a * (grid if channels == 1 else (grid[::20, None] + grid[None, ::20]).flatten())
            x = torch.exp(-eta)
            square, widest = torch.tensor(channels * a * a), torch.tensor(channels * a, dtype=torch.float64)
            s = float(chance.deviation(square.double(), widest))
            for t in (-30.0, -3.0, -0.1, 0.1, 3.0, 30.0):
                scaled = t / s
                log_moment = torch.logsumexp(scaled * (x - x.mean()), 0) - math.log(len(x))
                assert float(log_moment) <= t * t / 2 * (1 + 1e-6)


def test_bias_bounds_what_the_mean_weight_errs_by() -> None:
    square = torch.tensor([[[0.0, 0.04, 0.3]]], dtype=torch.float64)
    share = torch.tensor([[[0.2, 0.5, 0.3]]], dtype=torch.float64)
    found = chance.bias(square, torch.zeros_like(square), share)
    a = square.sqrt()
    mean = torch.where(a > 0, torch.sinh(a) / a.clamp_min(1e-9), 1.0)  # one channel
    b = (share * torch.expm1(square / 6)).sum()
    assert bool(((mean - 1 - b).abs() <= found).all())
    assert bool((found <= (mean - 1 - b).abs() + 0.1 * square.square() + 2e-3 * square).all())


def test_one_answers_delta_is_a_share_of_a_generations() -> None:
    assert delta_of_answer(1e-3, 9, 30, 2000) == pytest.approx(1e-3 / 540_000)
    for wrong in ({"delta": 0.0}, {"delta": 1.0}, {"heads": 0}, {"layers": 1.5}, {"steps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            delta_of_answer(**({"delta": 0.1, "heads": 1, "layers": 1, "steps": 1} | wrong))  # type: ignore[arg-type]


def test_the_glimpse_and_the_reader_use_these_functions() -> None:
    """The planted faults replace them by name."""
    assert glimpse.chance_bound is chance.chance_bound and fetch.FIRST == chance.FIRST
