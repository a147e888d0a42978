"""The random policy keeps a uniform sample without replacement, the same for any block."""

import math

import pytest
import torch
from torch import Tensor

from tests.support import filled

N, KEPT, ROWS = 24, 6, 4000


def kept(text: str, rows: int = ROWS) -> Tensor:
    """Membership (rows, N) after N tokens."""
    state = filled(text, torch.zeros(rows, N, 1))
    return torch.zeros(rows, N, dtype=torch.bool).scatter(1, state.slots.view().position, True)


def test_every_token_is_kept_equally_often() -> None:
    counts = kept(f"random(block=1)@{KEPT}").sum(0).double()
    expected = ROWS * KEPT / N
    # Sampling without replacement: chi-square shrinks by (N - KEPT) / (N - 1).
    chi_square = ((counts - expected) ** 2 / expected).sum() * (N - 1) / (N - KEPT)
    assert float(chi_square) < (N - 1) + 4 * math.sqrt(2 * (N - 1))


def test_pairs_of_tokens_are_kept_together_as_often_as_chance_says() -> None:
    member = kept(f"random(block=1)@{KEPT}").double()
    together = (member.T @ member) / ROWS
    wanted = KEPT * (KEPT - 1) / (N * (N - 1))
    off_diagonal = together[~torch.eye(N, dtype=torch.bool)]
    assert float((off_diagonal - wanted).abs().max()) < 5 * math.sqrt(wanted / ROWS)


@pytest.mark.parametrize("block", [2, 8, 24])
def test_the_sample_does_not_depend_on_the_block(block: int) -> None:
    assert torch.equal(kept(f"random(block={block})@6", rows=50), kept("random(block=1)@6", rows=50))
