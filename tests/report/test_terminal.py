"""The terminal table shows every setting and cannot be steered by a name."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from kvfloor.audit.recommend import recommend
from kvfloor.audit.rows import Row
from kvfloor.report.terminal import print_report
from tests.audit.made_up import text_row
from tests.report.conftest import synthetic_example


def printed(rows: list[Row], width: int = 160) -> str:
    out = io.StringIO()
    print_report(rows, recommend(rows), Console(file=out, width=width, force_terminal=False))
    return out.getvalue()


def test_every_setting_and_the_recommendation_are_there(rows: list[Row]) -> None:
    some = [row for row in rows if row.task in ("recall", "words")]
    text = printed(some)
    assert all(row.method in text for row in some)
    assert f"Use: {recommend(some).method}" in text


def test_names_cannot_colour_or_steer_the_terminal(rows: list[Row]) -> None:
    some = [replace(row, task="re\x1b[31mcall\r[bold]x[/bold]") for row in rows if row.task == "recall"]
    text = printed(some)
    assert "\x1b" not in text and "\r" not in text and "[bold]" in text


def test_numbers_are_whole_at_eighty_columns(rows: list[Row]) -> None:
    tasks = ("recall", "passkey64", "vartrack", "registers")
    some = [replace(row, method=row.method.replace("(recent=32)", "")) for row in rows if row.task in tasks]
    assert "…" not in printed(some, width=80)


def test_texts_are_a_table_of_their_own_at_eighty_columns() -> None:
    settings = ("exact", "quant(bits=4)", "snapkv@1024")
    size = {"state_bytes": 12_900_000, "peak_state_bytes": 2**30, "exact_bytes": 45_700_000}
    texts = [text_row(setting, text, nats=0.0052, **size) for setting in settings for text in "ab"]
    out = io.StringIO()
    print_report([], recommend([], texts=texts), Console(file=out, width=80), texts)
    text = out.getvalue()
    assert "2 texts, 256 tokens of context, 640 scored" in text and "quant(bits=4)" in text
    assert "…" not in text and "No task was run" in text


def test_the_first_example_is_shown_in_brief() -> None:
    texts = [text_row(one, text, nats=0.0052) for one in ("exact", "h2o@64") for text in "ab"]
    out = io.StringIO()
    long = replace(synthetic_example(), prompt_end="word " * 40 + "last\x1b[31m\nline")
    print_report(
        [], recommend([], texts=texts), Console(file=out, width=100), texts, [long, synthetic_example("not shown")]
    )
    text = out.getvalue()
    assert "Example, sea after 256 tokens: …" in text and "last\\u001b[31m line" in text and "\x1b" not in text
    assert "exact: one two three" in text and "quant: the same 3 tokens" in text
    assert "h2o@64: the same for 2 of 3, then “four five”" in text and "not shown" not in text.partition("Example")[2]
