"""A race of tasks: who is asked for further samples, in which order, and that a stopped one goes on alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvfloor.audit import engine
from kvfloor.audit.clock import Clock
from kvfloor.audit.grid import EXACT, AnyRow, Grid, Pair, Place
from kvfloor.audit.journal import ROWS, Measured
from kvfloor.audit.limits import left_out
from kvfloor.audit.nats import TextCell, TextRow
from kvfloor.audit.race import Race, race
from kvfloor.audit.recommend import recommend
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.rounds import MOST_ROUNDS, joined
from kvfloor.audit.rows import Cell, Row
from kvfloor.audit.run import run
from kvfloor.audit.worker import Worker, in_turns
from kvfloor.models.load import find
from tests.audit.made_up import task_row, text_row
from tests.audit.replaying import Replaying, without_times

KV, RECALL = Cell("kv", 512, "after"), Cell("recall", 512, "after")
SIZES = {EXACT: 10_000, "quant": 5000, "h2o@128": 3000, "h2o@64": 2000, "window@64": 2000, "random@64": 2000}
TEXTS = [TextCell(name, 256, 1024) for name in "ab"]


def rounds(*cells: Cell) -> tuple[Place, ...]:
    return in_turns([], [cell._replace(round=i) for i in range(2, MOST_ROUNDS + 1) for cell in cells])


def started(*places: Place, hurried: bool = False, settings: Iterable[str] = SIZES) -> Race:
    cells = [place for place in places if isinstance(place, Cell)]
    grid = Grid(places, tuple(settings), rounds(*cells))
    found = race(grid, {setting.partition("@")[0] for setting in settings}, 0.01, 0.5)
    found.hurried = hurried
    return found


def maker(losses: dict[tuple[str, str], int], nats: dict[str, float] | None = None) -> Callable[[Pair], AnyRow]:
    """Return a function that makes rows: `losses` has answers lost in each round, by setting and task; else none."""

    def make(pair: Pair) -> AnyRow:
        place, setting = pair
        if isinstance(place, TextCell):
            far = 0.0 if setting == EXACT else (nats or {}).get(setting, 0.2)
            seed = [*SIZES].index(setting) + 10 * [*TEXTS].index(place)
            size = SIZES[setting]
            return text_row(
                setting, place.text, seed, 1024, far, state_bytes=size, peak_state_bytes=size, exact_bytes=10_000
            )
        lost = losses.get((setting, place.task), 0)
        return task_row(setting, lost, task=place.task, number=place.round, size=SIZES[setting])

    return make


def ran(one: Race, make: Callable[[Pair], AnyRow]) -> dict[Pair, AnyRow]:
    """Measure what a race asks for, until it asks for nothing more; it never asks for one thing twice."""
    rows: dict[Pair, AnyRow] = {}
    while left := [pair for pair in one(rows) if pair not in rows]:
        assert len(set(one(rows))) == len(one(rows))
        assert left[0][1] == EXACT or (left[0][0], EXACT) in rows
        rows[left[0]] = make(left[0])
    return rows


def had(rows: Iterable[Pair], setting: str, task: str = "kv") -> list[int]:
    return [at.round for at, one in rows if one == setting and isinstance(at, Cell) and at.task == task]


LOSSES = {("h2o@128", "kv"): 1, ("h2o@64", "kv"): 2, ("window@64", "kv"): 30, ("random@64", "kv"): 30}


def test_close_calls_alone_have_further_samples_until_they_are_settled() -> None:
    """With 3 methods judged, 1 or 2 of 40 lost answers leave a verdict open at first; 30 are a certain loss."""
    one = started(KV)
    rows = ran(one, maker(LOSSES))
    assert had(rows, "quant") == [1]  # it holds at once
    assert had(rows, "window@64") == had(rows, "random@64") == [1]
    small, large = had(rows, "h2o@64"), had(rows, "h2o@128")
    assert large == [1, 2] and len(small) > 2 and small == list(range(1, len(small) + 1))
    assert had(rows, EXACT) == small
    found = recommend(joined([row for row in rows.values() if isinstance(row, Row)], True), racing=True)
    assert found.method == "h2o@64" and {row.method: row.n for row in found.exact} == {EXACT: 40 * len(small)}
    told = "2 settings had further samples, as close calls, with the most rounds on a cell"
    assert one.note(rows) == f"{told}: h2o@128 (2), h2o@64 ({len(small)})."


def test_further_rounds_are_of_the_cells_in_doubt_only_and_in_the_order_of_their_numbers() -> None:
    losses = {("h2o@64", "kv"): 2, ("h2o@128", "recall"): 2, ("window@64", "kv"): 30, ("random@64", "kv"): 30}
    one = started(KV, RECALL)
    rows = ran(one, maker(losses))
    assert had(rows, "h2o@64", "recall") == had(rows, "h2o@128", "kv") == [1]
    assert had(rows, "h2o@64")[:3] == had(rows, "h2o@128", "recall")[:3] == [1, 2, 3]
    places = list(dict.fromkeys(at for at, _ in one(rows)))
    assert places[:6] == [KV, RECALL, *(cell._replace(round=i) for i in (2, 3) for cell in (KV, RECALL))]


def test_who_cannot_change_the_recommendation_has_no_further_samples() -> None:
    losses = {("quant", "kv"): 2, ("h2o@64", "kv"): 2, ("h2o@128", "kv"): 30, ("random@64", "kv"): 30}
    rows = ran(started(KV), maker(losses))  # window@64 holds with 2,000 bytes; h2o@64 is below a budget that falls
    assert all(had(rows, setting) == [1] for setting in SIZES)
    assert started(KV).note(rows) == ""


def test_a_hurried_race_stops_who_certainly_loses_on_a_cell() -> None:
    rows = ran(started(KV, RECALL, hurried=True), maker(LOSSES))
    assert had(rows, "window@64", "recall") == had(rows, "random@64", "recall") == []
    assert had(rows, "quant", "recall") == had(rows, "h2o@64", "recall") == had(rows, EXACT, "recall") == [1]
    note = started(KV, RECALL).note(rows)
    assert note.startswith(
        "Of 2 cells of the tasks, with the number run: window@64 (1), random@64 (1) stopped early, as a loss on a task"
    )
    rows = ran(started(KV, RECALL), maker(LOSSES))
    assert had(rows, "window@64", "recall") == [1]
    found = recommend(joined([row for row in rows.values() if isinstance(row, Row)], True), racing=True)
    assert {one.setting: one.verdict for one in found.judged}["window@64"] == "falls"


def test_a_setting_that_misses_a_cell_is_judged_but_not_safe() -> None:
    rows = [task_row(EXACT, size=10_000, task=task) for task in ("kv", "recall")] + [task_row("quant", task="kv")]
    found = recommend(joined(rows, True), racing=True)
    assert [(one.setting, one.verdict) for one in found.judged] == [("quant", "open")] and found.method is None
    assert recommend(rows).judged == ()


def test_the_bytes_of_settings_are_compared_on_the_places_that_all_have() -> None:
    """The larger budget stopped before a longer context: by its own mean it would seem the smaller one."""
    rows = [task_row(EXACT, size=10_000, task="kv"), task_row(EXACT, size=80_000, exact_bytes=80_000)]
    rows += [task_row("h2o@128", lost=30, size=3000, task="kv")]
    rows += [task_row("h2o@64", size=2000, task="kv"), task_row("h2o@64", size=16_000, exact_bytes=80_000)]
    found = recommend(joined(rows, True), racing=True)
    assert [(one.setting, one.state_bytes, one.believed) for one in found.judged] == [
        ("h2o@64", 2000, False),
        ("h2o@128", 3000, False),
    ]


def test_with_texts_a_loss_in_doubt_is_looked_at_again_and_no_gain_is() -> None:
    nats = {"quant": 0.0001, "h2o@128": 0.0001, "h2o@64": 0.0001}
    settings = (EXACT, "quant", "h2o@128", "h2o@64")

    def ended(lost: int, gained: int) -> dict[Pair, AnyRow]:
        plain = maker({}, nats)

        def make(pair: Pair) -> AnyRow:
            if pair[1] == "h2o@64" and isinstance(pair[0], Cell):
                return task_row("h2o@64", lost, gained, task="kv", number=pair[0].round, size=2000)
            if isinstance(pair[0], Cell):
                exact = [0] * gained + [1] * (40 - gained)
                return task_row(pair[1], task="kv", number=pair[0].round, outcomes=exact, exact_outcomes=exact)
            return plain(pair)

        return ran(started(*TEXTS, KV, settings=settings), make)

    def verdict(rows: dict[Pair, AnyRow]) -> str:
        tasks = joined([row for row in rows.values() if isinstance(row, Row)], True)
        texts = [row for row in rows.values() if isinstance(row, TextRow)]
        return {one.setting: one.verdict for one in recommend(tasks, texts=texts, racing=True).judged}["h2o@64"]

    lossy = ended(5, 0)  # the recommended setting itself: at first neither a certain loss nor none
    assert had(lossy, "h2o@64") == [1, 2] and verdict(lossy) == "falls"
    assert had(lossy, "h2o@128") == had(lossy, "quant") == [1]
    even = ended(6, 6)
    assert had(even, "h2o@64") == [1] and verdict(even) == "holds"


def test_further_passages_and_rounds_take_turns() -> None:
    class Passage:
        def __init__(self, name: str, passage: int) -> None:
            self.cell, self.passage = TextCell(f"{name} ({passage})", 256, 1024), passage

    passages = [Passage(name, i) for i in (2, 3) for name in "ab"]
    found = in_turns(passages, [cell._replace(round=i) for i in (2, 3) for cell in (KV, RECALL)])  # type: ignore[arg-type]
    assert [one.round if isinstance(one, Cell) else one.text for one in found] == [
        *("a (2)", "b (2)", 2, 2, "a (3)", "b (3)", 3, 3)
    ]


def test_a_race_that_was_stopped_anywhere_asks_for_the_same() -> None:
    losses = LOSSES | {("h2o@128", "recall"): 3}
    for hurried in (False, True):
        one = started(KV, RECALL, hurried=hurried)
        rows = ran(one, maker(losses))
        order = list(rows)
        assert [pair for pair in one(rows) if pair in rows] == order
        for count in range(len(order)):
            some = {known: rows[known] for known in order[:count]}
            again = started(KV, RECALL, hurried=hurried)
            left = [pair for pair in again(some) if pair not in some]
            assert left[0] == order[count]
        assert started(KV, RECALL, hurried=hurried)(rows) == order


def test_a_left_out_cell_has_no_further_rounds_and_a_later_round_leaves_none_out() -> None:
    def make(pair: Pair) -> AnyRow:
        place, setting = pair
        assert isinstance(place, Cell)
        bad = 30 if place == RECALL or (place.task == "kv" and place.round == 2) else 0  # exact is wrong there
        outcomes = [0] * bad + [1] * (40 - bad)
        lost = 0 if setting == EXACT or setting == "quant" else 2
        mine = [0] * bad + [1] * (40 - bad - lost) + [0] * lost
        return task_row(
            setting, task=place.task, number=place.round, size=SIZES[setting], outcomes=mine, exact_outcomes=outcomes
        )

    rows = ran(started(KV, RECALL), make)
    assert {setting for at, setting in rows if isinstance(at, Cell) and at.task == "recall"} == {EXACT}
    assert had(rows, EXACT, "recall") == [1] and had(rows, "h2o@64")[:3] == [1, 2, 3]
    assert list(left_out(rows, 0.5)) == [RECALL]


def test_which_audits_are_races() -> None:
    assert AuditRequest(texts=(), tasks=("kv",), minutes=1.0).racing
    assert AuditRequest(texts=("mixture-0",), tasks=(), minutes=1.0).racing
    assert not AuditRequest(texts=(), tasks=("kv",)).racing
    assert not AuditRequest(texts=(), prompts=Path("mine.jsonl"), minutes=1.0).racing


# ---- on the built-in model -------------------------------------------------------------------------------------------

ENOUGH = 1e9


def small(out: Path) -> AuditRequest:
    return AuditRequest(
        methods=("quant",),
        budgets=("48",),
        texts=(),
        tasks=("kv",),
        contexts=(112,),
        n=32,
        minutes=ENOUGH,
        out=out,
    )


class Stopped(BaseException):
    """Stand for the end of the process."""


class Kept(Replaying):
    """Replay measurements with the times that they had, so that whole rows can be compared."""

    def measure(self, place: Place, setting: str, exact: AnyRow | None) -> Measured:
        super().measure(place, setting, exact)
        return Replaying.kept[self._key, place, setting]


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each measurement of `small` once per test session, and replay it afterwards."""
    monkeypatch.setattr(engine, "Worker", Kept)


@pytest.mark.usefixtures("measured_once")
def test_a_close_call_has_a_second_round_and_a_stopped_audit_goes_on_to_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4 methods, 32 samples cannot exclude a loss of 15 points, so 8 and 4 bits need further ones."""
    whole = run(small(tmp_path / "whole"), lambda total, text: None)
    raw = [json.loads(line) for line in (tmp_path / "whole" / ROWS).read_text().splitlines()]
    counts = {row["method"]: row["n"] for row in whole.as_dict()["rows"]}
    rounds = {one: max(row["round"] for row in raw if row["method"] == one) for one in counts}
    assert rounds["quant(bits=4)"] == 2 and rounds["window@48"] == 1
    assert all(counts[one] == 32 * rounds[one] for one in counts) and counts["quant(bits=4)"] == 64
    assert {row["n"] for row in raw} == {32} and "quant(bits=4) (2)" in whole.meta.notes[-1]
    joined_row = next(row for row in whole.rows if row.method == "quant(bits=4)")
    mine = [row for row in raw if row["method"] == "quant(bits=4)"]
    assert list(joined_row.outcomes) == [one for row in mine for one in row["outcomes"]]
    assert mine[1]["output_error_by_head"] == [] and joined_row.output_error_by_head
    for count in (len(raw) - 1, len(raw) - 2, 3):
        left = count

        def stop(worker: Kept, place: Place, setting: str, exact: AnyRow | None, measure: Any = Kept.measure) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped
            return measure(worker, place, setting, exact)

        out = tmp_path / str(count)
        with monkeypatch.context() as patch:
            patch.setattr(Kept, "measure", stop)
            with pytest.raises(Stopped):
                run(small(out), lambda total, text: None)
        again = run(small(out), lambda total, text: None)
        assert without_times(out) == without_times(tmp_path / "whole") and again.rows == whole.rows


def test_the_samples_of_a_round_are_the_next_ones_and_are_drawn_for_by_their_own_numbers(tmp_path: Path) -> None:
    """Both settings' answers in two rounds of 32 samples are those to 64 samples at once; `random` draws per sample."""
    request, folder = replace(small(tmp_path), contexts=(80,)), find("builtin", False, lambda text: None)
    worker, wide = (Worker(replace(request, n=n), folder, lambda text: None) for n in (32, 64))
    first = worker.grid.places[0]
    assert isinstance(first, Cell)
    second = first._replace(round=2)
    assert worker.grid.further == tuple(first._replace(round=i) for i in range(2, MOST_ROUNDS + 1))
    assert worker.tokens(second) == worker.tokens(first) == 80 * 32

    def measured(by: Worker, place: Cell) -> tuple[Measured, Row, Row]:
        exact = by.measure(place, EXACT, None)
        other = by.measure(place, "random@48", exact.row).row
        assert isinstance(exact.row, Row) and isinstance(other, Row)
        return exact, exact.row, other

    (base, exact, one), (more, next_exact, two), (_, all_exact, both) = (
        measured(by, place) for by, place in ((worker, first), (worker, second), (wide, first))
    )
    assert all_exact.outcomes == exact.outcomes + next_exact.outcomes
    assert both.outcomes == one.outcomes + two.outcomes and 0 < sum(both.outcomes) < 64
    assert (both.gained, both.lost) == (one.gained + two.gained, one.lost + two.lost)
    assert two.floor_bytes == one.floor_bytes and two.state_bytes == pytest.approx(one.state_bytes, rel=0.02)
    assert base.floors and not more.floors and one.output_error > 0 and two.output_error_by_layer == ()


@pytest.mark.usefixtures("measured_once")
def test_a_round_that_does_not_fit_is_left_out_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "fits", lambda clock, name, tokens: name is not None)
    found = run(small(tmp_path), lambda total, text: None)
    assert {row.n for row in found.rows} == {32} and found.meta.notes == ()
