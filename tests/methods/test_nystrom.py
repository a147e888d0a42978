"""Projected clusters: the linear equations written out in numpy, what fits is exact, and what they gain on clusters."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfloor import parse
from kvfloor.methods.summaries.clusters import ClusterMeansState
from kvfloor.methods.summaries.nystrom import NystromState, projected
from tests import support
from tests.support import close

SCALE, RIDGE = 0.6, 1e-3
opened = partial(support.opened, d=4, dv=3, scale=SCALE)


def absorbed(text: str, k: Tensor, v: Tensor, lots: int = 1) -> NystromState | ClusterMeansState:
    """A summary that absorbed k (n, d) and v (n, dv) in so many lots."""
    state = opened(f"window+{text}@1", d=k.shape[1], dv=v.shape[1], dtype=k.dtype).summary
    for part in torch.arange(len(k)).chunk(lots):
        state.absorb(torch.zeros(len(part), dtype=torch.int64), k[part], v[part], part)
    assert isinstance(state, NystromState | ClusterMeansState)
    return state


def tokens(n: int, d: int = 4, dv: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(n, width, generator=source, dtype=torch.float64) for width in (d, dv))
    return k, v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (SCALE * q @ k.T).softmax(-1) @ v


def literal(size: np.ndarray, key: np.ndarray, each: np.ndarray, centre: np.ndarray, scale: float) -> np.ndarray:
    """Solve the equations with kernels as they are; the ridge is relative to the kernel's diagonal."""
    middle = (size[:, None] * key).sum(0) / size.sum()
    inner = np.exp(scale * (centre - middle) @ (centre - middle).T)
    across = np.exp(scale * (centre - middle) @ (key - middle).T)
    weight = np.linalg.solve(inner + RIDGE * np.diag(np.diag(inner)), across)
    return weight @ (size[:, None] * each)


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v = tokens(12)
    size = torch.arange(1.0, 13.0, dtype=torch.float64)
    return size, k, torch.cat([v, torch.ones(12, 1, dtype=torch.float64)], 1), k[::3] + 0.1


def test_projected_sums_solve_the_equations() -> None:
    size, k, each, centre = case()
    mine = projected(size[None], k[None], each[None], centre[None], 0.7)[0].numpy()
    given = [x.numpy() for x in (size, k, each, centre)]
    wanted = literal(given[0], given[1], given[2], given[3], 0.7)
    np.testing.assert_allclose(mine, wanted, rtol=1e-9)
    off_centre = literal(given[0], given[1] + 1.0, given[2], given[3], 0.7)
    assert np.abs(off_centre - wanted).max() > 0.1  # the comparison sees a kernel of other keys


def test_no_more_tokens_than_clusters_are_answered_exactly() -> None:
    k, v = tokens(5)
    q = torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = absorbed("nystrom(m=5)", k, v, lots=3)
    close(state.read(q).mean[0], attention(q[0], k, v))
    close(state.read(q).log_mass[0], torch.logsumexp(SCALE * q[0] @ k.T, -1))


def test_the_clusters_are_those_of_clusters() -> None:
    k, v = tokens(200)
    mine, theirs = absorbed("nystrom(m=9)", k, v), absorbed("clusters(m=9)", k, v)
    close(mine.mean_k, theirs.mean_k)
    assert torch.equal(mine.count, theirs.count)


def test_masses_are_nearest_in_the_norm_of_the_kernel() -> None:
    """Squared distance of sum_j K(k_j, .) to the clusters' sum, in the norm of K."""
    k, v = tokens(60)
    mine, theirs = absorbed("nystrom(m=6)", k, v), absorbed("clusters(m=6)", k, v)
    assert isinstance(mine, NystromState)
    centred = [x - k.mean(0) for x in (k, mine.mean_k[0])]
    joined = torch.cat(centred)
    kernel = (0.5 * SCALE * joined @ joined.T).exp()

    def far(mass: Tensor) -> float:
        weight = torch.cat([torch.ones(60, dtype=torch.float64), -mass.double()])
        return float(weight @ kernel @ weight)

    best = torch.linalg.solve(kernel[60:, 60:], kernel[60:, :60].sum(1))  # no weights of these clusters are nearer
    assert far(best) <= far(mine.share[0] * mine.count[0]) < 1.001 * far(best) < 0.97 * far(theirs.count[0])


@pytest.mark.parametrize("lots", [1, 4])
def test_answers_err_less_than_those_of_clusters(lots: int) -> None:
    k, v = tokens(400, d=8)
    k = k / k.norm(dim=1, keepdim=True)
    q = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = attention(q[0], k, v)
    wrong = [
        float((absorbed(f"{name}(m=32)", k, v, lots).read(q).mean[0] - exact).norm())
        for name in ("nystrom", "clusters")
    ]
    assert wrong[0] < 0.6 * wrong[1]


@pytest.mark.parametrize("length", [1e3, 1e160])
def test_keys_without_a_finite_solution_are_counted_as_in_clusters(length: float) -> None:
    k, v = tokens(40)
    mine, theirs = absorbed("nystrom(m=4)", length * k, v), absorbed("clusters(m=4)", length * k, v)
    assert isinstance(mine, NystromState) and isinstance(theirs, ClusterMeansState)
    assert bool(torch.isfinite(mine.value).all()) and bool(torch.isfinite(mine.share).all())
    if length > 1e100:
        close(mine.value, theirs.mean_v)
        close(mine.share[mine.count > 0], torch.ones(4))


def test_a_query_of_no_positive_mass_is_answered_without_the_summary() -> None:
    k, v = tokens(5)
    state = absorbed("nystrom(m=5)", k, v)
    assert isinstance(state, NystromState)
    state.share.neg_()
    found = state.read(torch.zeros(1, 2, 4, dtype=torch.float64))
    assert bool((found.log_mass == -torch.inf).all()) and bool((found.mean == 0).all())


@pytest.mark.parametrize(("left", "answered"), [(0.01, False), (0.2, True)])
def test_masses_that_nearly_cancel_are_not_divided_by(left: float, answered: bool) -> None:
    k, v = tokens(2)
    state = absorbed("nystrom(m=2)", k, v)
    assert isinstance(state, NystromState)
    state.share.copy_(torch.tensor([[1.0, left - 1.0]]))
    found = state.read(torch.zeros(1, 1, 4, dtype=torch.float64))
    assert bool(torch.isfinite(found.log_mass).all()) == answered
    assert float(found.mean.norm()) <= 16 * float(v.norm(dim=1).sum())


@pytest.mark.parametrize("text", ["nystrom(m=0)", "nystrom(sharpness=0.0)", "nystrom(sharpness=-1.0)"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nystrom"):
        parse(f"sinks+{text}@32")
