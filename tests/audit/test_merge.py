"""An audit measured in parts and merged has the rows of one that was measured whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvfloor.audit import engine
from kvfloor.audit.closer import Closer
from kvfloor.audit.grid import EXACT, Grid, Pair
from kvfloor.audit.journal import FLOORS, ROWS, TEXTS
from kvfloor.audit.merge import merge, unlike
from kvfloor.audit.nats import TextCell
from kvfloor.audit.rows import Cell
from kvfloor.audit.run import Answer, measure_part, run
from tests.audit.replaying import Replaying, small, without_times
from tests.cli.running import kvfloor


@pytest.fixture(autouse=True)
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Worker", Replaying)


def audit(out: Path, **changes: Any) -> Answer:
    return run(small(out, **changes), lambda total, text: None)


def part(out: Path, i: int, count: int, **changes: Any) -> int:
    return measure_part(small(out, shard=(i, count), **changes), lambda total, text: None)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 13, 40])
def test_parts_are_stretches_that_cover_everything_once_but_exact(n: int) -> None:
    grid = Grid((TextCell("a", 1, 2), TextCell("b", 1, 2), Cell("kv", 3, "after")), (EXACT, "x", "y", "z"))
    parts = [grid.part((i, n)) for i in range(1, n + 1)]
    own: list[Pair] = []
    for pairs in parts:
        assert {(place, EXACT) for place, _ in pairs} <= set(pairs)
        places = [place for place, _ in pairs]
        assert places == sorted(places, key=grid.places.index)
        own += [pair for pair in pairs if pair not in own]
    assert own == sorted(own, key=grid.pairs.index) and set(own) == set(grid.pairs)
    assert sum(map(len, parts)) <= 12 + n + 3  # a part begins inside at most one place
    assert grid.part(None) == grid.pairs


@pytest.mark.parametrize("n", [1, 2, 4, 23])
def test_merged_parts_equal_one_audit(tmp_path: Path, n: int) -> None:
    one = audit(tmp_path / "whole")
    counts = [part(tmp_path / f"part-{i}", i, n) for i in range(1, n + 1)]
    assert sum(counts) >= 21 and max(counts) < 21 / n + 8
    assert not (tmp_path / "part-1/report.html").exists()
    said: list[str] = []
    folders = [tmp_path / f"part-{i}" for i in range(n, 0, -1)]
    merged = merge(folders, tmp_path / "merged", announce=said.append)
    assert without_times(tmp_path / "merged") == without_times(tmp_path / "whole") and said == []
    assert merged.recommendation.method == one.recommendation.method
    assert merged.closer == Closer() != one.closer  # a merge has no model
    assert merged.meta.versions == one.meta.versions and merged.meta.duration_s > 0
    before = Replaying.count
    explained = audit(tmp_path / "merged")
    assert Replaying.count == before  # it is a whole audit
    assert explained.heads == one.heads and explained.closer == one.closer


def test_parts_one_after_the_other_in_one_folder_are_a_whole_audit(tmp_path: Path) -> None:
    audit(tmp_path / "whole")
    before = Replaying.count
    for i in (4, 2, 3, 1):
        part(tmp_path / "out", i, 4)
    assert Replaying.count == before + 21
    before = Replaying.count
    part(tmp_path / "out", 2, 4)
    audit(tmp_path / "out")
    assert Replaying.count == before
    assert without_times(tmp_path / "out") == without_times(tmp_path / "whole")


def test_what_is_missing_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    for i in (1, 3):
        part(tmp_path / str(i), i, 3)
    told = r"7 of 21 measurements are missing: exact, quant, .*, h2o@16 on mixture-1, 64 .* scored; give"
    with pytest.raises(ValueError, match=told):
        merge([tmp_path / "1", tmp_path / "3"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    part(tmp_path / "2", 2, 3)
    lines = (tmp_path / "2" / TEXTS).read_text().splitlines(keepends=True)
    (tmp_path / "2" / TEXTS).write_text("".join(lines[:-1]) + lines[-1][:50])  # the part was killed
    with pytest.raises(ValueError, match=r"1 of 21 measurements are missing: h2o@16 on mixture-1"):
        merge([tmp_path / str(i) for i in (1, 2, 3)], tmp_path / "out")


def test_parts_of_other_audits_are_refused_by_what_differs(tmp_path: Path) -> None:
    part(tmp_path / "1", 1, 2)
    part(tmp_path / "2", 2, 2, n=33)
    with pytest.raises(ValueError, match=r"2' and .*1' are parts of different audits \(another n\)"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"nowhere' holds no audit"):
        merge([tmp_path / "nowhere"], tmp_path / "out")


def test_a_measurement_that_differs_between_parts_is_named(tmp_path: Path) -> None:
    for i in (1, 2):
        part(tmp_path / str(i), i, 2)
    path = tmp_path / "2" / TEXTS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["method"] == EXACT and lines[0]["text"] == "mixture-1"
    lines[0]["loss"][7] += 1e-7  # rounding
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    lines[0]["loss"][7] += 0.01
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"different figures \(loss\) for exact on mixture-1"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out")


def test_rows_are_compared_field_by_field_but_for_times(row: Any) -> None:
    one = row("h2o@64")
    assert unlike(one, replace(one, prefill_ms=9.0, decode_ms_per_token=None)) is None
    assert unlike(one, replace(one, state_bytes=one.state_bytes - 1)) == "state_bytes"
    assert unlike(one, row("h2o@64", right=39)) == "score"
    assert unlike(one, replace(one, output_error_by_head=((0.1, 0.1), (0.2, 0.41)))) == "output_error_by_head"


def test_the_commands_measure_parts_and_merge_them(tmp_path: Path) -> None:
    common = ("audit", "--methods", "h2o", "--budgets", "16", "--texts", "mixture-0,mixture-1", "--tasks", "kv")
    common += ("--contexts", "64", "--continuation", "256", "--n", "32", "--facts", "0")
    first = kvfloor(*common, "--shard", "1/2", "--out", "1", cwd=tmp_path)
    assert first.returncode == 0 and first.stdout.startswith("part 1/2: 10 measurements in 1; when all are measured: ")
    second = kvfloor(*common, "--shard", "2/2", "--out", "2", "--json", cwd=tmp_path)
    assert json.loads(second.stdout) == {"schema": 1, "part": 2, "parts": 2, "measurements": 12, "out": "2"}
    run = kvfloor("merge", "1", "2", "--out", "all", "--json", "--require", "h2o:score>=2", cwd=tmp_path)
    assert run.returncode == 1 and "not met: h2o:score>=2" in run.stderr
    assert len(json.loads(run.stdout)["rows"]) == 7
    report = (tmp_path / "all/report.html").read_text()
    assert "kvfloor merge 1 2 --out all" in report and "Measured in 2 parts" in report
    alone = kvfloor("merge", "1", "--out", "one", cwd=tmp_path)
    assert (
        alone.returncode == 2 and alone.stderr.count("\n") == 1 and "11 of 21 measurements are missing" in alone.stderr
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--shard", "0/2"), "give I/N with I from 1 to N"),
        (("--shard", "3/2"), "give I/N with I from 1 to N"),
        (("--shard", "half"), "--shard 'half': give I/N"),
        (("--shard", "1/2", "--minutes", "3"), "--minutes plans whole audits"),
        (("--shard", "1/2", "--require", "score>=0"), "kvfloor merge"),
    ],
)
def test_shards_that_make_no_sense_are_refused(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    run = kvfloor("audit", *words, cwd=tmp_path)
    assert run.returncode == 2 and told in run.stderr and not (tmp_path / "out").exists()


def test_floors_come_with_exact(tmp_path: Path) -> None:
    part(tmp_path / "out", 3, 3)
    assert (tmp_path / "out" / FLOORS).read_text().count("\n") == 8
    assert (tmp_path / "out" / ROWS).read_text().count("\n") == 7
