"""The private half: uniform, independent by purpose, and unrelated to anything public."""

import secrets

import pytest
import torch

from kvfloor.game.engine import secret as hidden
from kvfloor.game.engine.instance import derived_seed
from kvfloor.game.engine.secret import Hidden


def chi_squared(counts, expected):
    return ((counts.double() - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_levels_are_uniform_and_fill_every_level(bits):
    levels = Hidden(1).levels(4096, 16, bits).flatten()
    assert (int(levels.min()), int(levels.max())) == (0, 2**bits - 1)
    cells = 2**bits
    counts = torch.bincount(levels, minlength=cells)
    degrees = cells - 1
    assert chi_squared(counts, len(levels) / cells) < degrees + 5 * (2 * degrees) ** 0.5 + 10


def test_24_bit_levels_reach_both_ends_of_their_range():
    levels = Hidden(1).levels(1 << 10, 64, 24).double() / 2**24
    assert levels.min() < 1e-3 and levels.max() > 1 - 1e-3
    assert levels.mean().item() == pytest.approx(0.5, abs=0.01)


def test_neighbouring_values_are_not_correlated():
    bits = 2.0 * Hidden(3).levels(20_000, 2, 1).double() - 1.0
    assert abs((bits[:, 0] * bits[:, 1]).mean().item()) < 0.04
    assert abs((bits[1:, 0] * bits[:-1, 0]).mean().item()) < 0.04


def test_rows_and_places_are_uniform():
    for drawn in (Hidden(1).rows(10, 5000), Hidden(1).places(10, 5000)):
        assert chi_squared(torch.bincount(drawn, minlength=10), 500) < 34  # 9 degrees of freedom: 1e-4
    assert not torch.equal(Hidden(1).rows(10, 50), Hidden(1).places(10, 50))


def test_a_subset_is_uniform_without_repeats_and_in_random_order():
    first, inside = torch.zeros(8), torch.zeros(8)
    for seed in range(2000):
        chosen = Hidden(seed).subset(8, 3)
        assert len(chosen.unique()) == 3
        first[chosen[0]] += 1
        inside[chosen] += 1
    assert chi_squared(first, 250) < 30  # 7 degrees of freedom: 1e-4
    assert chi_squared(inside, 750) < 30
    assert sorted(Hidden(5).subset(8, 8).tolist()) == list(range(8))


def test_the_seed_repeats_everything_and_by_default_it_is_128_fresh_bits(monkeypatch):
    monkeypatch.setattr(hidden, "secrets", secrets)
    assert torch.equal(Hidden(7).levels(4, 4, 8), Hidden("7").levels(4, 4, 8))
    fresh = {Hidden().seed for _ in range(20)}
    assert len(fresh) == 20
    assert all(len(bytes.fromhex(seed)) == 16 for seed in fresh)


def test_each_purpose_and_each_seed_has_a_stream_of_its_own():
    assert derived_seed("keys", 1) != derived_seed("method", 1) != derived_seed("keys", 2)
    drawn = [Hidden(seed).levels(2, 64, 8).flatten().tolist() for seed in ("1", "2", "12", "1/2")]
    assert len({tuple(levels) for levels in drawn}) == 4


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = Hidden(1).levels(3, 3, 4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(one, Hidden(1).levels(3, 3, 4))
