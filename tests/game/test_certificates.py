"""Every certificate obeys Pr_X[T >= S + t] <= 2^-t, by enumerating all hidden strings; its mutants do not."""

import itertools
import math
from fractions import Fraction
from functools import cache

import pytest
import torch

from kvfloor.floors import row_bits
from kvfloor.game.engine import certificates
from kvfloor.game.engine.predict import log2_level_probability, log2_row_gain, predictor_gains
from kvfloor.statistics import clopper_pearson_limit

HAMMING = [
    (a, b, c, d, a ^ b ^ d, a ^ c ^ d, b ^ c ^ d) for a, b, c, d in itertools.product((0, 1), repeat=4)
]  # the 16 words of a perfect code: every string of 7 bits lies within one bit of exactly one of them


def worst_excess(gain, decode, S, N):
    """sup over t of 2^t Pr_X[T >= S + t], X uniform over {0,1}^N; a lawful gain keeps it at or below 1."""
    gains = sorted((gain(x, decode(x)) - S for x in itertools.product((0, 1), repeat=N)), reverse=True)
    return max(2.0**t * (rank + 1) / 2**N for rank, t in enumerate(gains))


def nearest_codeword(x):
    return min(HAMMING, key=lambda word: sum(a != b for a, b in zip(x, word, strict=True)))


def differing(x, y):
    return sum(a != b for a, b in zip(x, y, strict=True))


def test_hard_is_lawful_and_tight_on_a_perfect_code():
    assert worst_excess(lambda x, y: certificates.hard(7, differing(x, y)), nearest_codeword, 4, 7) == pytest.approx(
        1.0
    )


def test_hard_without_entropy_is_rejected():
    assert worst_excess(lambda x, y: 7 - differing(x, y), nearest_codeword, 4, 7) > 1.5


def test_hard_beyond_one_half_is_rejected():
    """H2 falls again beyond 1/2, so an inverted answer would count; the guard gives 0 there."""
    unguarded = worst_excess(lambda x, y: 7 * (1 - certificates.H2(differing(x, y) / 7)), lambda x: (0,) * 7, 0, 7)
    guarded = worst_excess(lambda x, y: certificates.hard(7, differing(x, y)), lambda x: (0,) * 7, 0, 7)
    assert unguarded > 1.0 >= guarded
    assert certificates.hard(10, 5) == certificates.hard(10, 10) == certificates.hard(0, 0) == 0.0


def erasure_gain(trust_by_result):
    """Eight rows of one bit; the message holds the first two, the decoder guesses 0 for the others."""

    def gain(x, y):
        wrong = torch.tensor([int(a != b) for a, b in zip(x, y, strict=True)])
        trusted = wrong == 0 if trust_by_result else torch.tensor([True] * 2 + [False] * 6)
        return certificates.erasure(1, wrong, trusted)

    return gain


def first_two(x):
    return x[:2] + (0,) * 6


def test_erasure_is_lawful_and_choosing_the_set_by_the_hidden_bits_is_rejected():
    assert worst_excess(erasure_gain(False), first_two, 2, 8) <= 1.0
    assert worst_excess(erasure_gain(True), first_two, 2, 8) > 1.5


# ---- rows -----------------------------------------------------------------------------------------------------------


def rows_gain(chances, serves):
    """Return a gain for answers y that serve row i of x if serves(x[i], y[i]), by chance 2^chances[i]."""

    @cache
    def certified(wrong):
        return certificates.rows(torch.tensor(chances, dtype=torch.float64), wrong)

    def gain(x, y):
        return certified(sum(not serves(a, b) for a, b in zip(x, y, strict=True)))

    return gain


def worst_row_excess(gain, decode, S, m, levels):
    """sup over t of 2^t Pr_X[T >= S + t], X uniform over m rows of `levels` values each."""
    gains = sorted((gain(x, decode(x)) - S for x in itertools.product(range(levels), repeat=m)), reverse=True)
    return max(2.0**t * (rank + 1) / levels**m for rank, t in enumerate(gains))


def test_rows_are_lawful_on_a_perfect_code_and_on_stored_rows():
    assert worst_excess(rows_gain([-1.0] * 7, lambda a, b: a == b), nearest_codeword, 4, 7) <= 1.0
    for stored in range(6):
        kept = worst_row_excess(
            rows_gain([-2.0] * 5, lambda a, b: a == b), lambda x, s=stored: x[:s] + (0,) * (5 - s), 2 * stored, 5, 4
        )
        assert kept <= 1.0 + 1e-9


def test_rows_without_the_choice_of_the_wrong_ones_are_rejected():
    def unpaid(x, y):
        return 2.0 * sum(a == b for a, b in zip(x, y, strict=True))

    assert worst_row_excess(unpaid, lambda x: x[:2] + (0,) * 3, 4, 5, 4) > 1.5


def test_coarse_answers_count_by_the_levels_that_they_serve():
    """Each of four rows of four levels is answered by the half it lies in: a bit a row is sent, not two."""

    def serves(a, b):
        return a // 2 == b

    def halves(x):
        return tuple(a // 2 for a in x[:3]) + (0,)

    assert worst_row_excess(rows_gain([-1.0] * 4, serves), halves, 3, 4, 4) <= 1.0 + 1e-9
    assert worst_row_excess(rows_gain([-2.0] * 4, serves), halves, 3, 4, 4) > 1.5  # as if the level were told


def test_rows_of_unlike_chances_are_lawful():
    """The first row is answered by half of its levels, the second by all, the third exactly."""
    gain = rows_gain([-1.0, 0.0, -2.0], lambda a, b: b is None or a in b)
    assert worst_row_excess(gain, lambda x: ({x[0], x[0] ^ 1}, None, {x[2]}), 3, 3, 4) <= 1.0 + 1e-9
    assert worst_row_excess(gain, lambda x: ({0, 1}, None, {x[2]}), 2, 3, 4) <= 1.0 + 1e-9


@pytest.mark.parametrize(("m", "wrong", "dv"), [(1024, 102, 64), (256, 25, 64), (64, 0, 8), (64, 6, 8)])
def test_rows_reach_the_floor_of_as_many_right_rows(m, wrong, dv):
    gain = certificates.rows(torch.full((m,), -float(dv)), wrong)
    assert gain >= row_bits(m, dv, 1.0 - wrong / m) - 1e-6
    ways = sum(math.comb(m, j) * (2**dv - 1) ** j for j in range(wrong + 1))
    exact = m * dv - math.log2(ways)  # by counting the strings with at most so many wrong rows
    assert exact - 12.0 < gain <= exact + 1e-6


def test_rows_by_hand():
    assert certificates.rows(torch.full((1024,), -64.0), 102) == pytest.approx(58_534, abs=8)
    assert certificates.rows(torch.full((10,), -8.0), 0) == pytest.approx(80.0)
    assert certificates.rows(torch.full((10,), -8.0), 10) == certificates.rows(torch.zeros(10), 3) == 0.0
    assert certificates.rows(torch.full((4,), -1536.0), 1) > 3 * 1536 - 8
    assert certificates.rows(torch.full((4,), -torch.inf), 4) == 0.0  # answers that serve no row
    with pytest.raises(ValueError, match="wrong must be at most m = 4, got 5"):
        certificates.rows(torch.zeros(4), 5)


# ---- log-loss --------------------------------------------------------------------------------------------------------

ANSWERS = torch.tensor([[0.1, 0.95, 0.4], [0.5, 0.2, 0.7]], dtype=torch.float64)
TRUSTED = torch.tensor([True, False])


def mean_power(probability, bits):
    """E_X of 2^gain under a predictor p(level | answer): 1 for a distribution, above 1 for what sums higher."""
    centre = ANSWERS * (2**bits - 1)
    total = torch.zeros_like(centre)
    for level in range(2**bits):
        total += torch.exp2(probability(centre, torch.full_like(centre, level).long(), bits))
    return total.prod().item()  # entries are independent, so the mean over X of prod 2^b p is the product of the sums


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize("width", [2.0**-6, 0.25, 1.0, 16.0])
@pytest.mark.parametrize("share", [2.0**-14, 2.0**-5])
def test_predictions_sum_to_one(bits, width, share):
    assert mean_power(
        lambda at, level, bits: log2_level_probability(at, level, 2**bits, width, share), bits
    ) == pytest.approx(1.0, abs=1e-9)


def test_a_mixture_truncated_to_a_window_is_rejected():
    """Normalising the mass by the three nearest levels only, while every level still gets its share, sums above 1."""

    def truncated(centre, level, bits):
        near = centre.round().clamp(1, 2**bits - 2)
        window = sum(
            torch.exp2(log2_level_probability(centre, (near + step).long(), 2**bits, 1.0, 0.0)) for step in (-1, 0, 1)
        )
        return log2_level_probability(centre, level, 2**bits, 1.0, 2.0**-5) - torch.log2(window)

    assert mean_power(truncated, 3) > 1.5


def test_missing_end_tails_would_waste_but_not_cheat():
    def no_tails(centre, level, bits):
        inner = (level - centre).abs() <= 2
        return torch.where(inner, log2_level_probability(centre, level, 2**bits, 1.0, 0.0), -math.inf)

    assert mean_power(no_tails, 3) < 1.0


def test_row_beliefs_keep_the_mean_at_one():
    gains = torch.log2(torch.tensor([3.0, 0.5, 0.25, 0.25], dtype=torch.float64))  # four equally likely rows, mean 1
    for belief in (0.01, 0.5, 0.99):
        mean = torch.exp2(log2_row_gain(gains, torch.full((4,), belief, dtype=torch.float64))).mean().item()
        assert mean == pytest.approx(1.0)


@pytest.mark.parametrize(("bits", "m"), [(1, 2), (2, 1)])
def test_the_best_predictor_pays_for_its_choice_and_unpaid_choice_is_rejected(bits, m):
    tables = [torch.tensor(flat).view(m, 3) for flat in itertools.product(range(2**bits), repeat=3 * m)]
    gains = [predictor_gains(ANSWERS[:m], TRUSTED[:m], hidden, 2**bits) for hidden in tables]
    for predictor in zip(*gains, strict=True):
        assert math.fsum(2.0**gain for gain in predictor) / len(tables) == pytest.approx(1.0, abs=1e-9)
    paid = math.fsum(2.0 ** certificates.log_loss(row) for row in gains) / len(tables)
    unpaid = math.fsum(2.0 ** max(row) for row in gains) / len(tables)
    assert paid <= 1.0 + 1e-9 < unpaid


def violations(pay, alpha):
    """Share of strings for which the best of three certificates exceeds the 4 bits that the codeword's number holds."""
    exceeded = 0
    for x in itertools.product((0, 1), repeat=7):
        wrong = differing(x, nearest_codeword(x))
        gains = [certificates.hard(7, wrong), certificates.hard(7, wrong) - 1.0, 0.0]
        exceeded += pay(gains, alpha) > 4.0
    return exceeded / 2**7


@pytest.mark.parametrize("alpha", [0.5, 0.05, 2.0**-20])
def test_certified_bits_exceed_the_message_with_probability_below_alpha(alpha):
    assert violations(certificates.certified, alpha) <= alpha


def test_no_payment_for_alpha_is_rejected():
    assert violations(lambda gains, alpha: max(gains) - math.log2(3), 0.05) > 0.05


def test_payments_by_hand():
    assert certificates.certified([100.0, 50.0, 0.0, 0.0]) == pytest.approx(100 - math.log2(4) - 20)
    assert certificates.certified([5.0, 0.0, 0.0]) == 0.0
    assert certificates.log_loss([8.0, 1.0, 0.0, 0.0]) == 6.0
    with pytest.raises(ValueError, match=r"alpha must lie in \(0, 1\], got 0"):
        certificates.certified([1.0], alpha=0)
    with pytest.raises(ValueError, match="wrong must be at most bits"):
        certificates.hard(3, 4)


def cdf(k, n, e):
    """Pr[Binomial(n, e) <= k] in exact arithmetic."""
    e = Fraction(e)
    return sum(math.comb(n, i) * e**i * (1 - e) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize(("wrong", "drawn", "alpha"), [(0, 10, 0.05), (3, 40, 2.0**-20), (39, 40, 0.01), (0, 1, 0.5)])
def test_clopper_pearson_inverts_the_binomial(wrong, drawn, alpha):
    limit = clopper_pearson_limit(wrong, drawn, alpha)
    assert float(cdf(wrong, drawn, limit)) == pytest.approx(alpha, rel=1e-6)
    assert clopper_pearson_limit(0, 10, 0.05) == pytest.approx(1 - 0.05**0.1)
    assert clopper_pearson_limit(10, 10, 0.05) == 1.0


def miss_rate(limit, drawn, e):
    """Exact probability that the limit falls below the true share e."""
    return float(sum(cdf(k, drawn, e) - (cdf(k - 1, drawn, e) if k else 0) for k in range(drawn + 1) if limit(k) < e))


@pytest.mark.parametrize("e", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_clopper_pearson_covers_and_the_plain_share_does_not(e):
    limits = [clopper_pearson_limit(k, 30, 0.05) for k in range(31)]
    assert miss_rate(lambda k: limits[k], 30, e) <= 0.05
    assert miss_rate(lambda k: k / 30, 30, 0.5) > 0.05


def test_sampled_rows_stay_below_what_is_stored():
    """Half of n = 200 rows of 8 bits are stored, 60 are asked: exact probability over the sample of claiming more."""
    n, row_bits, drawn, alpha = 200, 8, 60, 0.1
    e = 0.5 * (1 - 2.0**-row_bits)
    claims = [certificates.certified_from_sample(n, row_bits, wrong, drawn, alpha) for wrong in range(drawn + 1)]
    stored = 100 * row_bits
    pmf = [float(math.comb(drawn, k) * Fraction(e) ** k * Fraction(1 - e) ** (drawn - k)) for k in range(drawn + 1)]
    assert sum(p for p, claim in zip(pmf, claims, strict=True) if claim > stored) <= alpha
    plain = [n * (row_bits * (1 - k / drawn) - certificates.H2(k / drawn)) for k in range(drawn + 1)]
    assert claims == sorted(claims, reverse=True)
    assert all(claim < bits for claim, bits in zip(claims[:-1], plain[:-1], strict=True) if bits > 0)
    assert certificates.certified_from_sample(n, row_bits, drawn, drawn) == 0.0
