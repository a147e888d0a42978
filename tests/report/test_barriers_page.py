"""The page of `kvfloor break --out`: what it says is what was played, drawn where it belongs, and inert."""

import re
from dataclasses import replace

import pytest

from kvfloor.game import BARRIERS, Result, play, play_all
from kvfloor.report import barriers, chart
from kvfloor.report.chart import Axis, Chart, Rule
from kvfloor.report.marks import nth_mark

SMALL = {"n": 64, "d": 32, "dv": 16, "isolated": False, "hidden_seed": 5}


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return play_all("window(block=1)@16", **SMALL)


@pytest.fixture(scope="module")
def text(results: list[Result]) -> str:
    return barriers.page(results, "kvfloor break <b>window</b>")


def test_every_game_is_a_line_with_its_numbers(results: list[Result], text: str) -> None:
    assert [result.barrier for result in results] == list(BARRIERS)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in re.findall(r"<tr><td>.*?</tr>", text)]
    for result, line in zip(results, cells, strict=True):
        assert line[:2] == [result.barrier, result.verdict]
        assert line[3:8] == [
            f"{size:,.0f}"
            for size in (
                result.hidden_bits,
                result.certified_bits,
                result.floor_bits,
                8 * result.message_bytes,
                8 * result.state_bytes,
            )
        ]


def test_the_page_is_inert_and_escapes_what_it_is_given(text: str) -> None:
    assert "kvfloor break &lt;b&gt;window&lt;/b&gt;" in text
    assert not re.search(r"<(script|iframe|img|object)\b|https?://|javascript:", text)
    assert "default-src 'none'" in text


def test_each_swept_barrier_has_its_figure(results: list[Result]) -> None:
    titles = [one.title for one in barriers.plots(results)]
    assert [title.rpartition("(")[2] for title in titles] == ["spike)", "packing)", "probing)"]
    assert barriers.plots([result for result in results if result.barrier == "window"]) == []


def test_the_precision_curve_never_rises_above_what_was_hidden(results: list[Result]) -> None:
    figure = barriers.plots([results[0]])[0]
    hidden, certified = ([(one.x, one.y) for one in line.data] for line in figure.series)
    assert all(found <= there for (_, found), (_, there) in zip(certified, hidden, strict=True))
    assert [bits for bits, _ in certified] == [bits for bits, _ in hidden]


def test_the_worst_verdict_is_the_headline(results: list[Result], text: str) -> None:
    assert "<h2>Breaks</h2>" in text
    held = [replace(result, verdict="holds", barrier="window", details={}) for result in results[:1]]
    assert "Holds every instance played" in barriers.page(held, "x")
    cheated = [*held, replace(held[0], verdict="cheats", why="it was planted")]
    assert "<h2>Cheats</h2>" in barriers.page(cheated, "x") and "it was planted" in barriers.page(cheated, "x")


def test_no_result_is_refused() -> None:
    with pytest.raises(ValueError, match="play at least one barrier"):
        barriers.page([], "x")


def places(figure: Chart) -> list[tuple[float, float]]:
    return [(figure.x(one), figure.up.place(one.y)) for line in figure.series for one in line.data]


def test_points_stand_where_their_numbers_are() -> None:
    series = [chart.line(nth_mark(0, "a"), [(1.0, 4.0), (16.0, 64.0)])]
    figure = chart.line_chart("t", "x", "y", series, log_x=True, log_y=True)
    assert places(figure) == [(chart.LEFT, chart.BOTTOM), (chart.RIGHT, chart.TOP)]
    assert [words for _, words in figure.across.ticks()] == ["1", "2", "4", "8", "16"]
    series = [chart.line(nth_mark(0, "a"), [(0.0, 0.0), (5.0, 1.0), (10.0, 2.0)])]
    middle = places(chart.line_chart("t", "x", "y", series))[1]
    assert middle == ((chart.LEFT + chart.RIGHT) / 2, (chart.TOP + chart.BOTTOM) / 2)
    flat = chart.line_chart("t", "x", "y", [chart.line(nth_mark(0, "a"), [(3.0, 0.0)])])
    assert all(chart.LEFT <= x <= chart.RIGHT for x, _ in places(flat))


def test_what_a_logarithmic_axis_cannot_place_stands_at_its_lower_end() -> None:
    axis = Axis([0.0, 4.0, 16.0], 0.0, 100.0, log=True)
    assert [axis.place(value) for value in (0.0, 4.0, 8.0, 16.0)] == [0.0, 0.0, 50.0, 100.0]


def test_words_beside_a_line_stay_within_the_figure() -> None:
    axis = Axis([0.0, 1.0], chart.LEFT, chart.RIGHT)
    figure = Chart("t", "t", "x", axis, axis, ())
    sides = [figure.side(Rule(x, ("x" * 31,), "floor", 24)) for x in (0.0, 0.25, 0.75, 1.0)]
    assert sides == ["start", "start", "end", "end"]


def test_arguments_that_no_barrier_takes_are_named() -> None:
    with pytest.raises(ValueError, match=r"no barrier takes colour; they take .*window"):
        play_all("exact", colour=1)
    with pytest.raises(ValueError, match="barrier 'spike' takes no window; it takes n, d"):
        play("exact", window=3)
    clamped = BARRIERS["tensor"].most
    assert clamped == 1024
