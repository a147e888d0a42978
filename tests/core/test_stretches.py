"""Stretches: lists of different length in one arena, told apart, moved and sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.core.stretches import Stretches


def filled(capacity: list[int], used: list[int], lists: int = 2) -> tuple[Stretches, dict[tuple[int, int], list[int]]]:
    """Stretches whose lists hold numbers of their own, and those numbers by (row, list)."""
    rows = len(capacity)
    made = Stretches(Spec(rows, 1, 1), torch.tensor(capacity), {"x": ((), torch.int32), "y": ((2,), torch.float32)},
                     lists=lists, fill=-1)  # fmt: skip
    wanted = {}
    width = max(used)
    items = torch.arange(rows * lists * width, dtype=torch.int32).view(rows, lists, width)
    made.write("x", torch.arange(rows), torch.tensor(used), items)
    made.held = torch.tensor(used)
    for row in range(rows):
        for i in range(lists):
            wanted[row, i] = items[row, i, : used[row]].tolist()
    return made, wanted


def held(made: Stretches) -> dict[tuple[int, int], list[int]]:
    found = {}
    for row, used in enumerate(made.held.tolist()):
        part: Tensor = made.across("x", torch.tensor([row]), used)[0]
        found |= {(row, i): part[i].tolist() for i in range(made.lists)}
    return found


SHAPES = [([4, 4, 4], [4, 0, 2]), ([5, 1, 3], [2, 1, 3]), ([3, 3], [3, 3])]


@pytest.mark.parametrize(("capacity", "used"), SHAPES)
def test_lists_do_not_touch_one_another(capacity: list[int], used: list[int]) -> None:
    made, wanted = filled(capacity, used)
    assert held(made) == wanted
    assert made.x.shape == (2 * sum(capacity),) and made.y.shape == (2 * sum(capacity), 2)  # type: ignore[attr-defined]
    made.write("x", torch.tensor([0]), torch.tensor([1]), torch.full((1, 2, 1), 99, dtype=torch.int32))
    made.held[0] = 1
    assert held(made) == wanted | {(0, 0): [99], (0, 1): [99]}
    beyond = made.across("x", torch.tensor([0]), capacity[0])[0, :, 1:]
    assert bool((beyond == -1).all())


@pytest.mark.parametrize(("capacity", "used"), SHAPES)
def test_lists_survive_growth_a_message_and_a_selection_of_rows(capacity: list[int], used: list[int]) -> None:
    made, wanted = filled(capacity, used)
    made.resize(torch.tensor(capacity) + torch.arange(len(capacity)) + 1)
    assert held(made) == wanted
    sent: dict[str, Any] = made.export()
    assert sent["x"].numel() == 2 * sum(used)
    again, _ = filled(capacity, [0] * len(capacity))
    again.adopt(sent)
    assert held(again) == wanted and torch.equal(again.capacity, made.capacity)
    last = len(capacity) - 1
    again.select_rows(torch.tensor([last, 0, last]))
    rows = {0: last, 1: 0, 2: last}
    assert held(again) == {(new, i): wanted[old, i] for new, old in rows.items() for i in range(2)}
    assert again.spec.row_ids == (last, 0, last)


def test_a_list_that_shrinks_keeps_its_first_items() -> None:
    made, wanted = filled([4, 4], [4, 2])
    made.resize(torch.tensor([3, 4]))
    assert held(made) == wanted | {(0, i): wanted[0, i][:3] for i in range(2)}


def test_growth_counts_old_and_new_in_the_peak() -> None:
    made = Stretches(Spec(1, 1, 1), torch.tensor([100]), {"x": ((), torch.int32)})
    made.resize(torch.tensor([200]))
    assert made.peak_nbytes - made.nbytes == 400


def test_a_level_arena_is_viewed_without_a_copy() -> None:
    made, _ = filled([4, 4], [4, 4])
    assert made.across("x", None, 4).untyped_storage().data_ptr() == made.x.untyped_storage().data_ptr()  # type: ignore[attr-defined]
