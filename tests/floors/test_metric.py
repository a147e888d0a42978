"""Norm guarantees: adversarial answers that stay within them, codes that must not be forbidden, the program itself."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfloor import floors
from kvfloor.floors.metric import NORMS, best_rows


def signs(m: int, dv: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 2, (m, dv), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


# ---- how many signs an answer within the guarantee may get wrong ---------------------------------------------


def test_shares_by_hand():
    assert floors.wrong_share("max", 0.1, 50, 64) == pytest.approx(0.01)
    assert floors.wrong_share("max", 0.1, 50, 64, 0.125) == pytest.approx((0.1 * (9 / 8) / (7 / 8)) ** 2)
    assert floors.wrong_share("frobenius", 0.1, 50, 64) == pytest.approx(0.01 * 50)
    assert floors.wrong_share("frobenius", 0.1, 50, 64, 0.125) == pytest.approx(0.5 * (65 / 64) / (49 / 64))
    assert floors.wrong_share("operator", 0.1, 50, 16, norm=8.0) == pytest.approx(0.01 * 64 / 16)
    assert floors.wrong_share("operator", 0.1, 1, 16) == pytest.approx(0.01 * 16 / 16)
    assert floors.wrong_share("max", 0.1, 50, 64, 1.0) == math.inf


@given(st.floats(0.0, 0.49))
def test_no_larger_than_with_the_customary_margin(leak):
    """1/(1 - 2 leak)^2 is what a margin of 1 - 2 leak gives."""
    for metric in ("max", "frobenius"):
        customary = floors.wrong_share(metric, 0.1, 7, 64) / (1 - 2 * leak) ** 2
        assert floors.wrong_share(metric, 0.1, 7, 64, leak) <= customary * (1 + 1e-9)


def most_wrong(metric: str, epsilon: float, weights: torch.Tensor, values: torch.Tensor) -> int:
    """Signs that an adversary can spoil within the guarantee: setting an entry to 0 costs its square."""
    answer = weights @ values
    size = {
        "max": values.norm(dim=1).max(),
        "frobenius": weights.norm() * values.norm(),
        "operator": weights.norm() * torch.linalg.matrix_norm(values, 2),
    }[metric]
    cheapest_first = answer.square().sort().values.cumsum(0)
    return int((cheapest_first <= (epsilon * size) ** 2 * (1 + 1e-12)).sum())


def spike_weights(m: int, leak: float) -> torch.Tensor:
    """Softmax weights of a spike on token 0: leak / (m - 1) of its mass on each other token."""
    weights = torch.full((m,), leak / (m - 1), dtype=torch.float64)
    weights[0] = 1.0
    return weights / weights.sum()


@pytest.mark.parametrize("metric", ["max", "frobenius", "operator"])
def test_no_adversary_spoils_more_signs_than_the_share(metric):
    for m, dv, leak, epsilon, seed in itertools.product((2, 5, 12), (8, 33), (0.01, 0.3), (0.1, 0.25), range(4)):
        values, weights = signs(m, dv, seed), spike_weights(m, leak)
        if seed == 0:
            values[1:] = -values[0]  # the worst neighbours
        norm = torch.linalg.matrix_norm(values, 2).item()
        share = floors.wrong_share(metric, epsilon, m, dv, leak, norm if metric == "operator" else None)
        assert most_wrong(metric, epsilon, weights, values) <= share * dv + 1e-9


@pytest.mark.parametrize("metric", ["max", "frobenius", "operator"])
def test_the_share_is_attained_by_two_opposite_rows_and_a_share_without_the_leak_is_not_enough(metric):
    dv, leak, epsilon = 64, 0.25, 0.2
    values = signs(2, dv, 0)
    values[1] = -values[0]
    norm = torch.linalg.matrix_norm(values, 2).item() if metric == "operator" else None
    spoiled = most_wrong(metric, epsilon, spike_weights(2, leak), values)
    assert spoiled == math.floor(floors.wrong_share(metric, epsilon, 2, dv, leak, norm) * dv + 1e-9)
    assert spoiled > floors.wrong_share(metric, epsilon, 2, dv, 0.0, norm) * dv


# ---- the norm of sign matrices -------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "dv"), [(1, 6), (3, 3), (2, 5), (4, 3)])
def test_at_least_half_of_all_small_sign_matrices_have_the_norm(m, dv):
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=m * dv))).double().view(-1, m, dv)
    norms = torch.linalg.matrix_norm(every, 2)
    assert (norms <= floors.sign_norm(m, dv) * (1 + 1e-12)).double().mean() >= 0.5


@pytest.mark.parametrize(("m", "dv"), [(3, 3), (2, 5)])
def test_the_moments_it_is_derived_from_hold_exactly(m, dv):
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=m * dv))).double().view(-1, m, dv)
    squares = torch.linalg.matrix_norm(every, 2).square()
    s2 = (math.sqrt(m) + math.sqrt(dv)) ** 2
    for k in range(1, 12):
        assert squares.pow(k).mean() <= min(m, dv) * s2**k * math.exp(2 * k**2 / s2)


@pytest.mark.parametrize(("m", "dv"), [(64, 64), (256, 32), (100, 300)])
def test_large_sign_matrices_stay_below_and_a_norm_of_orthogonal_columns_is_no_bound(m, dv):
    norms = [torch.linalg.matrix_norm(signs(m, dv, seed), 2).item() for seed in range(10)]
    assert max(norms) <= floors.sign_norm(m, dv) <= 1.3 * sorted(norms)[5]
    assert min(norms) > math.sqrt(max(m, dv))  # the mutant: what sqrt(m) columns at right angles would have


def test_norm_bound_grows_with_both_sides():
    for dv in (1, 7, 64):
        column = [floors.sign_norm(m, dv) for m in range(1, 400)]
        assert column == sorted(column)
        assert column == [floors.sign_norm(dv, m) for m in range(1, 400)]
    assert floors.sign_norm(5, 1) == pytest.approx(math.sqrt(5))


# ---- bits of a row that may have errors ----------------------------------------------------------------------


def test_balls_by_hand():
    assert floors.ball_bits(7, 1) == 3.0  # 1 + 7
    assert floors.ball_bits(23, 3) == 11.0  # 1 + 23 + 253 + 1771 = 2^11
    assert floors.ball_bits(5, 5) == floors.ball_bits(5, 9) == 5.0
    assert floors.noisy_row_bits(10, 7, 1.0, 1) == 40.0
    assert floors.noisy_row_bits(10, 7, 0.9, 1) == pytest.approx(10 * (0.9 * 4 - 0.4689955935892812))
    assert floors.noisy_row_bits(10, 7, 1.0, 7) == 0.0
    assert floors.noisy_row_bits(100, 64, 0.9, 0) == floors.row_bits(100, 64, 0.9)


@given(st.integers(1, 200), st.data())
def test_the_entropy_form_is_weaker(dv, data):
    wrong = data.draw(st.integers(0, dv // 2))
    assert floors.ball_bits(dv, wrong) <= dv * floors.H2(wrong / dv) + 1e-9


def hamming_distance_to_code() -> list[int]:
    """Distance of each of the 2^7 words to the nearest of the 16 code words of the (7, 4) Hamming code."""
    checks = range(1, 8)
    code = [
        word for word in itertools.product((0, 1), repeat=7)
        if not any(sum(bit for bit, at in zip(word, checks, strict=True) if at >> i & 1) % 2 for i in range(3))
    ]  # fmt: skip
    return [
        min(sum(a != b for a, b in zip(word, other, strict=True)) for other in code)
        for word in itertools.product((0, 1), repeat=7)
    ]


def test_covering_codes_are_not_forbidden_and_the_mutants_forbid_them():
    """Rows sent as the nearest Hamming code word take 4 bits of 7 and come back with at most one error."""
    distances = hamming_distance_to_code()
    assert max(distances) == 1
    n, guessed_right = 60, 8 / 128  # a fixed word is within 1 of 8 of the 128 rows
    for coded in range(n + 1):
        message, p = 4 * coded, coded / n + (1 - coded / n) * guessed_right
        assert floors.noisy_row_bits(n, 7, p, 1) <= message + 1e-9
    assert n * (7 - math.log2(7)) > 4 * n  # exactly one error counted, not at most one
    half = 0.5 + 0.5 * guessed_right
    assert n * half * 4 > 4 * n // 2  # no entropy of which rows are right


# ---- the program ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.6, 0.9, 1.0])
@pytest.mark.parametrize("slope", [0.001, 0.02, 0.11])
def test_the_program_is_the_maximum(p, slope):
    def wrong(m: int, width: int) -> int:
        return math.floor(slope * m * width)

    every = [
        floors.noisy_row_bits(m, width, p, min(width, wrong(m, width))) for m in range(1, 61) for width in range(1, 13)
    ]
    assert best_rows(60, 12, p, wrong)[3] == pytest.approx(max(every), abs=1e-9)


def test_max_norm_by_hand():
    """epsilon = 0.2 allows 0.04 x 64 = 2.56 wrong signs: two, so log2(1 + 64 + 2016) bits of 64 are lost."""
    floor = floors.metric_space(1000, 64, metric="max", epsilon=0.2, values="binary")
    assert floor.bits == pytest.approx(1000 * (0.9 * (64 - math.log2(2081)) - floors.H2(0.9)))
    assert (floor.constants["rows"], floor.constants["wrong_per_row"]) == (1000, 2)
    exact = floors.metric_space(1000, 64, metric="max", epsilon=0.0, values="binary")
    assert exact.bits == pytest.approx(floors.space(1000, 64, eta=0.0, values="binary").bits)
    assert floors.metric_space(1000, 64, metric="max", epsilon=1.0).regime == "vacuous (max norm)"


def test_frobenius_by_hand():
    """epsilon = 0.1, p = 1: m rows of w signs allow floor(0.01 m w) wrong ones in each.

    10 signs: none in 9 rows (90 bits), one in 19 (19 (10 - log2 11) = 124.3), two in 29 (29 (10 - log2 56) = 121.6).
    9 signs: one in 22 rows, 22 (9 - log2 10) = 124.9 bits, the most.
    """
    floor = floors.metric_space(10**6, 10, metric="frobenius", epsilon=0.1, p=1.0, values="binary")
    assert floor.bits == pytest.approx(22 * (9 - math.log2(10)))
    assert floor.bits > max(90, 19 * (10 - math.log2(11)), 29 * (10 - math.log2(56)))
    assert (floor.constants["rows"], floor.constants["row_width"], floor.constants["wrong_per_row"]) == (22, 9, 1)


def test_the_limits_constant():
    """With rho = 0.11 it is 0.0550 dv/epsilon^2; the maximum of u (1 - H2(u)) is 0.0586, at u = 0.1545."""
    shares = [u / 10_000 for u in range(1, 5000)]
    best = max(shares, key=lambda u: u * (1 - floors.H2(u)))
    assert best == pytest.approx(0.1545, abs=2e-4)
    assert best * (1 - floors.H2(best)) == pytest.approx(0.05856, abs=1e-5)
    assert 0.11 * (1 - floors.H2(0.11)) == pytest.approx(0.0550, abs=1e-4)
    for dv, least, most in ((64, 0.0585, 0.0720), (512, 0.0585, 0.0610)):
        frobenius = floors.metric_space(10**9, 64, dv, metric="frobenius", epsilon=1e-3, p=1.0, values="binary")
        assert least <= frobenius.bits * 1e-6 / dv <= most
    operator = floors.metric_space(10**9, 64, 64, metric="operator", epsilon=1e-3, p=1.0, values="binary")
    assert 0.0585 <= operator.bits * 1e-6 / 64**2 <= 0.0720


def test_the_limit_is_no_bound():
    """At epsilon = 1 the answer 0 meets every guarantee from no memory, where 0.055 dv/epsilon^2 forbids it."""
    for metric in NORMS:
        assert floors.metric_space(10**9, 64, 64, metric=metric, epsilon=1.0, p=1.0).bits == 0.0
        values, weights = signs(30, 64, 0), spike_weights(30, 0.2)
        assert most_wrong(metric, 1.0, weights, values) == 64
    assert 0.055 * 64 / 1.0**2 > 0.0
    whole_rows_only = max(m * (1 - floors.H2(0.09 * m)) for m in range(1, 6))  # epsilon = 0.3, in entropy's form
    assert whole_rows_only < 0.0585 / 0.3**2


def test_operator_pays_one_bit_for_half_of_the_matrices_and_takes_a_measured_norm():
    asked = {"metric": "operator", "epsilon": 0.05, "p": 1.0, "values": "binary"}
    measured = floors.metric_space(100, 64, 8, norm=14.0, **asked)
    share = 0.05**2 * 14**2 / 8
    wrong = math.floor(share * 8)
    assert wrong == 0
    assert measured.bits == pytest.approx(100 * 8 - 1)
    assert measured.constants["operator_norm"] == 14.0
    derived = floors.metric_space(100, 64, 8, **asked)
    assert derived.bits <= measured.bits
    two = floors.metric_space(100, 64, 8, norm=14.0, heads=2, **asked)
    assert two.bits == pytest.approx(2 * measured.bits)


def test_window_and_radius_bound_the_rows():
    def rows(**changed):
        return floors.metric_space(10**6, 64, metric="max", epsilon=0.1, **changed).constants["rows"]

    assert (rows(), rows(window=300), rows(window=1)) == (10**6, 299, 0)
    assert rows(radius=16.0) < 10**6
    assert rows(radius=1e4) == 10**6
    two = floors.metric_space(10**6, 1, 64, metric="max", epsilon=0.1)
    assert two.constants["rows"] == 2
    leaky = floors.metric_space(10**6, 64, metric="frobenius", epsilon=0.05, radius=16.0)
    m, gap = leaky.constants["rows"], leaky.constants["gap"]
    assert leaky.constants["leak_ratio"] == pytest.approx(m * math.exp(-16 * gap))


ARGUMENTS = {
    "n": st.integers(1, 10**6), "d": st.integers(1, 128), "dv": st.integers(1, 24), "epsilon": st.floats(0.0, 1.2),
    "p": st.floats(0.01, 1.0), "radius": st.none() | st.floats(0.01, 100.0),
    "window": st.none() | st.integers(1, 10**6), "heads": st.integers(1, 8), "layers": st.integers(1, 8),
    "metric": st.sampled_from(NORMS), "values": st.sampled_from(list(floors.VALUES)),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries(ARGUMENTS), st.integers(1, 1000), st.floats(1.0, 3.0))
def test_monotone_in_every_argument_and_below_what_suffices(given_arguments, more, factor):
    def bits(**changed):
        return floors.metric_space(**(given_arguments | changed)).bits

    here, slack = bits(), 1 + 1e-9
    for name in ("n", "d", "dv", "heads", "layers", "window"):
        if given_arguments[name] is not None:
            added = min(more, 4) if name == "dv" else more
            assert bits(**{name: given_arguments[name] + added}) * slack >= here
    if given_arguments["radius"] is not None:
        assert bits(radius=given_arguments["radius"] * factor) * slack >= here
        assert bits(radius=None) * slack >= here
    assert bits(window=None) * slack >= here
    assert bits(p=1.0) * slack >= here
    assert bits(epsilon=given_arguments["epsilon"] / factor) * slack >= here
    floor = floors.metric_space(**given_arguments)
    assert 0.0 <= floor.bits <= floor.upper_bits * slack
    assert (floor.bits == 0.0) == floor.regime.startswith("vacuous")
