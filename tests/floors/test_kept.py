"""Instances on which an evictor that keeps a token less errs by more, by an exact search over all its answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfloor.floors import kept_tokens


def distance(point: np.ndarray, corners: np.ndarray) -> tuple[float, float]:
    """Return a lower and an upper bound on the distance from a point to the convex hull of corners (n, w)."""
    shifted = corners - point
    weight = np.zeros(len(corners))
    weight[np.linalg.norm(shifted, axis=1).argmin()] = 1.0
    lower = 0.0
    for _ in range(1000):  # Frank and Wolfe, pairwise: weight moves from the worst corner to the best
        x = weight @ shifted
        along = shifted @ x
        best, worst = along.argmin(), np.where(weight > 0, along, -np.inf).argmax()
        upper = float(np.linalg.norm(x))
        lower = max(lower, float(along[best]) / max(1e-300, upper))
        if lower >= upper * (1 - 1e-6) or upper < 1e-9:
            break
        move = shifted[best] - shifted[worst]
        size = float(move @ move)
        if size == 0.0:
            break
        step = min(float(weight[worst]), max(0.0, float(-x @ move) / size))
        weight[worst] -= step
        weight[best] += step
    return lower, float(np.linalg.norm(weight @ shifted))


def axes(m: int, width: int) -> np.ndarray:
    """Return m of the vectors e_1, .., e_width, -e_1, .., -e_width."""
    return np.concatenate([np.eye(width), -np.eye(width)])[:m]


def circle(m: int) -> np.ndarray:
    angle = 2 * math.pi * np.arange(m) / m
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def errors(points: np.ndarray, r: float) -> list[tuple[float, float]]:
    """Return, per token, bounds on the least error at its spike query for a method that has all tokens but it."""
    found = []
    for i, key in enumerate(points):
        weight = np.exp(r * (points @ key - 1.0))
        answer = weight @ points / weight.sum()
        found.append(distance(answer, np.delete(points, i, 0)))
    return found


def refuted(law: Callable[[int, int, float, float], float]) -> bool:
    """Return True if the law says more tokens than a method needs, on some instance of keys = values on the axes."""
    for width in (2, 3, 4):
        for r in (0.3, 0.7, 1.5, 3.0):
            for epsilon in (0.15, 0.3, 0.5, 0.8):
                m = int(law(width, width, r, epsilon))
                if 2 <= m <= 2 * width and any(upper <= epsilon for _, upper in errors(axes(m, width), r)):
                    return True
    return False


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("r", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.1, 0.25, 0.6])
def test_a_token_less_errs_by_more_than_epsilon_on_the_axes(width: int, r: float, epsilon: float) -> None:
    m = int(kept_tokens(width, width, r, epsilon))
    if 2 <= m <= 2 * width:
        assert all(lower > epsilon for lower, _ in errors(axes(m, width), r))


@pytest.mark.parametrize(("r", "epsilon"), [(200.0, 0.05), (400.0, 0.02), (2000.0, 0.01)])
def test_a_token_less_errs_by_more_than_epsilon_on_a_circle(r: float, epsilon: float) -> None:
    m = int(kept_tokens(2, 2, r, epsilon))
    assert m > 4
    assert all(lower > epsilon for lower, _ in errors(circle(m), r))


def test_a_law_that_forgets_the_opposite_token_is_refuted() -> None:
    def forgetful(d: int, dv: int, r: float, epsilon: float) -> float:
        return min(2 * d, math.ceil(math.exp(r) * (1 - epsilon) / epsilon))

    assert refuted(forgetful)
    assert not refuted(kept_tokens)


def test_short_queries_need_e_to_the_r_over_epsilon_tokens() -> None:
    for r, epsilon in ((1.0, 0.2), (2.0, 0.3), (3.0, 0.5)):
        wanted = math.exp(r) * (1 - epsilon) / epsilon
        assert wanted <= kept_tokens(64, 64, r, epsilon) <= wanted + 1


def test_long_queries_need_every_token_of_a_code() -> None:
    assert kept_tokens(64, 64, 40.0, 0.3) > 4096
    assert kept_tokens(64, 64, 40.0, 0.3, p=0.5) == pytest.approx(0.5 * kept_tokens(64, 64, 40.0, 0.3))


@given(st.integers(1, 80), st.integers(1, 80), st.floats(0.01, 60.0), st.floats(0.0, 1.5))
def test_fewer_tokens_for_a_larger_error_and_for_shorter_queries(d: int, dv: int, r: float, epsilon: float) -> None:
    here = kept_tokens(d, dv, r, epsilon)
    assert here >= kept_tokens(d, dv, r, epsilon + 0.1) >= 1
    assert here <= kept_tokens(d, dv, r + 0.5, epsilon)
    assert here <= kept_tokens(d + 1, dv + 1, r, epsilon)


@pytest.mark.parametrize("wrong", [{"d": 0}, {"dv": 1.5}, {"r": 0.0}, {"epsilon": -0.1}, {"p": 1.1}])
def test_bad_sizes_are_refused(wrong: dict[str, float]) -> None:
    given_sizes = {"d": 8, "dv": 8, "r": 1.0, "epsilon": 0.1} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kept_tokens(**given_sizes)  # type: ignore[arg-type]
