"""A stopped audit goes on where it was: every row once, in the same order, whatever the moment of its end."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfloor import files
from kvfloor.audit import engine, journal
from kvfloor.audit.clock import Clock
from kvfloor.audit.journal import FLOORS, ROWS, TEXTS, Journal
from kvfloor.audit.run import Answer, run
from tests.audit.replaying import Replaying, small, without_times


class Killed(BaseException):
    """Stand for the end of the process."""


@pytest.fixture(autouse=True)
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "Worker", Replaying)


def audit(out: Path, said: list[str] | None = None, **changes: Any) -> Answer:
    return run(small(out, **changes), lambda total, text: None, [].append if said is None else said.append)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, list[str]]:
    audit(tmp_path / "whole")
    return without_times(tmp_path / "whole")


def killed_at(patch: pytest.MonkeyPatch, moment: int, torn: float) -> Callable[[], int]:
    """End the process at the `moment`-th write, whose share `torn` reaches the disk; return a count of the writes."""
    count = 0
    write = os.write

    def step(data: bytes, done: Callable[[bytes], None]) -> None:
        nonlocal count
        count += 1
        if count == moment:
            done(data[: int(torn * len(data))])
            raise Killed
        done(data)

    def append(path: Path, data: bytes) -> None:
        def done(part: bytes) -> None:
            with open(path, "ab", buffering=0) as stream:
                write(stream.fileno(), part)

        step(data, done)

    def replaced(path: Path, content: str) -> None:
        def done(part: bytes) -> None:  # a rename is there whole or not at all
            if len(part) == len(content.encode()):
                files.replace_file(path, content)

        step(content.encode(), done)

    patch.setattr(journal, "append_to", append)
    patch.setattr("kvfloor.audit.records.replace_file", replaced)
    patch.setattr("kvfloor.audit.header.replace_file", replaced)
    patch.setattr("kvfloor.audit.examples.replace_file", replaced)
    return lambda: count


def test_an_audit_killed_at_any_write_goes_on_to_the_same_rows(
    tmp_path: Path, whole: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        writes = killed_at(patch, 0, 0)
        audit(tmp_path / "counted")
        last = writes()
    assert last == 1 + 3 * 7 + 1 + 5 + 3  # the description; rows; floors; the files in order; what explains them
    monkeypatch.setattr("kvfloor.audit.run.identity", lambda *given: {"the same": 1})
    for moment in range(1, last + 1):
        torn = 0.6 * (moment % 2)
        out = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            killed_at(patch, moment, torn)
            with pytest.raises(Killed):
                audit(out)
        before = Replaying.count
        again = audit(out)
        assert without_times(out) == whole, moment
        assert again.closer.examples and again.closer.error_maps
        rows = sum(write < moment for write in (*range(2, 16), *range(17, 24)))  # the floors are the 16th write
        assert Replaying.count - before == 21 - rows, moment


def test_an_audit_killed_again_and_again_goes_on_to_the_same_rows(
    tmp_path: Path, whole: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = 0
    while True:
        with monkeypatch.context() as patch:
            killed_at(patch, 4, 0.5)  # the third row, in its middle
            try:
                audit(tmp_path / "out")
            except Killed:
                kills += 1
            else:
                break
        if kills > 11:  # only the four files in order are left to write
            audit(tmp_path / "out")
            break
    assert kills == 12
    assert without_times(tmp_path / "out") == whole


def test_a_finished_audit_is_only_reported_anew(tmp_path: Path) -> None:
    first = audit(tmp_path / "out")
    before = Replaying.count
    said: list[str] = []
    second = audit(tmp_path / "out", said, kl_limit=0.5)
    assert Replaying.count == before and len(said) == 1 and "the report is made anew (--fresh" in said[0]
    assert second.rows == first.rows and second.texts == first.texts and second.heads == first.heads
    assert second.recommendation.standard.kl_limit == 0.5
    assert second.meta.duration_s == pytest.approx(first.meta.duration_s)
    audit(tmp_path / "out", fresh=True)
    assert Replaying.count == before + 21


def test_another_audit_in_the_folder_is_replaced_and_named(
    tmp_path: Path, whole: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    audit(out, continuation=512)
    said: list[str] = []
    with monkeypatch.context() as patch:
        killed_at(patch, 3, 0)
        with pytest.raises(Killed):
            audit(out, said)
    audit(out)
    assert f"{str(out)!r} has another audit (another texts, continuation): its rows are removed" in said
    assert without_times(out) == whole


def test_rows_depend_on_what_texts_tasks_and_methods_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, prompts = tmp_path / "mine.txt", tmp_path / "asked.jsonl"
    text.write_text("once upon a time " * 200)
    line = {"prompt": "two and two is", "answer": "four"}
    prompts.write_text("\n".join([json.dumps(line)] * 32))
    given = {"texts": ("mixture-0", str(text)), "prompts": prompts, "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        killed_at(patch, 2, 0)  # what its rows depend on is written, which is enough
        with pytest.raises(Killed):
            audit(**given)
    text.write_text("twice upon a time " * 200)
    prompts.write_text("\n".join([json.dumps(line | {"answer": "five"})] * 32))
    monkeypatch.setattr(Replaying, "made", {})
    said: list[str] = []
    killed_at(monkeypatch, 1, 0)
    with pytest.raises(Killed):
        audit(said=said, **given)
    assert "(another texts, prompts)" in said[0]


def test_two_audits_do_not_share_a_folder(tmp_path: Path) -> None:
    tmp_path.joinpath("out").mkdir()
    with Journal(tmp_path / "out"), pytest.raises(ValueError, match=r"out' is in use by another process"):
        audit(tmp_path / "out")
    audit(tmp_path / "out")


def test_a_full_disk_keeps_the_rows_so_far(
    tmp_path: Path, whole: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real, count = files._write_all, 0

    def full(stream: Any, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == 5:
            real(stream, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(stream, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_all", full)
        with pytest.raises(ValueError, match=r"No space left.*\(4 of 21 measurements are kept: the same command"):
            audit(out)
    assert len((out / TEXTS).read_text().splitlines()) == 4 and (out / TEXTS).read_bytes().endswith(b"\n")
    said: list[str] = []
    audit(out, said)
    assert f"{str(out)!r} has 4 of 21 measurements: going on from there" in said
    assert without_times(out) == whole


def test_a_damaged_line_and_a_damaged_description_are_named(tmp_path: Path) -> None:
    audit(tmp_path / "out")
    rows = (tmp_path / "out" / ROWS).read_text()
    (tmp_path / "out" / ROWS).write_text(rows.replace("{", "", 1))
    with pytest.raises(ValueError, match=r"rows.jsonl' line 1 is not an audit row"):
        audit(tmp_path / "out")
    (tmp_path / "out/audit.json").write_text("{}")
    with pytest.raises(ValueError, match=r"audit.json': .*--fresh"):
        audit(tmp_path / "out")
    audit(tmp_path / "out", fresh=True)


def test_bad_input_leaves_the_rows_of_another_audit_alone(tmp_path: Path, whole: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="positions"):
        audit(tmp_path / "whole", contexts=(9000,))
    assert without_times(tmp_path / "whole") == whole


def test_floors_without_their_row_are_measured_again(tmp_path: Path, whole: dict[str, list[str]]) -> None:
    (tmp_path / "whole" / ROWS).write_text("")
    floors = (tmp_path / "whole" / FLOORS).read_text().splitlines(keepends=True)
    (tmp_path / "whole" / FLOORS).write_text("".join(floors[:-1]) + floors[-1][:40])
    audit(tmp_path / "whole")
    assert without_times(tmp_path / "whole") == whole


def test_texts_beyond_the_minutes_are_left_out_and_named_until_there_is_time(
    tmp_path: Path, whole: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, clocks = tmp_path / "out", []

    def clock(*given: Any) -> Clock:
        clocks.append(Clock(*given))
        return clocks[-1]

    def spend(total: int, text: str) -> None:
        if text.endswith("quant"):
            clocks[-1].minutes = 1e-9

    said: list[str] = []
    asked = small(out, minutes=1e9, continuation=512, texts=("mixture-0", "mixture-1"))
    with monkeypatch.context() as patch:
        patch.setattr("kvfloor.audit.run.Clock", clock)
        first = run(asked, spend, said.append)
    assert said[-1].startswith("7 settings on 2 texts of 576 tokens: about ")
    assert {row.text for row in first.texts} == {"mixture-0"} and first.rows == []
    assert first.meta.notes == (
        "Left out to stay within 0 s: mixture-1, 64 tokens of context, 512 scored; kv at 64 tokens, question after.",
    )
    again = run(asked, lambda total, text: None, said.append)
    assert again.meta.notes == first.meta.notes and again.texts == first.texts
    before = Replaying.count
    more = run(small(out, minutes=2e9, continuation=512), lambda total, text: None)
    assert Replaying.count == before + 14 and len(more.texts) == 14 and len(more.rows) == 7 and more.meta.notes == ()


def test_losers_stop_where_the_time_is_too_short_for_all_and_their_rows_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "has_room_for", lambda clock, tokens: tokens <= 2048)  # any one place
    limited = {"minutes": 1e9, "continuation": 512}
    first = run(small(tmp_path / "out", **limited), lambda total, text: None)
    read = {row.method: sum(one.method == row.method for one in first.texts) for row in first.texts}
    stopped = {setting for setting, count in read.items() if count == 1}
    assert stopped >= {"h2o@16", "window@16"} and read["exact"] == read["quant"] == 2
    assert {"exact", "quant"} <= {row.method for row in first.rows} <= set(read) - stopped
    assert "h2o@16 (1)" in first.meta.notes[-1] and "stopped early" in first.meta.notes[-1]
    verdicts = {one.setting: one.verdict for one in first.recommendation.judged}
    assert verdicts["window@16"] == "falls" and verdicts["quant"] != "falls"
    before = Replaying.count
    again = run(small(tmp_path / "out", **limited), lambda total, text: None)
    assert Replaying.count == before and again.texts == first.texts and again.meta.notes == first.meta.notes
    whole = run(small(tmp_path / "out", continuation=512), lambda total, text: None)
    assert Replaying.count == before + 21 - len(first.texts) - len(first.rows)
    assert len(whole.texts) == 14 and len(whole.rows) == 7 and whole.meta.notes == ()


def test_minutes_for_less_than_one_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--minutes 1e-06 is too short: one text of 576 tokens under 7 settings"):
        audit(tmp_path / "out", minutes=1e-6, continuation=512)
