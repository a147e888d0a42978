"""The report is one inert file: nothing runs, nothing is fetched, no text of the user's becomes markup."""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvfloor.audit.format import number_of_nats
from kvfloor.audit.heads import Head
from kvfloor.audit.meta import Meta
from kvfloor.audit.nats import divergence
from kvfloor.audit.recommend import Recommendation, recommend
from kvfloor.audit.rows import Row
from kvfloor.report.decision import decision_chart
from kvfloor.report.heatmap import heatmaps, ink
from kvfloor.report.html import page, render
from kvfloor.report.ladder import WORST, ladders
from kvfloor.report.marks import marks
from kvfloor.report.multiples import multiples
from tests.audit.made_up import text_row
from tests.report.conftest import synthetic_example, synthetic_maps

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</style><script>alert(1)</script>",
    "'\"><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "a\u202eb\u2066c",
    "\x1b[31mred\x07",
    "&lt;b&gt;",
    "x" * 3000,
    "--><iframe src=//example.org>",
    "\ud800 lone surrogate",
]


class Shape(HTMLParser):
    """Counts tags; remembers attributes and the text of style elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]


def shape(text: str) -> Shape:
    parser = Shape()
    parser.feed(text)
    return parser


@pytest.fixture(scope="session")
def few(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.task in ("recall", "words")]


def hostile_page(rows: list[Row], meta: Meta, poison: str) -> str:
    bad = [
        replace(
            row,
            task=row.task + poison,
            method=row.method if row.method == "exact" else row.method + poison,
            configuration=row.configuration + poison,
            name=row.name + poison,
            budget=None if row.budget is None else row.budget + poison,
        )
        for row in rows
    ]
    notes = tuple(note + poison for note in meta.notes)
    dirty = replace(
        meta,
        model=poison,
        command=poison,
        machine=poison,
        notes=notes,
        versions={poison: poison},
        hashes={poison: poison},
    )
    texts = [
        replace(
            row,
            text=row.text + poison,
            method=row.method if row.method == "exact" else row.method + poison,
            configuration=row.configuration + poison,
        )
        for row in (text_row("exact"), text_row("h2o@64"))
    ]
    closer = {"error_maps": synthetic_maps(poison), "examples": [synthetic_example(poison)]}
    return page(bad, recommend(bad), dirty) + page([], recommend([], texts=texts), dirty, texts=texts, **closer)


@pytest.mark.parametrize("poison", HOSTILE, ids=range(len(HOSTILE)))
def test_no_field_becomes_markup(few: list[Row], meta: Meta, poison: str) -> None:
    harmless = shape(hostile_page(few, meta, "harmless"))
    found = shape(hostile_page(few, meta, poison))
    assert found.tags == harmless.tags
    assert [name for name, _ in found.attributes] == [name for name, _ in harmless.attributes]


def test_nothing_runs_and_nothing_is_fetched(few: list[Row], meta: Meta) -> None:
    text = page(few, recommend(few), meta)
    found = shape(text)
    assert not set(found.tags) & {"script", "iframe", "object", "embed", "form"}
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not re.search(r"(?:href|src|url)\s*[=(]\s*[\"']?(?:https?:)?//", text)
    policy = next(value for name, value in found.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_a_planted_script_would_be_noticed(few: list[Row], meta: Meta) -> None:
    text = page(few, recommend(few), meta).replace("</body>", "<script>1</script></body>")
    assert "script" in shape(text).tags


def test_byte_figures_are_the_rows(few: list[Row], meta: Meta) -> None:
    text = html.unescape(page(few, recommend(few), meta))
    for row in few:
        for size in (row.state_bytes, row.peak_state_bytes, row.exact_bytes, row.floor_bytes):
            assert f"{size:,}" in text


def test_the_floor_says_what_it_is(few: list[Row], meta: Meta) -> None:
    text = html.unescape(page(few, recommend(few), meta))
    assert "worst case over keys" in text and "attention as a data structure" in text
    assert "impossible" not in text.lower()


def test_a_point_below_the_floor_is_annotated(few: list[Row], meta: Meta) -> None:
    low = [replace(row, state_bytes=row.floor_bytes // 2) if row.method == "window@64" else row for row in few]
    note = "below the worst-case floor"
    plain, noted = (html.unescape(page(rows, recommend(rows), meta)) for rows in (few, low))
    assert noted.count(note) > plain.count(note)


def test_the_line_to_paste_is_the_recommendation(few: list[Row], meta: Meta) -> None:
    answer = recommend(few)
    assert answer.method is not None
    text = html.unescape(page(few, answer, meta))
    assert f'CompressedCache(model, "{answer.method}")' in text


def test_no_safe_setting_leaves_nothing_to_paste(few: list[Row], meta: Meta) -> None:
    rows = [row for row in few if "quant" not in row.method and "@1024" not in row.method]
    answer = recommend(rows)
    assert answer.method is None
    text = html.unescape(page(rows, answer, meta))
    assert "No setting here is safe" in text and "CompressedCache(model.config" not in text


def test_the_same_rows_give_the_same_page(few: list[Row], meta: Meta, tmp_path: Path) -> None:
    answer: Recommendation = recommend(few)
    render(few, answer, meta, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(few, answer, meta)


def test_nothing_to_report_is_refused(meta: Meta, answer: Recommendation) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        page([], answer, meta)


def test_every_setting_is_drawn_at_its_bytes_and_score(few: list[Row], meta: Meta) -> None:
    cell = [row for row in few if row.cell == few[0].cell]
    figure = decision_chart(cell, marks(cell))
    drawn = {(one.x, one.y, one.interval) for series in figure.series for one in series.data}
    assert drawn == {(row.state_bytes, row.score, (row.score_low, row.score_high)) for row in cell}
    assert [rule.x for rule in figure.rules] == [cell[0].floor_bytes, cell[0].token_id_bytes]
    text = page(cell, recommend(cell), meta)
    for series in figure.series:
        for one in series.data:
            assert f"translate({figure.x(one)} {figure.up.place(one.y)})" in text


def measured_heads(count: int) -> list[Head]:
    floors = [1000 + 37 * index % 101 * 50 for index in range(count)]
    return [
        Head(index // 3, index % 3, 0.5, size, size // 2, 65536, None, None, None, False)
        for index, size in enumerate(floors)
    ]


def test_all_but_the_heads_of_the_largest_floors_are_folded(few: list[Row], meta: Meta) -> None:
    heads = measured_heads(90)
    worst, others = ladders(heads)
    largest = sorted(heads, key=lambda one: one.floor_bytes)[-WORST:][::-1]
    assert [rung.name for rung in worst.rungs] == [f"layer {one.layer}, head {one.head}" for one in largest]
    assert [rung.name for rung in others.rungs] == [
        f"layer {one.layer}, head {one.head}" for one in heads if one not in largest
    ]
    assert worst.ticks == others.ticks
    text = page(few, recommend(few), meta, heads)
    folded = re.search(r"<details>\s*<summary>The other 80 heads</summary>.*?</details>", text, re.DOTALL)
    assert folded and folded[0].count("<title>layer") == 80 and text.count("<title>layer 29, head 2: floor") == 1
    few_heads = page(few, recommend(few), meta, heads[:WORST])
    assert "The other" not in few_heads and [len(one.rungs) for one in ladders(heads[:WORST])] == [WORST]


@pytest.mark.parametrize(
    ("model", "name"), [("/a/b/small/", "small"), ("org/small", "small"), ("C:\\a\\small", "small"), ("/", "/")]
)
def test_the_title_is_the_last_component_of_the_model(few: list[Row], meta: Meta, model: str, name: str) -> None:
    text = html.unescape(page(few, recommend(few), replace(meta, model=model)))
    assert f"<title>kvfloor audit of {name}</title>" in text and f"KV cache costs {name}</h1>" in text
    assert f"<dd>{model}</dd>" in text


def test_texts_alone_make_a_page(meta: Meta) -> None:
    texts = [text_row(one, text, nats=0.002, state_bytes=640) for one in ("exact", "h2o@64") for text in ("sea", "sky")]
    answer = recommend([], texts=texts)
    text = html.unescape(page([], answer, meta, texts=texts))
    assert answer.method == "h2o@64" and 'CompressedCache(model, "h2o@64")' in text
    assert "sea, sky: 256 tokens of context, 640 scored" in text and "Every setting on every task" not in text
    assert "exact, 16 bits, 1.95 KiB" in text and "floor, worst case, 300 B" in text
    (line,) = re.findall(r"<tr class=\"use\">.*?</tr>", text, re.S)
    found = divergence([row for row in texts if row.method == "h2o@64"])
    assert f">{number_of_nats(found.kl)} ✓<" in line and f"{100 * found.same_top:.1f} %" in line


def test_an_example_marks_the_first_token_that_differs_and_keeps_its_lines(meta: Meta) -> None:
    texts = [text_row(one, "sea", nats=0.002, state_bytes=640) for one in ("exact", "h2o@64")]
    one = replace(synthetic_example(), prompt_end="first line\nsecond <b>\x1b")
    text = page([], recommend([], texts=texts), meta, texts=texts, examples=[one])
    assert "<mark> four</mark> five" in text and text.count("<mark>") == 2  # one in the explanation
    assert "first line\nsecond &lt;b&gt;\\u001b" in text
    assert "The same as exact for 2 of 3 tokens." in text and "The same 3 tokens as exact." in text
    assert ">truth</p>" in text and "Example answers" not in page([], recommend([], texts=texts), meta, texts=texts)


def test_errors_on_a_text_are_drawn_at_the_models_own_layers(meta: Meta) -> None:
    texts = [text_row(one, "sea", nats=0.002, state_bytes=640) for one in ("exact", "h2o@64")]
    maps = synthetic_maps()
    first, _ = heatmaps(maps)
    assert [(one.layer, one.head, one.error) for one in first.tiles] == [
        (2 * layer + 1, head, (layer + head) / 100) for layer in range(30) for head in range(3)
    ]
    assert [one.column for one in first.tiles[::3]] == list(range(30)) and first.overall == maps[0].output_error
    assert first.labels == tuple((column, 2 * column + 1) for column in range(0, 30, 5))
    text = page([], recommend([], texts=texts), meta, texts=texts, error_maps=maps)
    assert "layer 59, kv head 2: 0.31" in text and text.count('<rect class="tile"') == 180
    assert f'fill-opacity="{round(ink(0.31), 3)}"' in text
    assert "256 tokens of context, and the next 64 tokens" in text


def test_small_figures_share_their_axes_and_hold_every_row(few: list[Row], meta: Meta) -> None:
    drawn = multiples(few, marks(few))
    assert [one.title for one in drawn] == ["recall", "recall", "words", "words"]
    assert len({(one.across.low, one.across.high, one.up.high) for one in drawn}) == 1
    text = page(few, recommend(few), meta)
    for one, cell in zip(
        drawn, sorted({row.cell for row in few}, key=lambda c: (c.task, c.protocol != "visible")), strict=True
    ):
        rows = {(row.state_bytes, row.score, row.score_low, row.score_high) for row in few if row.cell == cell}
        points = [datum for series in one.series for datum in series.data]
        assert {(datum.x, datum.y, *datum.interval) for datum in (*points, one.exact)} == rows  # type: ignore[misc]
        for datum in points:
            assert f"translate({one.across.place(datum.x)} {one.up.place(datum.y)}) scale" in text


def test_the_page_says_how_to_reproduce_it(few: list[Row], meta: Meta) -> None:
    text = html.unescape(page(few, recommend(few), meta))
    part = text[text.index("How to reproduce it") :]
    assert meta.command in part and "ab" * 32 in part and "5.23.0" in part
