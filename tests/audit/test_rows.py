"""Rows follow from their outcomes, files are whole or not there, JSON is what scripts rely on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvfloor.audit.rows import CONTRACT_FIELDS, Row, document, read_rows, write_rows
from kvfloor.files import open_folder

FIELDS = """
    method budget_tokens task context protocol n score score_low score_high exact_score diff_low diff_high state_bytes
    peak_state_bytes exact_bytes floor_bytes bytes_read_per_token output_error prefill_ms decode_ms_per_token
    output_tokens configuration name budget baseline parts
""".split()


def test_the_documents_fields_are_the_contract(row) -> None:
    rows = [row("exact", size=10_000), row("window@64", right=10)]
    made = document(model="builtin", seed=3, rows=rows, method=None, why="because", report="r.html")
    assert list(CONTRACT_FIELDS) == FIELDS
    assert set(made) == {"schema", "model", "seed", "rows", "recommendation", "report"} and made["schema"] == 1
    assert all(set(one) == set(FIELDS) for one in json.loads(json.dumps(made, allow_nan=False))["rows"])


def test_scores_and_differences_follow_from_the_outcomes(row) -> None:
    made = row("window@64", right=30)
    assert (made.score, made.exact_score, made.gained, made.lost) == (0.75, 1.0, 0, 10)
    assert made.diff_low < -0.25 < made.diff_high < 0
    assert made.output_error == pytest.approx(0.2)


def test_too_few_samples_are_refused(row) -> None:
    with pytest.raises(ValueError, match="at least 32"):
        row("window@64", right=31, n=31, exact_right=31)


@pytest.mark.parametrize(
    "changes",
    [{"score": 0.5}, {"n": 39}, {"protocol": "later"}, {"state_bytes": -1}, {"peak_state_bytes": 1}, {"lost": 3}],
)
def test_a_row_that_contradicts_itself_is_refused(row, changes: dict) -> None:
    with pytest.raises(ValueError):
        replace(row("window@64", right=30), **changes)


def test_rows_survive_their_file(row, tmp_path: Path) -> None:
    rows = [row("exact"), row("h2o@64", right=12, task="kv")]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_a_broken_line_is_named(row, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [row("exact")])
    path.write_text(path.read_text() + '{"method": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_rows(path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        open_folder(tmp_path / "file" / "inside")


def test_below_the_floor_is_a_fact_not_an_error(row) -> None:
    assert row("window@8", size=400).below_floor and not row("window@64", size=600).below_floor
    assert isinstance(row("exact"), Row)
