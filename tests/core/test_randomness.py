"""Counter-based draws: uniform, independent in every key, reproducible for ever, and no generator touched."""

import hashlib
import math

import pytest
import torch
from torch import Tensor

from kvfloor.core.randomness import exponential, row_keys, uniform
from tests.support import require_drawn

WORD = (1 << 64) - 1
GOLDEN = [0.028477735640475843, 0.5700477546192414, 0.24696418516300433, 0.18039212789840986]


def mixed(x: int) -> int:
    """The splitmix64 finaliser on plain integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def plain_uniform(seed: int, row: int, purpose: str, counter: int) -> float:
    salt = int.from_bytes(hashlib.sha256(f"kvfloor/{purpose}/{seed}".encode()).digest()[:8], "little")
    key = mixed((mixed((row * 0x9E3779B97F4A7C15 + salt) & WORD) + salt) & WORD)
    bits = mixed(mixed((key + counter * 0x9E3779B97F4A7C15) & WORD) ^ counter)
    return ((bits >> 12) + 0.5) / 2**52


def sample(n: int, seed: int = 0, row: int = 0, purpose: str = "test") -> Tensor:
    return uniform(row_keys(seed, torch.tensor([row]), purpose), torch.arange(n))


def kolmogorov_distance(x: Tensor) -> float:
    """sqrt(n) times the largest gap between the empirical distribution and the uniform one."""
    ordered, n = x.sort().values, x.numel()
    above = (torch.arange(1, n + 1) / n - ordered).max()
    below = (ordered - torch.arange(n) / n).max()
    return math.sqrt(n) * float(torch.maximum(above, below))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
@pytest.mark.parametrize("row", [0, 1, 10**12, -5])
def test_draws_equal_plain_integer_arithmetic(seed: int, row: int) -> None:
    for counter in (0, 1, 77, 2**31, 2**53):
        drawn = uniform(row_keys(seed, torch.tensor([row]), "check"), torch.tensor([counter]))
        assert drawn.item() == plain_uniform(seed, row, "check", counter)


def test_golden_values_never_change() -> None:
    """Saved reservoirs hold such keys: a change here makes every saved sample wrong."""
    drawn = sample(4, seed=7, row=3, purpose="golden").tolist()
    assert drawn == GOLDEN


@pytest.mark.parametrize("seed", range(5))
def test_draws_along_the_stream_are_uniform(seed: int) -> None:
    assert kolmogorov_distance(sample(20_000, seed)) < 1.95  # exceeded with probability 1e-3


def test_draws_across_rows_are_uniform() -> None:
    keys = row_keys(0, torch.arange(20_000), "test")
    assert kolmogorov_distance(uniform(keys, torch.tensor(17))) < 1.95


def test_draws_across_seeds_are_uniform() -> None:
    drawn = torch.cat([sample(1, seed) for seed in range(4000)])
    assert kolmogorov_distance(drawn) < 1.95


@pytest.mark.parametrize("other", [{"seed": 1}, {"row": 1}, {"purpose": "another"}])
def test_lanes_do_not_correlate(other: dict) -> None:
    n = 20_000
    pair = torch.stack([sample(n), sample(n, **other)])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(n)


@pytest.mark.parametrize("lag", [1, 2, 4, 16, 256])
def test_neighbouring_positions_do_not_correlate(lag: int) -> None:
    x = sample(20_000)
    pair = torch.stack([x[:-lag], x[lag:]])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / math.sqrt(20_000)


def test_neighbouring_rows_fill_the_square_evenly() -> None:
    """Chi-square over a 16 x 16 grid of (row 0, row 1) pairs; 255 degrees of freedom."""
    n = 25_600
    cell = (sample(n, row=0) * 16).long() * 16 + (sample(n, row=1) * 16).long()
    require_drawn(cell, 256)


def test_no_draw_repeats_within_a_row() -> None:
    assert sample(100_000).unique().numel() == 100_000


def test_uniforms_are_never_zero_or_one_even_at_the_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvfloor.core import randomness

    for word in (0, -1):
        monkeypatch.setattr(randomness, "_mix", lambda x, word=word: torch.full_like(x, word))
        assert 0.0 < uniform(torch.tensor([0]), torch.tensor([0])).item() < 1.0


def test_exponentials_have_mean_and_variance_one() -> None:
    x = exponential(row_keys(0, torch.tensor([0]), "test"), torch.arange(100_000))
    assert bool((x > 0).all())
    assert abs(float(x.mean()) - 1) < 4 / math.sqrt(1e5)
    assert abs(float(x.var()) - 1) < 4 * math.sqrt(8 / 1e5)


def test_the_global_generator_is_neither_read_nor_advanced() -> None:
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), sample(10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(sample(10), first)
