"""Matching tokens against the law of its docstring in float64, written out without tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvfloor import Partial, Spec
from kvfloor.methods.compaction import matching
from kvfloor.methods.compaction.matching import LEAST_WEIGHT, VALUE_RIDGE, WEIGHT_RIDGE, Kept, match

D, DV, S, M = 8, 6, 700, 90
SPEC = Spec(rows=1, d=D, dv=DV, scale=0.5, dtype=torch.float64)


def drawn(seed: int = 0, s: int = S, m: int = M) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    sizes = ((s, D), (s, DV), (s,), (m, D))
    k, v, log_weight, q = (torch.randn(1, *size, generator=source, dtype=torch.float64) for size in sizes)
    return 2.0 * k, v, 0.3 * log_weight, q


def shares(k: Tensor, log_weight: Tensor, q: Tensor, spec: Spec = SPEC) -> Tensor:
    """Return the softmax weights (m, s) of the queries."""
    raw = spec.scale * q[0] @ k[0].T
    raw = raw if spec.softcap is None else spec.softcap * torch.tanh(raw / spec.softcap)
    return (raw + log_weight[0]).softmax(-1)


def weight_error(p: Tensor, w: Tensor) -> Tensor:
    ridge = WEIGHT_RIDGE * p.square().sum(0).mean()
    return (p @ w - 1).square().sum() + ridge * (w - 1).square().sum()


def require_law(kept: Kept, t: int, spec: Spec = SPEC, seed: int = 0) -> None:
    k, v, log_weight, q = drawn(seed)
    p = shares(k, log_weight, q, spec)
    assert set(kept.index.tolist()) == set(p.square().sum(0).topk(t).indices.tolist())
    assert kept.index.tolist() == sorted(kept.index.tolist())
    few, w = p[:, kept.index], (kept.log_weight - log_weight[0, kept.index]).exp()
    least = weight_error(few, w)
    for i in range(t):  # no weight alone can be moved for the better; for a convex function this is optimal
        for step in (-1e-3, 1e-3):
            moved = w.clone()
            moved[i] = (w[i] + step).clamp_min(LEAST_WEIGHT)
            assert weight_error(few, moved) >= least * (1 - 1e-9)
    x = few * w
    x = x / x.sum(-1, keepdim=True)
    root = (VALUE_RIDGE * x.square().sum(0).mean()).sqrt()
    equations = torch.cat([x, root * torch.eye(t, dtype=x.dtype)])
    wanted = torch.cat([p @ v[0], root * v[0, kept.index]])
    assert torch.allclose(kept.value, torch.linalg.lstsq(equations, wanted).solution, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("t", [1, 20, 150])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_keys_weights_and_values_are_those_of_the_law(t: int, softcap: float | None) -> None:
    spec = replace(SPEC, softcap=softcap)
    require_law(match(*drawn(), t, spec), t, spec)


def _half_the_queries(kept: Kept, k: Tensor, v: Tensor, log_weight: Tensor, q: Tensor) -> Kept:
    return match(k, v, log_weight, q[:, : M // 2], 20, SPEC)


def _unweighted(kept: Kept, k: Tensor, v: Tensor, log_weight: Tensor, q: Tensor) -> Kept:
    return replace(kept, log_weight=log_weight[0, kept.index])


def _own_values(kept: Kept, k: Tensor, v: Tensor, log_weight: Tensor, q: Tensor) -> Kept:
    return replace(kept, value=v[0, kept.index])


def _weights_forgotten(kept: Kept, k: Tensor, v: Tensor, log_weight: Tensor, q: Tensor) -> Kept:
    return match(k, v, 0 * log_weight, q, 20, SPEC)


@pytest.mark.parametrize("wrong", [_half_the_queries, _unweighted, _own_values, _weights_forgotten])
def test_a_wrong_fit_is_found(wrong) -> None:
    given = drawn()
    with pytest.raises(AssertionError):
        require_law(wrong(match(*given, 20, SPEC), *given), 20)


def test_mass_and_outputs_are_nearer_than_those_of_the_chosen_tokens_alone() -> None:
    k, v, log_weight, q = drawn()
    whole = Partial.over(q, k, v, SPEC, log_weight)
    kept = match(k, v, log_weight, q, 70, SPEC)

    def error(weights: Tensor, values: Tensor) -> tuple[float, float]:
        part = Partial.over(q, k[:, kept.index], values.unsqueeze(0), SPEC, weights.unsqueeze(0))
        mass = (part.log_mass - whole.log_mass).abs().mean()
        return float(mass), float((part.mean - whole.mean).norm() / whole.mean.norm())

    fitted = error(kept.log_weight, kept.value)
    evicted = error(log_weight[0, kept.index], v[0, kept.index])
    assert fitted[0] < 0.4 * evicted[0] and fitted[1] < 0.6 * evicted[1]


@pytest.mark.parametrize("tile", [1, 64, 10_000])
def test_tiles_change_rounding_only(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    whole = match(*drawn(), 30, SPEC)
    monkeypatch.setattr(matching, "TILE_TOKENS", tile)
    tiled = match(*drawn(), 30, SPEC)
    assert torch.equal(whole.index, tiled.index)
    assert torch.allclose(whole.value, tiled.value) and torch.allclose(whole.log_weight, tiled.log_weight)


def test_inputs_are_not_changed() -> None:
    given, before = drawn(), drawn()
    match(*given, 30, SPEC)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
