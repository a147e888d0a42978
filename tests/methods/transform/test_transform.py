"""A transform coder's rates, errors and round trips, against closed forms and numpy in float64."""

from __future__ import annotations

import contextlib
import math
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfloor.methods.transform import integers
from kvfloor.methods.transform.basis import Basis
from kvfloor.methods.transform.fineness import MOST, features, fit, predicted
from kvfloor.methods.transform.integers import DamagedCode, compressed, restored
from kvfloor.methods.transform.transform import decode, dequantised, encode, quantised, step_for
from kvfloor.methods.transform.water import gaussian_bits, water_level

needs_zstandard = pytest.mark.skipif(not integers.installed(), reason="zstandard is not installed")


def correlated(n: int, w: int, seed: int = 0) -> Tensor:
    """Draw Gaussian vectors (n, w), float32, with a mean and with standard deviations of axes from 4 down to 1/16."""
    draw = np.random.default_rng(seed)
    turn = np.linalg.qr(draw.normal(size=(w, w)))[0]
    x = draw.normal(size=(n, w)) * 4.0 ** np.linspace(1, -2, w) @ turn + draw.normal(size=w)
    return torch.from_numpy(x).float()


# ---- reverse water-filling -------------------------------------------------------------------------------------------


def test_the_level_of_a_known_case() -> None:
    """Variances 4, 1 and 1/4 with an error of 3/4: the level is 1/4. With 9/4: 1 + 1 + 1/4, the level is 1."""
    variances = torch.tensor([1.0, 0.25, 4.0])
    assert water_level(variances, 0.75) == pytest.approx(0.25)
    assert water_level(variances, 2.25) == pytest.approx(1.0)
    assert gaussian_bits(variances, 0.25).tolist() == pytest.approx([1.0, 0.0, 2.0])


@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20),
    st.floats(1e-6, 1.0, exclude_max=True),
)
def test_the_errors_at_the_level_sum_to_the_error(variances: list[float], share: float) -> None:
    error = share * sum(variances)
    level = water_level(torch.tensor(variances, dtype=torch.float64), error)
    assert sum(min(v, level) for v in variances) == pytest.approx(error, rel=1e-9)


def test_no_other_shares_of_the_error_take_fewer_bits() -> None:
    """Move a part of the error from any component to any other one: the bits never fall."""
    variances = torch.tensor([5.0, 2.0, 0.3, 0.01], dtype=torch.float64)
    level = water_level(variances, 1.0)
    best = variances.clamp_max(level)
    bits = float(gaussian_bits(variances, level).sum())
    assert bits == pytest.approx(float((0.5 * torch.log2(variances / best)).sum()))
    for one in range(4):
        for other in range(4):
            if one == other:
                continue
            errors = best.clone()
            moved = min(0.1 * float(best[one]), float(variances[other] - best[other]))
            errors[one], errors[other] = errors[one] - moved, errors[other] + moved
            assert float((0.5 * torch.log2(variances / errors)).sum()) >= bits - 1e-12


def test_all_of_the_variance_may_be_lost() -> None:
    assert water_level(torch.tensor([1.0, 3.0]), 100.0) == 3.0
    assert water_level(torch.zeros(0), 1.0) == 0.0
    with pytest.raises(ValueError, match="error must be a positive number, got 0"):
        water_level(torch.ones(2), 0)


# ---- axes ------------------------------------------------------------------------------------------------------------


def test_coordinates_are_uncorrelated_and_lead_back() -> None:
    x = correlated(500, 12)
    basis = Basis.fitted(x)
    y = ((x - basis.mean) @ basis.forward).double().numpy()
    assert np.allclose(np.cov(y.T, bias=True), np.diag(basis.variances), atol=1e-4)
    wide = np.linalg.eigvalsh(np.cov(x.double().numpy().T, bias=True))[::-1]
    assert np.allclose(basis.variances, wide, rtol=1e-4, atol=1e-6)
    assert torch.allclose((x - basis.mean) @ basis.forward @ basis.backward + basis.mean, x, atol=1e-4)


def test_a_metric_is_the_squared_length_of_coordinates() -> None:
    draw = torch.Generator().manual_seed(1)
    x, root = correlated(500, 8), torch.randn(8, 8, generator=draw, dtype=torch.float64)
    metric = root @ root.T
    basis = Basis.fitted(x, metric)
    e = torch.randn(50, 8, generator=draw)
    wanted = torch.einsum("ni,ij,nj->n", e.double(), metric, e.double())
    assert torch.allclose((e @ basis.forward).double().square().sum(1), wanted, rtol=0.02)
    y = (x - basis.mean) @ basis.forward
    assert torch.allclose(torch.cov(y.T.double(), correction=0), torch.diag(basis.variances), atol=1e-3)
    assert torch.allclose(basis.forward @ basis.backward, torch.eye(8), atol=1e-4)


def test_a_metric_of_one_direction_leaves_the_others_bounded() -> None:
    """Without a ridge the axes of directions that do not matter would have no inverse."""
    metric = torch.zeros(8, 8)
    metric[0, 0] = 1
    basis = Basis.fitted(correlated(500, 8), metric)
    assert bool(torch.isfinite(basis.backward).all())
    assert torch.allclose(basis.forward @ basis.backward, torch.eye(8), atol=1e-3)


# ---- steps -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.floats(1e-3, 10.0), st.integers(0, 2**31))
def test_no_coordinate_errs_by_more_than_half_of_its_step(n: int, step: float, seed: int) -> None:
    x = correlated(n, 6, seed)
    basis = Basis.fitted(correlated(300, 6, 1))
    fineness = torch.from_numpy(np.random.default_rng(seed).integers(-4, 5, n))
    found = dequantised(quantised(x, fineness, basis, step), fineness, basis.mean, basis.backward, step)
    off = ((found - x).double() @ basis.forward.double()).abs()
    assert bool((off <= (step * 2.0 ** (-fineness.double() / 2) / 2 + 1e-4).unsqueeze(1)).all())


@needs_zstandard
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.integers(0, 2**31))
def test_codes_come_back_in_their_order(n: int, seed: int) -> None:
    x, basis = correlated(n, 6, seed), Basis.fitted(correlated(300, 6, 1))
    fineness = torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, n))
    found = decode(encode(x, fineness, basis, 0.3), fineness, basis.mean, basis.backward, 0.3)
    wanted = dequantised(quantised(x, fineness, basis, 0.3), fineness, basis.mean, basis.backward, 0.3)
    assert torch.allclose(found, wanted, atol=1e-6)  # a product's rounding may depend on the order of rows


@needs_zstandard
def test_smaller_steps_err_less_and_take_more_bytes() -> None:
    x = correlated(1500, 16)
    basis, even = Basis.fitted(x), torch.zeros(1500, dtype=torch.int64)
    errors, sizes = [], []
    for error in (10.0, 1.0, 0.1, 0.01):
        step = step_for(basis.variances, error)
        data = encode(x, even, basis, step)
        found = decode(data, even, basis.mean, basis.backward, step)
        errors.append(float((found - x).double().square().sum(1).mean()))
        sizes.append(sum(map(len, data)))
        assert errors[-1] == pytest.approx(error, rel=0.3)
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)


def test_where_nothing_varies_any_step_does() -> None:
    x = torch.full((5, 3), 2.0)
    basis = Basis.fitted(x)
    step = step_for(basis.variances, 0.01)
    none = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(dequantised(quantised(x, none, basis, step), none, basis.mean, basis.backward, step), x)


# ---- fineness --------------------------------------------------------------------------------------------------------


def test_energies_that_are_linear_in_keys_are_predicted() -> None:
    draw = np.random.default_rng(0)
    y = draw.normal(size=(3000, 5))
    keys = torch.from_numpy(y * [16, 8, 4, 2, 1]).float()  # of distinct variances, so that the axes are these
    distance = torch.arange(3000, 0, -1)
    log2 = torch.from_numpy(3 * y[:, 1] + 0.5 * y[:, 2] ** 2) - 0.7 * torch.log2(distance.double())
    basis = Basis.fitted(keys)
    weights = fit(features(keys, distance, basis), 2.0 ** (log2 + 40))
    found = predicted(features(keys, distance, basis), weights)
    wanted = log2 - log2.mean()
    inside = wanted.abs() < MOST - 1
    assert float((found - wanted)[inside].abs().max()) < 1.5  # rounded, shrunk, and axes turned a little
    assert found.dtype == torch.int64 and int(found.abs().max()) <= MOST


def test_fineness_is_bounded_even_for_keys_unlike_all_others() -> None:
    keys = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    basis, distance = Basis.fitted(keys), torch.arange(200, 0, -1)
    weights = fit(features(keys, distance, basis), torch.rand(200) + 0.1)
    for far in (keys * 1e20, keys * 1e3, keys * 0):
        found = predicted(features(far, distance, basis), weights)
        assert int(found.min()) >= -MOST and int(found.max()) <= MOST


def test_finer_codes_of_what_matters_lower_the_weighted_error_at_the_same_bits() -> None:
    """With energies 2^f, fineness f makes all errors count alike: their geometric mean error at equal average bits."""
    if not integers.installed():
        pytest.skip("zstandard is not installed")
    x = correlated(8000, 8)
    basis = Basis.fitted(x)
    fineness = torch.from_numpy(np.random.default_rng(1).choice([-6, 0, 6], len(x)))
    energy = 2.0 ** fineness.double()

    def cost(classes: Tensor, step: float) -> tuple[float, int]:
        data = encode(x, classes, basis, step)
        off = (decode(data, classes, basis.mean, basis.backward, step) - x).double().square().sum(1)
        return float((energy * off).mean()), sum(map(len, data))

    error, size = cost(fineness, 0.02)
    even_error, even_size = cost(torch.zeros_like(fineness), 0.02)
    assert size < 1.03 * even_size
    assert error < 0.2 * even_error  # the geometric mean of the energies is 1, their mean 21.7


@needs_zstandard
def test_bytes_of_gaussian_vectors_come_near_the_rate_distortion_function() -> None:
    """Equal steps with an ideal entropy coder take 0.25 bits more per number than the closed form, where bits are many.

    Source: Gish and Pierce, "Asymptotically efficient quantizing" (1968). A fifth of a bit is left for zstandard.
    """
    x = correlated(20_000, 16)
    basis, none = Basis.fitted(x), torch.zeros(20_000, dtype=torch.int64)
    for error in (0.01, 1.0):
        step = step_for(basis.variances, error)
        codes = encode(x, none, basis, step)
        found = decode(codes, none, basis.mean, basis.backward, step)
        reached = float((found - x).double().square().sum(1).mean())
        least = float(gaussian_bits(basis.variances, water_level(basis.variances, reached)).sum())
        bits = 8 * sum(map(len, codes)) / len(x)
        assert least < bits < least + 0.45 * 16, (error, least, bits)


def test_axes_below_the_level_are_left_out() -> None:
    basis = Basis.fitted(correlated(500, 8))
    level = float(basis.variances[2]) * 1.01
    short = basis.kept(level)
    assert short.forward.shape == (8, 2) and short.backward.shape == (2, 8) and len(short.variances) == 2
    assert torch.equal(short.backward, basis.backward[:2])


# ---- whole numbers ---------------------------------------------------------------------------------------------------


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


@needs_zstandard
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.lists(st.sampled_from([0, 1, 2, 7, 8, 127, 128, 32767, 32768, 2**23, 2**30]), max_size=9),
    st.integers(0, 2**31),
)
def test_tables_come_back(n: int, largest: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    table = torch.zeros(n, len(largest), dtype=torch.int64)
    for at, most in enumerate(largest):
        table[:, at] = torch.from_numpy(draw.integers(-most, most + 1, n))
        if n:
            table[0, at] = most * (-1) ** at
    rows, columns = (torch.from_numpy(draw.integers(-5, 6, size)) for size in table.shape)
    assert torch.equal(restored(compressed(table, rows, columns), rows, columns), table)


@needs_zstandard
def test_buckets_that_fit_take_fewer_bytes() -> None:
    draw = np.random.default_rng(0)
    rows, columns = draw.integers(0, 12, 2000), draw.integers(0, 12, 20)
    table = np.rint(draw.normal(size=(2000, 20)) * 2.0 ** ((rows[:, None] + columns) / 2 - 4)).astype(np.int64)
    table, rows, columns = map(torch.from_numpy, (table, rows, columns))
    fit = len(compressed(table, rows, columns))
    assert fit < 0.9 * len(compressed(table, zeros(2000), columns))
    assert fit < 0.9 * len(compressed(table, rows, zeros(20)))


@needs_zstandard
def test_numbers_that_are_nearly_always_0_take_less_than_a_bit() -> None:
    draw = torch.Generator().manual_seed(0)
    table = (torch.rand(20_000, 4, generator=draw) < 0.02).long()
    p = 0.02
    entropy_bytes = table.numel() * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    assert len(compressed(table, zeros(20_000), zeros(4))) < 2.5 * entropy_bytes < table.numel() / 8


@needs_zstandard
def test_a_number_beyond_the_format_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be coded: take a larger error"):
        compressed(torch.tensor([[2**30 + 1]]), zeros(1), zeros(1))


@needs_zstandard
def test_other_bytes_are_no_table() -> None:
    table, rows = torch.arange(60).view(20, 3) - 30, torch.arange(20) % 4
    data = compressed(table, rows, zeros(3))
    for n, columns in ((19, 3), (21, 3), (20, 2), (20, 4), (0, 3), (200, 3)):
        with pytest.raises(DamagedCode):
            restored(data, torch.arange(n) % 4, zeros(columns))
    draw = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        with contextlib.suppress(DamagedCode):  # the others are found by the file's digest
            assert restored(bytes(damaged), rows, zeros(3)).shape == (20, 3)
    for size in range(len(data)):
        with pytest.raises(DamagedCode):
            restored(data[:size], rows, zeros(3))


@needs_zstandard
def test_bytes_that_claim_to_be_many_are_refused_before_they_are_made() -> None:
    bomb = integers.zstandard().ZstdCompressor().compress(bytes(10_000_000))
    with pytest.raises(DamagedCode, match="10000000 bytes cannot be a table of 20 times 3 numbers"):
        restored(bomb, zeros(20), zeros(3))


def test_without_zstandard_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r'needs the package zstandard, .* pip install "kvfloor\[coded\]"'):
        compressed(zeros(1).unsqueeze(0), zeros(1), zeros(1))
