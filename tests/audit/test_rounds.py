"""Rounds of samples joined into one row are that row measured at once; a race's claims on them keep their error."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from characterize.race_looks import CERTAIN, ever_claimed
from kvfloor.audit import criterion
from kvfloor.audit.criterion import Standard
from kvfloor.audit.recommend import CONFIDENCE, MARGIN
from kvfloor.audit.rounds import MOST_ROUNDS, joined
from kvfloor.audit.rows import Row, read_rows, write_rows
from kvfloor.statistics import confidence_of_look
from tests.audit.made_up import task_row

RACING = Standard(MARGIN, CONFIDENCE, 1, racing=True)
JOINED = ("n", "score", "score_low", "score_high", "exact_score", "diff_low", "diff_high", "outcomes", "gained", "lost")


def drawn(rng: np.random.Generator, number: int, n: int) -> tuple[Row, list[int], list[int]]:
    """Make the row of a round with random outcomes, bytes and times; return it with both lists of outcomes."""
    mine, exact = (rng.random(n) < share for share in (0.7, 0.8))
    outcomes, reference = mine.astype(int).tolist(), exact.astype(int).tolist()
    size = int(rng.integers(900, 1100))
    row = task_row(
        "window@64",
        number=number,
        outcomes=outcomes,
        exact_outcomes=reference,
        state_bytes=size,
        peak_state_bytes=size + int(rng.integers(100)),
        exact_bytes=int(rng.integers(9_000, 11_000)),
        bytes_read_per_token=float(size),
        prefill_ms=float(rng.random()),
        output_tokens=float(rng.random()),
        parts={"one": float(rng.random()), "two": float(rng.random())},
        decode_ms_per_token=float(number),
    )
    return row, outcomes, reference


@pytest.mark.parametrize("seed", range(20))
def test_joined_rounds_equal_one_row_of_all_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = [1, *sorted(rng.choice(range(2, MOST_ROUNDS + 1), int(rng.integers(1, 4)), replace=False).tolist())]
    made = [drawn(rng, number, int(rng.integers(32, 60))) for number in numbers]
    rows = [row for row, _, _ in made]
    both = ([one for part in column for one in part] for column in ([m[1] for m in made], [m[2] for m in made]))
    whole = task_row("window@64", **dict(zip(("outcomes", "exact_outcomes"), both, strict=True)))
    found = joined([rows[i] for i in rng.permutation(len(rows))])
    assert len(found) == 1 and found[0].cell == rows[0].cell and found[0].rounds == len(rows)
    assert {name: getattr(found[0], name) for name in JOINED} == {name: getattr(whole, name) for name in JOINED}

    def mean(values: list[float]) -> float:
        return sum(value * row.n for value, row in zip(values, rows, strict=True)) / whole.n

    for name in ("bytes_read_per_token", "prefill_ms", "output_tokens"):
        assert getattr(found[0], name) == pytest.approx(mean([getattr(row, name) for row in rows]))
    for part in ("one", "two"):
        assert found[0].parts[part] == pytest.approx(mean([row.parts[part] for row in rows]))
    for name in ("state_bytes", "exact_bytes"):
        exact_mean = Fraction(sum(getattr(row, name) * row.n for row in rows), whole.n)
        assert 0 <= getattr(found[0], name) - exact_mean < 1
    assert found[0].peak_state_bytes == max(row.peak_state_bytes for row in rows)
    assert found[0].decode_ms_per_token == float(np.median(numbers))
    assert found[0].output_error_by_head == rows[0].output_error_by_head and found[0].output_error == 0.2
    changed = {*JOINED, "parts", "state_bytes", "peak_state_bytes", "exact_bytes", "rounds"}
    changed |= {"bytes_read_per_token", "prefill_ms", "output_tokens", "decode_ms_per_token"}
    rest = {field.name for field in fields(Row)} - changed
    assert all(getattr(found[0], name) == getattr(rows[0], name) for name in rest)


def test_settings_and_cells_stay_apart_and_each_is_compared_on_its_own_rounds() -> None:
    rows = [task_row("exact"), task_row("window@64", lost=3), task_row("h2o@64"), task_row("exact", task="kv")]
    rows += [task_row("exact", lost=10, gained=10, number=2, outcomes=[0] * 10 + [1] * 30)]
    rows += [task_row("window@64", lost=2, gained=10, number=2)]
    found = {(row.method, row.task): row for row in joined(rows)}
    assert [key[0] for key in found] == ["exact", "window@64", "h2o@64", "exact"]
    exact, window, h2o = (found[setting, "recall"] for setting in ("exact", "window@64", "h2o@64"))
    assert (exact.n, window.n, h2o.n, found["exact", "kv"].n) == (80, 80, 40, 40)
    assert window.exact_score == exact.score == 70 / 80 and h2o.exact_score == 1.0
    assert (window.gained, window.lost) == (10, 5) and (exact.diff_low, exact.diff_high) == (0.0, 0.0)


def test_intervals_of_a_race_leave_error_for_later_looks() -> None:
    one, two = task_row("window@64", lost=3), task_row("window@64", lost=3, number=2)
    plain, wide = joined([one]), joined([one], racing=True)
    assert plain == [one]
    assert wide[0].diff_low < one.diff_low < one.diff_high < wide[0].diff_high
    assert wide[0].score_low < one.score_low < one.score_high < wide[0].score_high
    both = joined([one, two], racing=True)[0]
    level = confidence_of_look(0.95, 2)
    assert (both.diff_low, both.diff_high) == criterion.paired_difference_interval(0, 6, 80, level)
    tight = replace(RACING, margin=0.05)
    assert tight.verdict(both) == "open"
    assert replace(tight, racing=False).verdict(joined([one, two])[0]) == "falls"


def test_rounds_that_cannot_be_joined_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has rounds \[2\]: give round 1, and each once"):
        joined([task_row("window@64", number=2)])
    with pytest.raises(ValueError, match=r"'window@64' on recall at 512 tokens, question after has rounds \[1, 1\]"):
        joined([task_row("window@64"), task_row("window@64", lost=1)])
    with pytest.raises(ValueError, match="both count from 1"):
        task_row("window@64", number=0)


def test_rows_of_an_older_file_are_of_the_first_round(tmp_path: Path) -> None:
    rows = [task_row("exact"), task_row("window@64", lost=3)]
    path = tmp_path / "rows.jsonl"
    write_rows(path, [*rows, task_row("exact", number=2)])
    assert [row.cell.round for row in read_rows(path)] == [1, 1, 2]
    plain = [json.loads(line) for line in path.read_text().splitlines()[:2]]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if "round" not in k}) + "\n" for row in plain))
    assert read_rows(path) == rows
    path.write_text(json.dumps({k: v for k, v in plain[0].items() if k != "lost"}) + "\n")
    with pytest.raises(ValueError, match=r"missing fields \['lost'\]"):
        read_rows(path)


@pytest.mark.parametrize("gained", [0.0, 0.02])
def test_a_loss_of_the_margin_is_seldom_excluded_at_any_look(gained: float) -> None:
    allowed = 1 - CONFIDENCE
    assert 0.2 * allowed < ever_claimed(RACING, "holds", gained, gained + MARGIN) <= allowed


def test_no_loss_is_seldom_said_to_be_one_at_any_look() -> None:
    assert 0.2 * CERTAIN < ever_claimed(RACING, "falls", 0.05, 0.05) <= CERTAIN


def test_intervals_that_ignore_the_looks_claim_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: each look at the full level. Counts are judged once per standard, so it has one of its own."""
    monkeypatch.setattr(criterion, "confidence_of_look", lambda level, look: level)
    mutant = replace(RACING, kl_limit=1.0)
    assert ever_claimed(mutant, "holds", 0.0, MARGIN) > 1 - CONFIDENCE
    assert ever_claimed(mutant, "falls", 0.05, 0.05) > CERTAIN


def test_seeded_races_agree_with_the_enumeration() -> None:
    """A setting loses 15 points: how often do its rounds, joined one by one, ever exclude that?"""
    runs, claims, n = 1500, 0, 40
    rng = np.random.default_rng(0)
    lost = rng.binomial(n, MARGIN, (runs, MOST_ROUNDS))
    kept: dict[tuple[int, int], str] = {}
    for run in lost.cumsum(1).tolist():
        for rounds, total in enumerate(run, 1):
            if (rounds, total) not in kept:
                each = [total // rounds + (i < total % rounds) for i in range(rounds)]
                rows = [task_row("window@64", lost=some, number=i + 1) for i, some in enumerate(each)]
                kept[rounds, total] = RACING.verdict(joined(rows, racing=True)[0])
        claims += any(kept[rounds, total] == "holds" for rounds, total in enumerate(run, 1))
    expected = ever_claimed(RACING, "holds", 0.0, MARGIN)
    error = (expected * (1 - expected) / runs) ** 0.5
    assert abs(claims / runs - expected) < 3.5 * error and claims / runs <= 1 - CONFIDENCE + 3.5 * error
