"""Clusters of evicted tokens: a literal merging in plain Python, and the laws that hold whatever is merged."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfloor import Partial, parse
from kvfloor.methods.summaries import clusters
from kvfloor.methods.summaries.clusters import ClusterMeansState, merged
from tests import support
from tests.support import Draw, attention, close, filled, seeded

SCALE = 0.6
Cluster = tuple[int, list[float], list[float]]

opened = partial(support.opened, d=4, dv=3, scale=SCALE)


def absorbed(k: Tensor, v: Tensor, m: int, *cuts: int, **spec: Any) -> ClusterMeansState:
    """A summary that absorbed k (n, d) and v (n, dv), in lots that end at the cuts."""
    state = opened(f"window+clusters(m={m})@1", d=k.shape[1], dv=v.shape[1], dtype=k.dtype, **spec).summary
    edges = sorted({0, *cuts, len(k)})
    for start, stop in pairwise(edges):
        row = torch.zeros(stop - start, dtype=torch.int64)
        state.absorb(row, k[start:stop], v[start:stop], torch.arange(start, stop))
    return state


def literal(tokens: list[Cluster], m: int) -> list[Cluster]:
    """Merge clusters until m are left: per round the cheapest half of the mutual pairs, one pair after the other."""
    found = list(tokens)
    while len(found) > m:
        cost = [[ward(a, b) if i != j else math.inf for j, b in enumerate(found)] for i, a in enumerate(found)]
        best = [min(range(len(found)), key=lambda j, i=i: (cost[i][j], j)) for i in range(len(found))]
        pairs = sorted((cost[i][j], i, j) for i, j in enumerate(best) if best[j] == i and i < j)
        for _, i, j in pairs[: min((len(pairs) + 1) // 2, len(found) - m)]:
            found[i] = joined(found[i], found[j])
            found[j] = (0, [], [])
        found = [one for one in found if one[0]]
    return found


def ward(a: Cluster, b: Cluster) -> float:
    return a[0] * b[0] / (a[0] + b[0]) * sum((x - y) ** 2 for x, y in zip(a[1], b[1], strict=True))


def joined(a: Cluster, b: Cluster) -> Cluster:
    n = a[0] + b[0]
    pairs = ((a[1], b[1]), (a[2], b[2]))
    key, value = ([(a[0] * x + b[0] * y) / n for x, y in zip(*pair, strict=True)] for pair in pairs)
    return n, key, value


def held(state: ClusterMeansState) -> list[Cluster]:
    """The clusters of the first row, sorted."""
    parts = zip(state.count[0].tolist(), state.mean_k[0].tolist(), state.mean_v[0].tolist(), strict=True)
    return sorted(part for part in parts if part[0])


def require_literal(state: ClusterMeansState, wanted: list[Cluster]) -> None:
    mine = held(state)
    assert [one[0] for one in mine] == [one[0] for one in sorted(wanted)]
    for one, other in zip(mine, sorted(wanted), strict=True):
        assert one[1] == pytest.approx(other[1], abs=1e-11) and one[2] == pytest.approx(other[2], abs=1e-11)


def require_totals(state: ClusterMeansState, k: Tensor, v: Tensor) -> None:
    """Counts add up to the tokens, and means weighted by counts to the tokens' sums."""
    size = state.count[0].double()
    assert int(size.sum()) == len(k)
    close(size @ state.mean_k[0].double(), k.double().sum(0))
    close(size @ state.mean_v[0].double(), v.double().sum(0))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(2, 40), st.integers(1, 39))
def test_lots_are_merged_as_the_literal_rule_merges_them(seed: int, m: int, n: int, cut: int) -> None:
    draw = seeded(seed)
    k, v, cut = draw(n, 4), draw(n, 3), min(cut, n)
    state = absorbed(k, v, m, cut)
    tokens: list[Cluster] = [(1, key, value) for key, value in zip(k.tolist(), v.tolist(), strict=True)]
    require_literal(state, literal(literal(tokens[:cut], m) + tokens[cut:], m))
    require_totals(state, k, v)


def test_a_long_lot_joins_in_pieces(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = draw(50, 4), draw(50, 3)
    monkeypatch.setattr(clusters, "_AT_ONCE", 20)
    piecewise, wanted = absorbed(k, v, 6), absorbed(k, v, 6, 20, 40)
    assert held(piecewise) == held(wanted)


def test_while_all_fit_answers_are_exact(draw: Draw) -> None:
    k, v, q = draw(1, 40, 4), draw(1, 40, 3), draw(1, 5, 4)
    state = filled("random(block=8)+clusters(m=24)@16", k, v, scale=SCALE)
    mean, log_mass = attention(q, k, v, SCALE)
    part = state.read(q)
    close(part.mean, mean)
    close(part.log_mass, log_mass)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_tokens_of_equal_keys_are_one_cluster_without_error(draw: Draw, softcap: float | None) -> None:
    """60 tokens have 5 different keys: 5 clusters answer as all tokens do."""
    keys = draw(5, 4)
    k, v, q = keys[torch.arange(60) % 5], draw(60, 3), draw(1, 6, 4)
    part = absorbed(k, v, 5, 13, 40, softcap=softcap).read(q)
    mean, log_mass = attention(q, k.unsqueeze(0), v.unsqueeze(0), SCALE, softcap)
    close(part.mean, mean)
    close(part.log_mass, log_mass)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 60))
def test_the_mass_is_at_most_the_exact_one(seed: int, m: int, n: int) -> None:
    draw = seeded(seed)
    k, v, q = draw(n, 4), draw(n, 3), draw(1, 5, 4)
    part = absorbed(k, v, m).read(q)
    _, exact = attention(q, k.unsqueeze(0), v.unsqueeze(0), SCALE)
    assert bool((part.log_mass <= exact + 1e-12).all())
    one = SCALE * (q[0] @ k.mean(0)) + math.log(n)  # a single cluster's, the least that means can give
    assert bool((part.log_mass[0] >= one - 1e-12).all())


def test_near_keys_share_a_cluster(draw: Draw) -> None:
    """Keys around four far centres, in any order: each cluster has the tokens around one centre."""
    centre = 20.0 * torch.eye(4, dtype=torch.float64)
    which = torch.randperm(80, generator=torch.Generator().manual_seed(1)) % 4
    k, v = centre[which] + draw(80, 4, scale=0.1), draw(80, 3)
    state = absorbed(k, v, 4, 17, 50)
    for size, key, value in held(state):
        mine = which == int(torch.tensor(key).argmax())
        assert size == int(mine.sum())
        close(torch.tensor(value, dtype=torch.float64), v[mine].mean(0))


def test_rows_of_different_length_do_not_touch_each_other(draw: Draw) -> None:
    k, v = draw(60, 4), draw(60, 3)
    row = torch.cat([torch.zeros(20), torch.ones(40)]).long()
    position = torch.cat([torch.arange(20), torch.arange(40)])
    state: ClusterMeansState = opened("window+clusters(m=6)@1", rows=2).summary
    state.absorb(row, k, v, position)
    for r, at in ((0, slice(0, 20)), (1, slice(20, 60))):
        alone = absorbed(k[at], v[at], 6)
        assert torch.equal(state.mean_k[r], alone.mean_k[0]) and torch.equal(state.count[r], alone.count[0])


def test_bfloat16_keeps_the_number_of_tokens(draw: Draw) -> None:
    k, v = draw(300, 4, dtype=torch.bfloat16), draw(300, 3, dtype=torch.bfloat16)
    state = absorbed(k, v, 7, 100, 200)
    assert int(state.count.sum()) == 300 and state.mean_k.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1e160, 1e300])
def test_keys_whose_distances_overflow_are_merged_too(size: float) -> None:
    k = size * torch.tensor([[1.0], [-1.0], [0.5], [0.0]], dtype=torch.float64)
    state = absorbed(k, k, 2)
    assert int((state.count > 0).sum()) == 2 and int(state.count.sum()) == 4


def test_an_empty_summary_has_no_mass(draw: Draw) -> None:
    part = opened("window+clusters(m=3)@1").summary.read(draw(1, 2, 4))
    wanted = Partial.empty(1, 2, dv=3, dtype=torch.float64)
    assert torch.equal(part.mean, wanted.mean) and torch.equal(part.log_mass, wanted.log_mass)


def test_no_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="m"):
        parse("h2o+clusters(m=0)@64")


# ---- mutants ----------------------------------------------------------------------------------------------------


def unweighted(size: Tensor, k: Tensor, v: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge as if every cluster had one token."""
    after, key, value = merged((size > 0).to(size.dtype), k, v, most)
    grown = after > (size > 0)
    return torch.where(grown, size + 1, size) * (after > 0), key, value


def uncounted(size: Tensor, k: Tensor, v: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Forget the tokens of the cluster that joins another."""
    after, key, value = merged(size, k, v, most)
    return torch.minimum(size, after), key, value


def first_pair(size: Tensor, k: Tensor, v: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the first two clusters, however far they are."""
    del most
    one, other = (size[0] > 0).nonzero().flatten()[:2].tolist()
    a, b = size[0, one].clone(), size[0, other].clone()
    size, k, v = size.clone(), k.clone(), v.clone()
    for mean in (k, v):
        mean[0, one] = (a * mean[0, one] + b * mean[0, other]) / (a + b)
    size[0, one], size[0, other] = a + b, 0
    return size, k, v


@pytest.mark.parametrize("wrong", [unweighted, uncounted, first_pair])
def test_a_wrong_merge_is_told(draw: Draw, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    k, v = draw(40, 4), draw(40, 3)
    tokens: list[Cluster] = [(1, key, value) for key, value in zip(k.tolist(), v.tolist(), strict=True)]
    require_literal(absorbed(k, v, 5), literal(tokens, 5))
    monkeypatch.setattr(clusters, "merged", wrong)
    with pytest.raises(AssertionError):
        require_literal(absorbed(k, v, 5), literal(tokens, 5))
    monkeypatch.undo()


def test_a_cluster_without_its_weight_is_told(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """CaM's loss: clusters that weigh as one token each."""
    monkeypatch.setattr(torch, "log", torch.zeros_like)
    with pytest.raises(AssertionError):
        test_tokens_of_equal_keys_are_one_cluster_without_error(draw, None)
