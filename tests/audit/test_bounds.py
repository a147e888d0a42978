"""An audit checks the bounds of certified methods against the truth, and tells what they kept and what they read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfloor import parse
from kvfloor.audit.bounds import Bounds, check_bounds
from kvfloor.audit.rounds import joined
from kvfloor.audit.rows import certified_figures, read_rows, write_rows
from kvfloor.audit.traces import Trace
from kvfloor.certify.certified import Certified
from tests.support import seeded


def traces() -> list[Trace]:
    """Make traces of two layers with one kv head, two samples, of which the first has pads."""
    made, draw = [], seeded(4)
    for layer in range(2):
        q, k, v = draw(2, 3, 90, 8, dtype=torch.float32) * 2, *(draw(2, 90, 8, dtype=torch.float32) for _ in "kv")
        present = torch.ones(2, 90, dtype=torch.bool)
        present[0, :11] = False
        made.append(Trace(layer, q, k * 2, v, present, 8**-0.5, 5.0, 1, 6, torch.empty(0)))
    return made


@pytest.mark.parametrize("cold", ["device", "ram", "disk"])
def test_answers_err_less_than_their_bounds(cold: str) -> None:
    found = check_bounds(traces(), parse(f"tiered(epsilon=0.01,page=16,cold={cold})"))
    assert found is not None and found.bound is not None
    assert found.checked == 2 * 2 * 3 * 6 and found.violations == 0
    assert 0 < found.error < found.bound <= 0.01 * (1 + 1e-5)


def test_only_layers_that_certify_are_checked() -> None:
    assert check_bounds(traces(), parse("h2o@32")) is None
    half = check_bounds(traces(), parse("layers(exact,tiered(page=16))"))
    assert half is not None and half.checked == 2 * 3 * 6


def test_bounds_that_are_too_small_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Certified.bound.func
    monkeypatch.setattr(Certified, "bound", property(lambda self: real(self) * 1e-4))
    found = check_bounds(traces(), parse("tiered(epsilon=0.05,page=16)"))
    assert found is not None and found.violations > found.checked / 2


def test_a_row_keeps_what_was_found(row: Any, tmp_path: Path) -> None:
    made = row("tiered(cold=ram)", bounds=Bounds(480, 0.019, 0.0004, 0), cold=3000)
    write_rows(tmp_path / "rows.jsonl", [row("exact"), made])
    assert read_rows(tmp_path / "rows.jsonl")[1] == made
    assert (made.checked, made.largest_bound, made.largest_error, made.violations) == (480, 0.019, 0.0004, 0)
    told = certified_figures(made)
    assert (told["method"], told["cold_bytes"], told["largest_bound"], told["violations"]) == (
        made.method,
        3000,
        0.019,
        0,
    )
    later = replace(made, round=2, checked=0, largest_bound=None, largest_error=None, cold_bytes=3100)
    (whole,) = joined([made, later])
    assert whole.cold_bytes == 3050 and whole.checked == 480
