"""SubGen's stated error, sized by `budget_for`, against the errors of many seeds: misses are rarer than stated."""

from __future__ import annotations

import pytest
import torch

from kvfloor import Spec
from kvfloor.methods.sketches.subgen import SubGen
from kvfloor.statistics import clopper_pearson_limit
from tests.support import Draw

N, D, DV, EPSILON, FAILURE = 96, 3, 2, 0.9, 0.2


def misses(draw: Draw, method: SubGen, rows: int, promised: bool = True) -> int:
    """Of `rows` seeds on one clustered stream: how many err by more than EPSILON |softmax|_2 ||V||_op on one query."""
    centre = torch.nn.functional.normalize(draw(4, D), dim=1)
    k, v = centre.repeat(N // 4, 1) + 0.02 * torch.nn.functional.normalize(draw(N, D), dim=1), draw(N, DV)
    q = torch.nn.functional.normalize(draw(1, D), dim=1)
    state = method.open(Spec(rows, D, DV, dtype=torch.float64))
    for part in torch.arange(N).split(48):
        state.append(k[part].expand(rows, -1, -1), v[part].expand(rows, -1, -1))
    stated = state.guarantee()
    assert stated is not None and stated.holds == promised
    weights = torch.softmax(q @ k.T, -1)
    error = (state.read(q.expand(rows, -1, -1)).mean[:, 0] - weights @ v).norm(dim=1)
    return int((error > EPSILON * weights.norm() * torch.linalg.matrix_norm(v, 2)).sum())


SIZED = SubGen(delta=0.1, radius=1.0).budget_for(EPSILON, FAILURE, Spec(1, D, DV))


def test_misses_are_rarer_than_stated(draw: Draw) -> None:
    assert isinstance(SIZED, SubGen) and SIZED.s == 223 and SIZED.t == 2
    assert clopper_pearson_limit(misses(draw, SIZED, 300), 300, 1e-4) <= FAILURE


def test_the_test_tells_a_method_with_too_few_samples(draw: Draw) -> None:
    """Two pairs in place of the 223 that its epsilon takes."""
    few = SubGen(delta=0.1, radius=1.0, s=2, t=1)
    assert misses(draw, few, 300, promised=False) > 300 * FAILURE


@pytest.mark.slow
def test_misses_are_rarer_than_stated_over_ten_thousand_seeds(draw: Draw) -> None:
    failed = sum(misses(draw, SIZED, 500) for _ in range(20))  # type: ignore[arg-type]
    assert clopper_pearson_limit(failed, 10_000, 1e-4) <= FAILURE
