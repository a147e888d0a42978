"""A sample of rows with coarse answers certifies what answers tell about levels, and never more than was sent."""

import math

import pytest
import torch

from kvfloor.game import play
from kvfloor.game.engine import certificates
from kvfloor.game.engine.decode import answered_rows, information, judge, log2_lists
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.secret import Hidden
from tests.game.coarse import Coarse

BITS, DV = 6, 8


def coded(hidden: torch.Tensor, eta: float) -> tuple[torch.Tensor, int]:
    """Return answers from the run of each level, and the number of runs: what an honest coarse message tells."""
    answers, lowest = Coarse("chirp", 8, 0, BITS, eta).runs()
    run = (hidden.flatten().unsqueeze(1) < lowest).sum(1)
    return answers[run].view(hidden.shape), len(answers)


@pytest.mark.parametrize("eta", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.6])
def test_no_more_is_certified_than_an_honest_message_holds(eta: float, share: float) -> None:
    n, drawn, lists = 6000, 1500, log2_lists(BITS, eta)
    for seed in range(6):
        hidden = Hidden(seed).levels(n, DV, BITS)
        answers, runs = coded(hidden, eta)
        held = int(share * n)
        answers[held:] = coded(Hidden(100 + seed).levels(n, DV, BITS), eta)[0][held:]
        rows = Hidden(seed).rows(n, drawn)
        missed = int((~answered_rows(answers[rows], hidden[rows], BITS, eta)).sum())
        claim = certificates.certified_lists_from_sample(n, DV, BITS, lists, missed, drawn)
        told, _ = information(BITS, eta)
        assert claim <= held * DV * math.log2(runs)
        if share == 1.0:
            assert missed == 0 and claim > (0.75 if eta < 0.9 else 0.2) * n * DV * told
        unpaid = certificates.certified_lists_from_sample(n, DV, BITS, torch.zeros(1), missed, drawn)
        assert unpaid > held * DV * math.log2(runs) or share < 1.0  # the mutant: coarse answers count as decoded


def test_the_payment_for_long_lists_and_for_misses_is_made() -> None:
    lists = log2_lists(BITS, 0.5)
    claims = [certificates.certified_lists_from_sample(500, DV, BITS, lists, k, 100, 0.01) for k in range(101)]
    assert claims == sorted(claims, reverse=True) and claims[0] > 0.0 and claims[-1] == 0.0
    told = BITS - lists.mean().item()
    e = certificates.clopper_pearson_limit(0, 100, 0.01 / 3)
    free = 500 * (DV * (BITS * (1 - e) - (BITS - told)) - certificates.H2(e))
    assert claims[0] < free - lists.max().item() * math.sqrt(500 * DV * math.log(300) / 2) + 1e-6
    assert claims[0] == pytest.approx(
        free - lists.max().item() * math.sqrt(500 * DV * math.log(300) / 2) - math.log2(300)
    )


def test_sums_of_lists_seldom_exceed_what_is_allowed_for() -> None:
    """Uniform levels of 4 bits at eta = 0.5: at a tenth, the allowance is exceeded in no more than a tenth of draws."""
    lists = log2_lists(4, 0.5)
    draws = torch.randint(len(lists), (4000, 40 * DV), generator=torch.Generator().manual_seed(1))
    excess = lists[draws].sum(1) - 40 * DV * lists.mean()
    allowed = lists.max() * math.sqrt(40 * DV * math.log(10) / 2)
    assert (excess > allowed).double().mean() <= 0.1
    assert (excess > 0).double().mean() > 0.3  # without the allowance it would fail as often


def test_judge_takes_the_better_of_the_two() -> None:
    hidden = Hidden(3).levels(800, DV, BITS)
    coarse, _ = coded(hidden, 0.5)
    found = judge(coarse, hidden, BITS, 0.5, sampled_from=20_000)
    assert found.certificate == "sampled lists" and found.row_success == 1.0
    assert 0.0 < found.certified_bits <= 20_000 * DV * information(BITS, 0.5)[0]
    exact = judge(hidden.double() / (2**BITS - 1), hidden, BITS, 0.5, sampled_from=20_000)
    assert exact.certificate == "sampled rows" and exact.certified_bits > found.certified_bits
    single = judge(hidden.double() % 2, hidden % 2, 1, 0.5, sampled_from=20_000)
    assert single.certificate == "sampled rows"


def test_a_coarse_method_is_certified_by_a_sample_of_its_rows() -> None:
    shared = agreed(d=32, dv=None, bits=8, eta=0.5, seed=0)
    keys = keys_for(shared, 500)
    method = Coarse(keys.family, 500, keys.seed, 8, 0.5)
    found = play(method, n=500, d=32, bits=8, eta=0.5, rows=400, isolated=False)
    assert (found.verdict, found.certificate) == ("holds", "sampled lists")
    assert 0.5 * found.floor_bits < found.certified_bits <= 8 * found.message_bytes
