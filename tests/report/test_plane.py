"""Bytes against error: every setting a point, the floor a line that is never above the floor of `space`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvfloor import floors
from kvfloor.audit.meta import Meta
from kvfloor.audit.recommend import recommend
from kvfloor.audit.rows import Row
from kvfloor.report.html import page
from kvfloor.report.marks import marks
from kvfloor.report.plane import LEAST, MOST, floor_at, planes
from tests.audit.made_up import text_row
from tests.report.conftest import synthetic_maps


@pytest.mark.parametrize(("n", "d", "dv", "heads"), [(64, 16, 16, 2), (1024, 64, 64, 3), (4096, 128, 8, 8)])
@pytest.mark.parametrize("eta", [0.001, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_the_line_is_at_most_the_floor_at_its_error_and_close_to_it(n, d, dv, heads, eta):
    single = floors.space(n, d, dv, heads=heads, values="binary").bits / 8
    for values in ("fp16", "bf16"):
        floor = floors.space(n, d, dv, heads=heads, eta=eta, values=values).bits / 8
        assert floor_at(single, eta) <= floor
    fp16 = floors.space(n, d, dv, heads=heads, eta=eta).bits / 8
    assert floor_at(single, eta) > (0.99 if dv == 64 else 0.93) * fp16


def test_the_line_of_a_figure_falls_with_the_error(rows: list[Row]) -> None:
    (figure,) = planes(rows, [], [], marks(rows))
    line = figure.series[0].data
    assert (line[0].x, line[-1].x) == pytest.approx((LEAST, MOST))
    assert [one.y for one in line] == sorted((one.y for one in line), reverse=True)
    assert line[0].y > 2 * line[-1].y > 2 * rows[0].floor_bytes
    assert figure.level is not None and figure.level.y == rows[0].exact_bytes


def test_every_setting_is_a_point_of_its_mean_error_and_bytes(rows: list[Row]) -> None:
    (figure,) = planes(rows, [], [], marks(rows))
    points = {one.words.split(":")[0]: one for series in figure.series[1:] for one in series.data}
    assert set(points) == {row.method for row in rows} - {"exact"}
    for name, one in points.items():
        mine = [row for row in rows if row.method == name]
        assert one.x == pytest.approx(max(LEAST, sum(row.output_error for row in mine) / len(mine)))
        assert one.y == pytest.approx(sum(row.state_bytes for row in mine) / len(mine))


def test_rows_without_errors_and_shorter_contexts_are_left_out(rows: list[Row]) -> None:
    later = [replace(row, output_error=0.0, output_error_by_layer=(), output_error_by_head=()) for row in rows]
    assert planes(later, [], [], marks(rows)) == []
    short = [replace(row, context=row.context // 2, output_error=9.0) for row in rows]
    assert planes([*rows, *short], [], [], marks(rows))[0].series == planes(rows, [], [], marks(rows))[0].series


def test_a_text_has_a_figure_of_its_own(meta: Meta) -> None:
    texts = [text_row(name, "sea") for name in ("exact", "h2o@64", "quant")]
    maps = synthetic_maps()
    (figure,) = planes([], texts, maps, marks(texts))
    assert figure.title.startswith("sea")
    assert [one.x for series in figure.series[1:] for one in series.data] == [maps[0].output_error] * 2
    shown = page([], recommend([], texts=texts), meta, texts=texts, error_maps=maps)
    assert "Bytes against error" in shown and "floor at this relative error" in shown
