"""A race spends an audit's minutes where they decide, and its claims keep the stated error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from kvfloor.audit.grid import EXACT, AnyRow, Grid, Pair
from kvfloor.audit.nats import FIRST_LOOK, TextCell, TextRow, looks, summaries
from kvfloor.audit.race import Race, close_calls, race
from kvfloor.audit.recommend import recommend
from kvfloor.audit.rows import Cell
from kvfloor.audit.texts import further_excerpts
from tests.audit.made_up import text_row

SCORED = 1024
FIRST = [TextCell(name, 256, SCORED) for name in ("a", "b", "c")]
FURTHER = [TextCell(f"{name} (2)", 256, SCORED) for name in ("a", "b", "c")]
TASK = Cell("recall", 512, "after")
NATS = {EXACT: 0.0, "quant": 0.004, "h2o@64": 0.0095, "h2o@32": 0.2, "sinks@64": 0.2, "random@64": 0.9}
BYTES = {EXACT: 4000, "quant": 1500, "h2o@64": 1200, "h2o@32": 600, "sinks@64": 1200, "random@64": 1200}


def started(*cells: Cell) -> Race:
    configurations = {setting.partition("@")[0] for setting in NATS}
    found = race(Grid((*FIRST, *cells), tuple(NATS), tuple(FURTHER)), configurations, 0.01, 0.5)
    found.hurry()
    return found


def measured(pair: Pair) -> TextRow:
    place, setting = pair
    assert isinstance(place, TextCell)
    seed = [*NATS].index(setting) + 100 * [*FIRST, *FURTHER].index(place)
    return text_row(setting, place.text, seed, SCORED, NATS[setting], state_bytes=BYTES[setting], peak_state_bytes=5000)


def ran(one: Race, make: Callable[[Pair], AnyRow] = measured) -> dict[Pair, AnyRow]:
    """Measure what a race asks for, until it asks for nothing more."""
    rows: dict[Pair, AnyRow] = {}
    while left := [pair for pair in one(rows) if pair not in rows]:
        rows[left[0]] = make(left[0])
    return rows


def read(rows: Iterable[Pair], setting: str) -> list[str]:
    return [place.text for place, one in rows if one == setting and isinstance(place, TextCell)]


def test_losers_stop_after_their_first_text_and_run_no_task(row) -> None:
    assert all(read(ran(started()), setting) == ["a"] for setting in ("h2o@32", "sinks@64", "random@64"))

    def make(pair: Pair) -> AnyRow:
        return row(pair[1], right=35, exact_right=35) if pair[0] == TASK else measured(pair)

    rows = ran(started(TASK), make)
    assert [setting for place, setting in rows if place == TASK] == [EXACT, "quant", "h2o@64"]
    assert "a (2)" in read(rows, "h2o@64")  # after the task


def test_where_there_is_time_nobody_stops_before_the_texts_are_read() -> None:
    one = started()
    one.hurried = False
    rows = ran(one)
    assert all(read(rows, setting) == ["a", "b", "c"] for setting in ("h2o@32", "sinks@64", "random@64", "quant"))
    assert "a (2)" in read(rows, "h2o@64") and "stopped" not in one.note(rows)


def test_a_cell_that_exact_cannot_do_has_its_row_alone_and_does_not_end_the_race(row) -> None:
    def make(pair: Pair) -> AnyRow:
        return row(pair[1], right=2, exact_right=2) if pair[0] == TASK else measured(pair)

    rows = ran(started(TASK), make)
    assert [setting for place, setting in rows if place == TASK] == [EXACT]
    assert "a (2)" in read(rows, "h2o@64")


def test_close_calls_alone_read_further_passages() -> None:
    one = started()
    rows = ran(one)
    assert read(rows, "quant") == ["a", "b", "c"]  # safe after the first passages
    assert read(rows, "h2o@64")[:4] == ["a", "b", "c", "a (2)"]  # open, and smaller than the safe setting
    assert read(rows, EXACT) == read(rows, "h2o@64")
    told = one.note(rows)
    assert told.startswith("Of 3 texts, with the number read: h2o@32 (1), sinks@64 (1), random@64 (1) stopped early")
    assert f"h2o@64 ({len(read(rows, 'h2o@64'))}) read further passages" in told


def test_a_call_that_cannot_change_the_recommendation_is_not_close() -> None:
    def larger(pair: Pair) -> TextRow:  # h2o@64 has more bytes than the safe setting
        size = 1800 if pair[1] == "h2o@64" else BYTES[pair[1]]
        place = pair[0]
        assert isinstance(place, TextCell)
        return text_row(pair[1], place.text, 7, SCORED, NATS[pair[1]], state_bytes=size, peak_state_bytes=5000)

    rows = ran(started(), larger)
    assert {place.text for place, _ in rows if isinstance(place, TextCell)} == {"a", "b", "c"}
    assert started().note(rows).endswith("certainly exceeds the limit.")


def test_a_larger_budget_is_read_on_for_a_smaller_one_that_needs_it() -> None:
    sizes = {"quant": 1500, "h2o@128": 1800, "h2o@64": 1200, "h2o@32": 600}
    nats = {"quant": 0.004, "h2o@128": 0.0095, "h2o@64": 0.0096, "h2o@32": 0.2}
    rows = [text_row(EXACT, cell.text, scored=SCORED) for cell in FIRST]
    for i, setting in enumerate(sizes):
        rows += [text_row(setting, c.text, i, SCORED, nats[setting], state_bytes=sizes[setting]) for c in FIRST]
    standard = started().standard
    assert close_calls(rows, standard) == ["h2o@128", "h2o@64"]
    large = [text_row("h2o@128", cell.text, 1, SCORED, 0.2, state_bytes=1800) for cell in FIRST]
    fallen = [row for row in rows if row.method != "h2o@128"] + large
    assert close_calls(fallen, standard) == []  # nothing below a budget that falls can be recommended


def test_decisions_follow_from_the_rows_before_them() -> None:
    one = started()
    rows = ran(one)
    order = [pair for pair in one(rows) if pair in rows]
    assert started()(rows) == order
    for count, pair in enumerate(order):  # as after a kill, with the rows before this one only
        some = {known: rows[known] for known in order[:count]}
        left = [other for other in started()(some) if other not in some]
        here = [other for other in order[count:] if other[0] == pair[0]]
        assert [other for other in left if other[0] == pair[0]] == here


def test_a_stopped_setting_is_judged_and_one_without_its_tasks_is_never_safe(row) -> None:
    rows = ran(started())
    texts = [one for one in rows.values() if isinstance(one, TextRow)]
    found = recommend([], texts=texts, racing=True)
    verdicts = {one.setting: one.verdict for one in found.judged}
    assert verdicts == {"h2o@32": "falls", "h2o@64": "open", "sinks@64": "falls", "quant": "holds"}
    read_all = recommend([], texts=texts).judged  # without a race, each must have read every text that exact read
    assert [one.setting for one in read_all] == ["h2o@64"]
    tasks = [row("exact", right=40, size=4000, task="recall")]
    found = recommend(tasks, texts=texts, racing=True)
    assert {one.verdict for one in found.judged} == {"falls", "open"}


def test_intervals_allow_for_the_looks() -> None:
    texts = [text_row("h2o@64", name, i, SCORED, 0.005) for i, name in enumerate("abcd")]
    assert [looks(texts[:n]) for n in (1, 2, 3, 4)] == [1, 1, 2, 3]
    assert SCORED // 64 * 2 == FIRST_LOOK
    narrow, wide = summaries(texts)[0].figures, summaries(texts, racing=True)[0].figures
    assert wide.kl_low < narrow.kl_low < narrow.kl == wide.kl < narrow.kl_high < wide.kl_high


@pytest.mark.parametrize("shape", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_a_setting_at_the_limit_is_seldom_called_safe_at_any_look(shape: float) -> None:
    """The blocks' means are those of gamma variables of mean 0.01: skewed, as measured ones are."""
    standard, runs, wrong = started().standard, 60, 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        blocks = np.repeat(rng.gamma(shape * 4, 0.01 / (shape * 4), (6, 16)), 64, axis=1).tolist()
        made = [text_row("h2o@64", str(i), scored=SCORED, kl=tuple(kl)) for i, kl in enumerate(blocks)]
        wrong += any(standard.judge_texts(made[: n + 1])[1] != "open" for n in range(6))
    assert wrong <= 0.05 * runs


def test_further_passages_follow_the_first_and_begin_alike(tmp_path: Path) -> None:
    for name, count in (("one", 100), ("two", 70)):
        (tmp_path / f"{name}.txt").write_text(" ".join(map(str, range(count))))

    def encode(text: str) -> list[int]:
        return [-1, *map(int, text.split())]

    names = [str(tmp_path / "one.txt"), "mixture-0", str(tmp_path / "two.txt")]
    found = further_excerpts(names, [10, 20], 12, encode)
    assert [(one.cell.text, one.cell.context) for one in found] == [
        *(("one (2)", 10), ("one (2)", 20), ("two (2)", 10), ("two (2)", 20), ("one (3)", 10), ("one (3)", 20)),
    ]
    assert found[0].context == [-1, *range(32, 41)] and found[0].continuation == list(range(41, 53))
    assert found[1].context == [-1, *range(32, 51)] and found[1].continuation == list(range(51, 63))
    assert found[4].context[:2] == [-1, 64]
