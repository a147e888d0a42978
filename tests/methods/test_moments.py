"""Moments of the evicted tokens: the same as all at once, and the Gaussian's integral in closed form."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.methods.summaries.moments import MomentsState
from tests import support
from tests.support import Draw, filled

KINDS = ("full", "diagonal", "none")


opened = partial(support.opened, d=4, dv=3, scale=0.6)


def covariance(state) -> Tensor:
    """cov(k) (rows, d, d) from the packed triangle."""
    kept: MomentsState = state.summary
    assert kept.cov_k is not None
    d = kept.mean_k.shape[1]
    whole = torch.zeros(len(kept.cov_k), d, d, dtype=kept.cov_k.dtype)
    place = 0
    for i in range(d):
        for j in range(i + 1):
            whole[:, i, j] = whole[:, j, i] = kept.cov_k[:, place]
            place += 1
    return whole


def assert_moments(state, k: Tensor, v: Tensor, tolerance: float = 1e-12) -> None:
    """Count, means and covariances of k (n, d), v (n, dv), taken over all of them at once."""
    kept = state.summary
    assert int(kept.count[0]) == len(k)
    off_k, off_v = k - k.mean(0), v - v.mean(0)
    for mine, wanted in (
        (kept.mean_k[0], k.mean(0)),
        (kept.mean_v[0], v.mean(0)),
        (covariance(state)[0], off_k.T @ off_k / len(k)),
        (kept.cov_vk[0], off_v.T @ off_k / len(k)),
        (kept.longest[0], k.norm(dim=1).max()),
    ):
        assert float((mine.double() - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("block", [1, 8])
def test_moments_join_to_those_of_all_that_left(draw: Draw, block: int) -> None:
    k, v = draw(1, 50, 4) + 2.0, draw(1, 50, 3)
    state = filled(f"window(block={block})+moments@10", k, v, scale=0.6)
    gone = 50 - int(state.held[0])
    assert_moments(state, k[0, :gone], v[0, :gone])


def test_moments_of_whatever_a_policy_evicts(draw: Draw) -> None:
    k, v = draw(1, 64, 4), draw(1, 64, 3)
    state = filled("random(block=8)+moments@16", k, v, scale=0.6)
    gone = torch.ones(64, dtype=torch.bool)
    gone[state.slots.view().position[0]] = False
    assert_moments(state, k[0, gone], v[0, gone])


def test_averages_do_not_stall_over_a_long_stream() -> None:
    """Float32 sums of so many products would be off by 1e-4; averages of offsets are not."""
    n, source = 1 << 17, torch.Generator().manual_seed(0)
    k = torch.randn(1, n, 2, generator=source) + 5.0
    v = torch.randn(1, n, 1, generator=source)
    state = filled("window(block=512)+moments@64", k, v, scale=0.6)
    gone = n - int(state.held[0])
    assert_moments(state, k[0, :gone].double(), v[0, :gone].double(), 2e-6)


@pytest.mark.parametrize("wrong", ["between the parts", "share of the new part"])
def test_a_wrong_join_is_told(draw: Draw, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = MomentsState._blend

    def blend(self, name: str, at: Tensor, new: Tensor, inside: Tensor, between: Tensor) -> None:
        if wrong == "between the parts":
            right(self, name, at, new, inside, torch.zeros_like(between))
        else:
            right(self, name, at, torch.full_like(new, 0.5), inside, between)

    monkeypatch.setattr(MomentsState, "_blend", blend)
    k, v = draw(1, 50, 4), draw(1, 50, 3)
    state = filled("window(block=8)+moments@10", k, v, scale=0.6)
    with pytest.raises(AssertionError):
        assert_moments(state, k[0, : 50 - int(state.held[0])], v[0, : 50 - int(state.held[0])])


# ---- reading ----------------------------------------------------------------------------------------------------


def absorbed(draw: Draw, kind: str, n: int = 400, spread: float = 1.0, **spec) -> tuple[MomentsState, Tensor, Tensor]:
    """A state that has absorbed n correlated Gaussian tokens, and those."""
    k = draw(n, 4, scale=spread) + 0.3
    v = draw(n, 3) + k[:, :3]
    state = opened(f"window+moments(covariance={kind})@1", **spec).summary
    state.absorb(torch.zeros(n, dtype=torch.int64), k, v, torch.arange(n))
    return state, k, v


def gaussian(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: str) -> tuple[Tensor, float]:
    """(mean, log-mass) of c tokens that are Gaussian with the moments of k, v: the closed form, in plain sums."""
    cov = torch.cov(k.T, correction=0)
    if kind != "full":
        cov = torch.diag(torch.diag(cov)) if kind == "diagonal" else torch.zeros_like(cov)
    log_mass = math.log(len(k)) + scale * float(q @ k.mean(0)) + scale**2 * float(q @ cov @ q) / 2
    across = (v - v.mean(0)).T @ (k - k.mean(0)) / len(k) if kind == "full" else torch.zeros(v.shape[1], k.shape[1])
    return v.mean(0) + scale * across.to(q.dtype) @ q, log_mass


@pytest.mark.parametrize("kind", KINDS)
def test_a_read_is_the_gaussian_closed_form(draw: Draw, kind: str) -> None:
    state, k, v = absorbed(draw, kind)
    q = draw(1, 6, 4)
    part = state.read(q)
    for i in range(6):
        mean, log_mass = gaussian(q[0, i], k, v, 0.6, kind)
        assert float((part.mean[0, i] - mean).abs().max()) <= 1e-11
        assert float(part.log_mass[0, i]) == pytest.approx(log_mass, abs=1e-11)


def test_the_closed_form_is_the_mean_over_gaussian_tokens(draw: Draw) -> None:
    """Attention over 200,000 Gaussian tokens, against the moments of the same tokens."""
    state, k, v = absorbed(draw, "full", n=4000, spread=0.5)
    q = draw(1, 4, 4)
    part, more = state.read(q), 200_000
    root = torch.linalg.cholesky(torch.cov(torch.cat([k, v], 1).T, correction=0))
    tokens = torch.cat([k, v], 1).mean(0) + draw(more, 7) @ root.T
    logits = 0.6 * tokens[:, :4] @ q[0].T
    weight = torch.softmax(logits, 0)
    assert float((part.mean[0] - weight.T @ tokens[:, 4:]).abs().max()) <= 0.02
    mass = torch.logsumexp(logits, 0) + math.log(len(k) / more)
    assert float((part.log_mass[0] - mass).abs().max()) <= 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_small_logits_leave_an_error_of_third_order(draw: Draw, kind: str) -> None:
    """full: mass and mean right to second and first order in the logits; none and diagonal to one less for the mean."""
    state, k, v = absorbed(draw, kind, n=60)
    q = draw(1, 1, 4)
    errors = []
    for size in (0.02, 0.01):
        part, logits = state.read(size * q), 0.6 * size * (k @ q[0, 0])
        mean = torch.softmax(logits, 0) @ v
        mass = float(torch.logsumexp(logits, 0))
        errors.append((float((part.mean[0, 0] - mean).abs().max()), abs(float(part.log_mass[0, 0]) - mass)))
    order = [math.log2(a / b) for a, b in zip(*errors, strict=True)]
    wanted = {"full": (2, 3), "diagonal": (1, 2), "none": (1, 2)}[kind]
    assert order == pytest.approx(wanted, abs=0.15)


def test_the_mass_never_passes_what_any_keys_allow(draw: Draw) -> None:
    state, k, _ = absorbed(draw, "full")
    q = draw(1, 8, 4) * torch.logspace(0, 3, 8, dtype=torch.float64).view(1, 8, 1)
    part = state.read(q)
    ceiling = math.log(len(k)) + 0.6 * q[0].norm(dim=1) * k.norm(dim=1).max()
    floor = math.log(len(k)) + 0.6 * q[0] @ k.mean(0)
    assert bool((part.log_mass[0] <= ceiling + 1e-9).all()) and bool((part.log_mass[0] >= floor - 1e-9).all())
    assert bool(torch.isfinite(part.mean).all())
    assert float(part.log_mass[0, -1] - ceiling[-1]) == pytest.approx(0.0, abs=1e-6)  # there the bound bites


def test_under_a_softcap_the_expectation_is_over_capped_logits(draw: Draw) -> None:
    """Against Simpson's rule on the Gaussian's density, mean and mass alike."""
    cap = 2.0
    state, k, v = absorbed(draw, "full", softcap=cap)
    q = draw(1, 5, 4)
    part = state.read(q)
    across = (v - v.mean(0)).T @ (k - k.mean(0)) / len(k)
    for i in range(5):
        centre = 0.6 * float(q[0, i] @ k.mean(0))
        deviation = 0.6 * math.sqrt(float(q[0, i] @ torch.cov(k.T, correction=0) @ q[0, i]))
        x = np.linspace(centre - 9 * deviation, centre + 9 * deviation, 20_001)
        density = np.exp(-(((x - centre) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
        capped = np.exp(cap * np.tanh(x / cap))
        mass = np.trapezoid(density * capped, x)
        slope = np.trapezoid(density * capped / np.cosh(x / cap) ** 2, x) / mass
        assert float(part.log_mass[0, i]) == pytest.approx(math.log(400 * mass), abs=1e-4)
        wanted = v.mean(0) + 0.6 * slope * across @ q[0, i]
        assert float((part.mean[0, i] - wanted).abs().max()) <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_documented_numbers(kind: str) -> None:
    d, dv = 16, 12
    numbers = {"full": 2 + d + dv + d * (d + 1) // 2 + d * dv, "diagonal": 2 + 2 * d + dv, "none": 2 + d + dv}[kind]
    spec = Spec(1, d, dv, dtype=torch.float32)
    summary = parse(f"window+moments(covariance={kind})@8").open(spec).summary  # type: ignore[attr-defined]
    assert summary.nbytes == 4 * numbers + 4  # the count is an int64


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match="covariance must be full, diagonal or none, got 'half'"):
        parse("window+moments(covariance=half)@8")
