"""Decoding: what the answers of exact attention, of a forgotten token and of broken methods become."""

import pytest
import torch

from kvfloor.game.engine import decode
from kvfloor.game.engine.decode import (
    answered_rows,
    information,
    judge,
    leak_ratio,
    levels_served,
    nearest_levels,
    trusted_rows,
    wrong_bits,
)


def hidden_rows(m, dv, bits, seed=0):
    return torch.randint(0, 2**bits, (m, dv), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 3, 8, 12, 24])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_answers_within_the_allowed_error_decode_right(bits, eta):
    hidden = hidden_rows(50, 16, bits)
    top, leak = 2**bits - 1, leak_ratio(bits, eta) / (1 + leak_ratio(bits, eta))
    others = torch.rand(50, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    answers = (1 - leak) * hidden.double() / top + leak * others
    if bits == 1:
        answers = answers * (1 - eta + 2 * eta * others.flip(0))
    assert torch.equal(nearest_levels(answers, bits, eta), hidden)
    assert answered_rows(answers, hidden, bits, eta).all()


@pytest.mark.parametrize("bits", [1, 8])
def test_one_coordinate_outside_fails_its_row_only(bits):
    hidden = hidden_rows(5, 8, bits)
    answers = hidden.double() / (2**bits - 1)
    answers[2, 3] = 1.0 - answers[2, 3].round()
    assert answered_rows(answers, hidden, bits, 0.5).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("bits", [2, 3, 6])
def test_the_levels_that_an_answer_serves_are_counted_and_their_information_is_not_overstated(bits, eta):
    """Against the definition, level by level: which answers are right for each level."""
    answers, level = torch.linspace(-0.2, 2.2, 30_001, dtype=torch.float64), torch.arange(2**bits)
    grid = answers.unsqueeze(1).expand(-1, 2**bits).reshape(-1, 1)
    right = answered_rows(grid, level.repeat(len(answers)).unsqueeze(1), bits, eta).view(len(answers), -1)
    served = levels_served(answers, bits, eta)
    assert (served >= right.sum(1)).all() and (served > right.sum(1)).double().mean() < 1e-3
    most = torch.where(right, right.sum(1, keepdim=True), 0).amax(0).double()  # by the answer that serves most
    told, spread = information(bits, eta)
    assert told == pytest.approx(float((bits - most.log2()).mean()), abs=1e-9)
    assert spread == pytest.approx(float(most.log2().std(correction=0)), abs=1e-9)


def test_information_of_levels_in_blocks_is_that_of_single_levels_from_below(monkeypatch):
    for eta in (0.0, 0.1, 0.9):
        told, spread = information(12, eta)
        monkeypatch.setattr(decode, "_BLOCK_BITS", 8)
        blocks = information(12, eta)
        monkeypatch.undo()
        assert told - 0.1 < blocks[0] <= told and blocks[1] <= spread + 0.02
    assert information(1, 0.5) == (1.0, 0.0)
    assert information(8, 0.0) == (8.0, 0.0)
    assert 18.0 < information(24, 0.0)[0] < 20.0  # float32's rounding is allowed for


def test_answers_that_are_not_numbers_count_as_wrong():
    hidden = torch.ones(2, 4, dtype=torch.int64)
    answers = torch.full((2, 4), torch.nan)
    assert nearest_levels(answers, 1, 0.5).sum() == 0
    assert not trusted_rows(answers, 1)[0].any()
    result = judge(answers, hidden, 1, 0.5)
    assert (result.certified_bits, result.bit_error, result.row_success) == (0.0, 1.0, 0.0)


def test_trust_goes_to_spikes_and_not_to_averages():
    values = hidden_rows(64, 32, 1).double()
    blurred = values.mean(dim=0).expand(8, -1)
    trusted, levels = trusted_rows(torch.cat([values[:8], 0.5 * values[8:16], blurred]), 1)
    assert trusted.tolist() == [True] * 16 + [False] * 8
    assert torch.equal(levels[:16], values[:16].long())


def test_neighbouring_levels_differ_in_one_bit():
    levels = torch.arange(255)
    assert wrong_bits(levels.unsqueeze(1), levels.unsqueeze(1) + 1, 8).tolist() == [1] * 255
    assert wrong_bits(torch.tensor([[5, 5]]), torch.tensor([[5, 5]]), 8).tolist() == [0]
    fine = torch.tensor([[0], [2**23 - 1], [2**24 - 2]])
    assert wrong_bits(fine, fine + 1, 24).tolist() == [1, 1, 1]


def test_a_scaled_row_is_recovered_where_the_threshold_fails():
    hidden = hidden_rows(64, 64, 1)
    result = judge(0.31 * hidden.double(), hidden, 1, 0.5)
    assert result.bit_error > 0.4
    assert result.certified_bits > 0.98 * hidden.numel()
    assert result.certificate in ("erasure", "log-loss")


def test_coarse_answers_certify_their_high_bits():
    """Answers rounded to 4 bits of hidden 8 carry about 4 bits per value, which only the log-loss certificate sees."""
    hidden = hidden_rows(128, 64, 8)
    result = judge((hidden // 16 * 16 + 7.5) / 255, hidden, 8, 0.5)
    assert result.certificate == "log-loss"
    assert 0.85 * 4 * hidden.numel() < result.certified_bits <= 4 * hidden.numel()


def test_noise_certifies_nothing():
    hidden = hidden_rows(256, 64, 1)
    noise = torch.rand(256, 64, generator=torch.Generator().manual_seed(9))
    assert judge(noise, hidden, 1, 0.5).certified_bits == 0.0
