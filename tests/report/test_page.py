"""The report is one inert file: nothing runs, nothing is fetched, no text of the user's becomes markup."""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvfloor.audit.meta import Meta
from kvfloor.audit.recommend import Recommendation, recommend
from kvfloor.audit.rows import Row
from kvfloor.report.html import page, render

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
    dirty = replace(meta, model=poison, command=poison, machine=poison, notes=notes, versions={poison: poison})
    return page(bad, recommend(bad), dirty)


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
    assert f'CompressedCache(model.config, "{answer.method}")' in text


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
