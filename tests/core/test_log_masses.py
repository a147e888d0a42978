"""Log-masses alone, against float64, on every way that they are computed; mutants are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor.core import attend_few
from kvfloor.core import log_masses as module
from kvfloor.core.attend import attend
from kvfloor.core.log_masses import log_masses
from tests.core.test_attend import DTYPES, error
from tests.support import Draw, seeded
from tests.support import attention as oracle


@pytest.fixture(autouse=True, params=["as it is here", "without a kernel in C"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with the kernel in C, if there is one, and without it."""
    if request.param == "without a kernel in C":
        monkeypatch.setattr(attend_few, "library", lambda: None)


SHAPES = [(3, 5, 97, 16), (2, 4, 1025, 64), (1, 16, 3000, 48), (1, 17, 3000, 48), (2, 1, 1, 8)]
"""Rows, queries, tokens and width; small and large keys, few and many queries."""


def wanted(q: Tensor, k: Tensor, scale: float, *more: Any) -> Tensor:
    return oracle(q, k, k, scale, *more)[1]


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-4  # those of the log-masses of `attend`


def of_all_kinds(draw: Draw, rows: int, m: int, s: int) -> list[tuple[Tensor | None, Tensor | None]]:
    """Pairs of log-weights and what is hidden: nothing, weights of which some are -inf, and masks of three shapes."""
    weight = draw(rows, s, scale=2.0).masked_fill(draw(rows, s) > 1.5, -torch.inf)
    shapes = ((1, 1, s), (rows, 1, s), (rows, m, s))
    return [(None, None), (weight, None), *((weight, draw(*shape) > 0.5) for shape in shapes)]


def require_right(
    compute: Callable[..., Tensor], draw: Draw, dtype: torch.dtype, softcap: float | None, shape: tuple[int, ...]
) -> None:
    rows, m, s, d = shape
    q, k = draw(rows, m, d, dtype=dtype), draw(rows, s, d, dtype=dtype)
    for weight, hide in of_all_kinds(draw, rows, m, s):
        found = compute(q, k, d**-0.5, softcap, weight, hide)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(found, wanted(q, k, d**-0.5, softcap, weight, hide)) < tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_those_of_float64_attention(
    draw: Draw, dtype: torch.dtype, softcap: float | None, shape: tuple[int, ...]
) -> None:
    require_right(log_masses, draw, dtype, softcap, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [20, 9000])
def test_a_query_that_sees_nothing_has_no_mass(draw: Draw, dtype: torch.dtype, s: int) -> None:
    q, k = draw(2, 3, 16, dtype=dtype), draw(2, s, 16, dtype=dtype)
    hide = torch.zeros(2, 3, s, dtype=torch.bool)
    hide[1, 2] = True
    found = log_masses(q, k, 1.0, hide=hide)
    assert found[1, 2] == -torch.inf and int(torch.isinf(found).sum()) == 1 and not bool(found.isnan().any())
    weight = torch.zeros(2, s).index_fill(0, torch.tensor([0]), -torch.inf)
    found = log_masses(q, k, 1.0, log_weight=weight)
    assert bool((found[0] == -torch.inf).all()) and bool(found[1].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", [3, 9000])
def test_logits_of_ten_thousand_stay_finite(dtype: torch.dtype, s: int) -> None:
    q, k = torch.full((1, 1, 4), 50.0, dtype=dtype), torch.full((1, s, 4), -50.0, dtype=dtype)
    k[:, 1] = 50.0
    assert log_masses(q, k, 1.0).item() == pytest.approx(1e4, rel=1e-6)


@pytest.mark.parametrize(("m", "s"), [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_queries_or_no_keys(m: int, s: int, dtype: torch.dtype) -> None:
    found = log_masses(torch.ones(2, m, 4, dtype=dtype), torch.ones(2, s, 4, dtype=dtype), 1.0)
    assert found.shape == (2, m) and (s > 0 or bool((found == -torch.inf).all()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_queries_of_any_stride(draw: Draw, dtype: torch.dtype) -> None:
    for s in (50, 5000):
        q, k = draw(2, 3, 96, dtype=dtype)[..., ::2], draw(2, 48, s, dtype=dtype).mT
        assert error(log_masses(q, k, 0.25), wanted(q, k, 0.25)) < tolerance(dtype)
        k = draw(2, 2 * s, 48, dtype=dtype)[:, :s]  # a row's stretch that is not full
        assert error(log_masses(q, k, 0.25), wanted(q, k, 0.25)) < tolerance(dtype)


def test_few_queries_on_many_keys_of_float32_are_a_product(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_few, "library", lambda: None)
    called: list[int] = []
    monkeypatch.setattr(module, "attend", lambda q, *given: called.append(q.shape[1]) or attend(q, *given))
    for dtype in (torch.float32, torch.bfloat16):
        k = draw(2, 2048, 64, dtype=dtype)
        for m in (4, 17):
            log_masses(draw(2, m, 64, dtype=dtype), k, 1.0)
        log_masses(draw(2, 4, 64, dtype=dtype), k[:, :32], 1.0)
    assert called == [17, 4, 4, 17, 4]


# ---- mutants ------------------------------------------------------------------------------------------------------


def without_weights(q: Tensor, k: Tensor, scale: float, softcap: Any, weight: Any, hide: Any) -> Tensor:
    return log_masses(q, k, scale, softcap, None, hide)


def without_softcap(q: Tensor, k: Tensor, scale: float, softcap: Any, weight: Any, hide: Any) -> Tensor:
    return log_masses(q, k, scale, None, weight, hide)


def without_hiding(q: Tensor, k: Tensor, scale: float, softcap: Any, weight: Any, hide: Any) -> Tensor:
    return log_masses(q, k, scale, softcap, weight)


def without_a_token(q: Tensor, k: Tensor, scale: float, softcap: Any, weight: Any, hide: Any) -> Tensor:
    cut = (None if x is None else x[..., 1:] for x in (weight, hide))
    return log_masses(q, k[:, 1:], scale, softcap, *cut)


@pytest.mark.parametrize("mutant", [without_weights, without_softcap, without_hiding, without_a_token])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutants_are_rejected(draw: Draw, dtype: torch.dtype, mutant: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError):
        require_right(mutant, draw, dtype, 5.0, SHAPES[0])


def test_a_kernel_that_calls_a_blind_query_massless_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = lambda *given: tuple(x.nan_to_num(neginf=0.0) for x in attend(*given))  # noqa: E731
    monkeypatch.setattr(module, "attend", blind)
    monkeypatch.setattr(attend_few, "library", lambda: None)
    with pytest.raises(AssertionError):
        test_a_query_that_sees_nothing_has_no_mass(seeded(0), torch.float32, 20)
