"""Coresets that hold all tokens are exact, weights stand for all tokens, and the table of windows is what rows give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from characterize.lib import coresets
from characterize.lib.coresets import Coreset, Sums, answer
from characterize.window_law import FIELDS, fits

ROWS, N, D, DV, SCALE = 2, 40, 4, 3, 0.7


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(ROWS, n, w, generator=source, dtype=torch.float64) for n, w in ((9, D), (N, D), (N, DV)))
    return q, k, v


def wrong(coreset: Coreset) -> float:
    """The largest error of answers from the first 5 tokens in full and a coreset of the others."""
    q, k, v = drawn()
    exact = torch.softmax(SCALE * q @ k.transpose(1, 2), -1) @ v
    return float((answer(q, k[:, :5], v[:, :5], SCALE, coreset) - exact).abs().max())


@pytest.mark.parametrize("degree", [None, 0, 1])
def test_all_tokens_are_exact(degree: int | None) -> None:
    _, k, v = drawn()
    old_k, old_v = k[:, 5:], v[:, 5:]
    sums = None if degree is None else Sums.over(old_k, old_v, degree)
    assert wrong(coresets.sampled(old_k, old_v, N - 5, 0, sums)) < 1e-12
    assert wrong(coresets.sampled(old_k, old_v, (N - 5) // 2, 0, sums)) > 1e-3


def test_all_pivots_are_exact_up_to_the_ridge() -> None:
    _, k, v = drawn()
    assert wrong(coresets.nystrom(k[:, 5:], v[:, 5:], N - 5, SCALE, 0, 1.0)) < 1e-5


@pytest.mark.parametrize("kernel", ["thinformer", "balance"])
@pytest.mark.parametrize("degree", [None, 1])
@pytest.mark.parametrize("size", [7, 16])
def test_walks_keep_the_size_and_the_number_of_tokens(kernel: str, degree: int | None, size: int) -> None:
    _, k, v = drawn()
    found = coresets.walked(k, v, size, SCALE, 0, kernel, degree)
    assert 0 < found.key.shape[1] <= size
    assert found.mass.sum(1).tolist() == pytest.approx([N, N])


def test_sums_of_degree_one_leave_a_remainder_of_second_order() -> None:
    """Without any coreset, halving the keys' spread divides the error by about four."""
    q, k, v = drawn()
    errors = []
    for factor in (0.1, 0.05):
        exact = torch.softmax(SCALE * q @ (factor * k).transpose(1, 2), -1) @ v
        none = Coreset(k[:, :0], v[:, :0], k[:, :0, 0], Sums.over(factor * k, v, 1))
        zero = torch.zeros(ROWS, 1, D, dtype=torch.float64)
        found = none.terms(q, SCALE, zero[..., :1])
        errors.append(float((found[0] / found[1].unsqueeze(-1) - exact).norm()))
    assert 3.0 < errors[0] / errors[1] < 5.0


def test_the_table_of_windows_is_what_the_rows_give() -> None:
    path = Path(__file__).resolve().parents[2] / "characterize/window_law.tsv"
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first.split("\t") == list(FIELDS)
    for line, row in zip(lines, fits(), strict=True):
        assert line.split("\t") == [f"{x:.4g}" if isinstance(x, float) else str(x) for x in row]
