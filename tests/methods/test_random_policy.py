"""The random policy keeps a uniform sample without replacement, the same for any chunking."""

import math

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse

N, KEPT, ROWS = 24, 6, 4000


def kept(text: str, cuts: list[int], rows: int = ROWS, row_ids: list[int] | None = None) -> Tensor:
    """Membership (rows, N) after streaming N tokens in calls of these lengths."""
    state = parse(text).open(Spec(rows, 1, 1, row_ids=row_ids))
    for t in cuts:
        state.append(torch.zeros(rows, t, 1), torch.zeros(rows, t, 1))
    position = state.slots.view().position  # type: ignore[attr-defined]
    return torch.zeros(rows, N, dtype=torch.bool).scatter(1, position, True)


def test_every_token_is_kept_equally_often() -> None:
    counts = kept(f"random(block=1)@{KEPT}", [N]).sum(0).double()
    expected = ROWS * KEPT / N
    # Sampling without replacement: chi-square shrinks by (N - KEPT) / (N - 1).
    chi_square = ((counts - expected) ** 2 / expected).sum() * (N - 1) / (N - KEPT)
    assert float(chi_square) < (N - 1) + 4 * math.sqrt(2 * (N - 1))


def test_pairs_of_tokens_are_kept_together_as_often_as_chance_says() -> None:
    member = kept(f"random(block=1)@{KEPT}", [N]).double()
    together = (member.T @ member) / ROWS
    wanted = KEPT * (KEPT - 1) / (N * (N - 1))
    off_diagonal = together[~torch.eye(N, dtype=torch.bool)]
    assert float((off_diagonal - wanted).abs().max()) < 5 * math.sqrt(wanted / ROWS)


@pytest.mark.parametrize("cuts", [[1] * N, [5, 7, 12], [23, 1], [2, 22]])
def test_the_sample_does_not_depend_on_the_cuts(cuts: list[int]) -> None:
    assert torch.equal(kept("random(block=4)@6", cuts, rows=50), kept("random(block=4)@6", [N], rows=50))


@pytest.mark.parametrize("block", [2, 8, 24])
def test_the_sample_does_not_depend_on_the_block(block: int) -> None:
    assert torch.equal(kept(f"random(block={block})@6", [N], rows=50), kept("random(block=1)@6", [N], rows=50))


def test_a_row_is_drawn_by_its_id_and_not_by_its_place() -> None:
    first = kept("random(block=1)@6", [N], rows=3, row_ids=[7, 8, 9])
    other = kept("random(block=1)@6", [N], rows=3, row_ids=[9, 7, 1])
    assert torch.equal(first[2], other[0]) and torch.equal(first[0], other[1])
    assert not torch.equal(first[1], other[2])
