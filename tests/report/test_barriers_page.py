"""The page of `kvfloor break --out`: what it says is what was played, drawn where it belongs, and inert."""

import re
from dataclasses import replace

import pytest

from kvfloor.game import BARRIERS, Result, play, play_all
from kvfloor.report import barriers, plot
from kvfloor.report.plot import Series

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
    hidden, certified = (curve.series.points for curve in figure.curves)
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


def test_points_stand_where_their_numbers_are() -> None:
    figure = plot.plot("t", "x", "y", [Series("a", [(1.0, 4.0), (16.0, 64.0)], "s0")], log_x=True, log_y=True)
    low, high = figure.curves[0].spots
    assert (low.x, low.y, high.x, high.y) == (plot.LEFT, plot.BOTTOM, plot.RIGHT, plot.TOP)
    assert [words for _, words in figure.x_ticks] == ["1", "2", "4", "8", "16"]
    middle = plot.plot("t", "x", "y", [Series("a", [(0.0, 0.0), (5.0, 1.0), (10.0, 2.0)], "s0")]).curves[0].spots[1]
    assert (middle.x, middle.y) == ((plot.LEFT + plot.RIGHT) / 2, (plot.TOP + plot.BOTTOM) / 2)
    flat = plot.plot("t", "x", "y", [Series("a", [(3.0, 0.0)], "s0")])
    assert all(plot.LEFT <= spot.x <= plot.RIGHT for curve in flat.curves for spot in curve.spots)


def test_arguments_that_no_barrier_takes_are_named() -> None:
    with pytest.raises(ValueError, match=r"no barrier takes colour; they take .*window"):
        play_all("exact", colour=1)
    with pytest.raises(ValueError, match="barrier 'spike' takes no window; it takes n, d"):
        play("exact", window=3)
    clamped = BARRIERS["tensor"].most
    assert clamped == 1024
