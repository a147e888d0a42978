"""Hidden facts in an audit: measured like its other rows, decisive for nothing, and silent where the model cannot."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvfloor.audit import engine
from kvfloor.audit.clock import Clock
from kvfloor.audit.fact_rows import CHOICES, FactRow, FactSheet, SheetRow, fact_summaries, fact_summary
from kvfloor.audit.facts import Sheet, audited_sheets, fact_sheets, measure_facts, sheet_row
from kvfloor.audit.grid import AnyRow, Grid, Pair, pair_of
from kvfloor.audit.header import read_header
from kvfloor.audit.journal import FACTS
from kvfloor.audit.limits import Fixed, unreadable, unreadable_note
from kvfloor.audit.measure import CHUNK_SLOTS
from kvfloor.audit.merge import merge
from kvfloor.audit.nats import TextCell
from kvfloor.audit.race import race
from kvfloor.audit.recommend import recommend
from kvfloor.audit.records import read_records, write_records
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.run import Answer, measure_part, run
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.hf import prepare
from kvfloor.hf.intake import SharedPrompt
from kvfloor.methods.grammar import parse
from kvfloor.models import load
from kvfloor.report.html import page
from kvfloor.report.terminal import print_report
from tests.audit.made_up import text_row
from tests.audit.replaying import Replaying, small, without_times

CONTEXT, COUNT = 320, 20


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = load()
    return prepare(model), tokenizer


def made_row(method: str, right: int, facts: int = 32, sheet: int = 1, p: float = 1.0, **more: Any) -> SheetRow:
    """Return a row with `right` facts bet on with probability p, and nothing on the others."""
    hits = (1,) * right + (0,) * (facts - right)
    plain: dict[str, Any] = {"baseline": False, "cache_bytes": 1000, "cache_16_bit_bytes": 500, "token_id_bytes": 90}
    bets = tuple(p * hit for hit in hits)
    return SheetRow(method, context=512, facts=facts, sheet=sheet, bets=bets, right=hits, **plain | more)


def by_pair(*rows: AnyRow) -> dict[Pair, AnyRow]:
    return {pair_of(row): row for row in rows}


def asked(loaded: tuple[Any, Any], setting: str, sheet: Sheet) -> SheetRow:
    model, one = loaded[0], BudgetedMethod(parse(setting))
    return sheet_row(model, one, sheet, SharedPrompt(model, [sheet.prompt], CHUNK_SLOTS, [one.method]), 0, {})


def test_a_cache_that_holds_nothing_returns_guesses_and_certifies_nothing(loaded: tuple[Any, Any]) -> None:
    """The planted mutant: a cache of other prompts, full of facts, but not of those that are asked."""
    true = fact_sheets(loaded[1], CONTEXT, COUNT, 4, seed=3)
    others = fact_sheets(loaded[1], CONTEXT, COUNT, 4, seed=4)
    pairs = zip(true, others, strict=True)
    empty = fact_summary([asked(loaded, "exact", replace(one, prompt=two.prompt)) for one, two in pairs])
    whole = fact_summary([asked(loaded, "exact", one) for one in true])
    assert empty.right <= 4 and empty.facts == 80  # of 0.8; with probability 1 - 0.002 if they are guesses
    assert empty.certified_bits == 0 and empty.needed_bytes < 1
    assert whole.right >= 72 and whole.certified_bits > 0.7 * whole.hidden_bits


def hiding(out: Path, **changes: Any) -> AuditRequest:
    """Return a request for 7 settings on one cell and one sheet of facts."""
    return small(out, texts=(), facts=1, **changes)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answer, Path]:
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("facts")
    patch.setattr(engine, "Worker", Replaying)
    try:
        return run(hiding(out), lambda total, text: None), out
    finally:
        patch.undo()


def test_an_audit_has_the_facts_of_every_setting(audited: tuple[Answer, Path], loaded: tuple[Any, Any]) -> None:
    answer, out = audited
    header = read_header(out)
    assert header is not None and header.sheets == [FactSheet(64, 4, 1)]
    settings = [one.text for one in header.methods]
    assert [row.method for row in answer.facts] == settings
    alone = measure_facts(*loaded, settings, context=64, facts=4, sheets=1, seed=0)  # as `kvfloor facts` measures
    for one, other in zip(answer.facts, alone, strict=True):
        assert one.gain == pytest.approx(other.gain, abs=1e-3)
        assert (one.right, one.cache_bytes, one.token_id_bytes) == (
            other.right,
            other.cache_bytes,
            other.token_id_bytes,
        )
        assert one.most_facts == 8 * one.cache_bytes / math.log2(CHOICES)
    document = json.loads(json.dumps(answer.as_dict(), allow_nan=False))
    assert [row["right"] for row in document["facts"]] == [row.right for row in answer.facts]
    assert document["facts_note"] == "" and document["facts"][0]["most_facts_of_token_ids"] >= 4
    kept = read_records(out / FACTS, SheetRow, 2**20, FACTS, "a row")
    assert [row.method for row in kept] == settings


def shown(answer: Answer, facts: tuple[FactRow, ...], note: str = "") -> tuple[str, str]:
    html = page(answer.rows, answer.recommendation, answer.meta, texts=answer.texts, facts=facts, facts_note=note)
    console = Console(width=80, file=io.StringIO())
    print_report(answer.rows, answer.recommendation, console, answer.texts, (), facts, note)
    return html, console.file.getvalue()  # type: ignore[attr-defined]


def test_page_and_terminal_show_the_facts_and_hidden_memory(audited: tuple[Answer, Path]) -> None:
    answer, _ = audited
    html, text = shown(answer, answer.facts)
    row = answer.facts[-1]
    for told in ("Facts that come back", f"{row.right} of {row.facts}", f"{int(row.most_facts):,}"):
        assert told in html
    assert "hidden facts, 64 tokens" in text and f"{row.right} of {row.facts}" in text
    assert "keeps memory elsewhere" not in html + text
    cheat = fact_summaries([made_row("window@16", 32, sheet=i, cache_bytes=2) for i in (1, 2)])
    assert cheat[0].hides_memory
    for said in shown(answer, tuple(cheat)):
        assert "keeps memory elsewhere" in " ".join(said.split())
    none_html, none_text = shown(answer, ())
    assert "Facts that come back" not in none_html and "hidden facts" not in none_text


def test_a_stopped_audit_measures_only_the_facts_that_it_lacks(
    audited: tuple[Answer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(audited[1], tmp_path / "out")
    facts = tmp_path / "out" / FACTS
    whole = facts.read_text()
    facts.write_text(whole[: whole.rindex("{") + 40])  # killed while the last row was written
    monkeypatch.setattr(engine, "Worker", Replaying)
    before = Replaying.count
    answer = run(hiding(tmp_path / "out"), lambda total, text: None)
    assert Replaying.count == before + 1
    assert facts.read_text() == whole and list(answer.facts) == list(audited[0].facts)


@pytest.mark.parametrize("parts", [2, 5])
def test_merged_parts_have_the_facts_of_one_audit(
    audited: tuple[Answer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    monkeypatch.setattr(engine, "Worker", Replaying)
    folders = [tmp_path / str(i) for i in range(1, parts + 1)]
    for i, folder in enumerate(folders, 1):
        measure_part(hiding(folder, shard=(i, parts)), lambda total, text: None)
    found = merge(folders, tmp_path / "all")
    assert without_times(tmp_path / "all") == without_times(audited[1])
    assert found.facts == audited[0].facts
    last = folders[-1] / FACTS
    lines = last.read_text().splitlines()
    plain = json.loads(lines[-1])
    last.write_text("\n".join([*lines[:-1], json.dumps(plain | {"cache_bytes": plain["cache_bytes"] + 1})]) + "\n")
    others = folders[:-1]
    shutil.copytree(folders[-1], tmp_path / "copy")
    (tmp_path / "copy" / FACTS).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"different figures \(cache_bytes\) for h2o@16 on sheet 1 of 4 facts"):
        merge([*others, folders[-1], tmp_path / "copy"], tmp_path / "again")
    last.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"1 of 14 measurements are missing: h2o@16 on sheet 1 of 4 facts"):
        merge(folders, tmp_path / "again")


def test_the_table_of_nats_has_a_column_of_facts(audited: tuple[Answer, Path]) -> None:
    texts = [text_row(one, nats=0.002, state_bytes=640) for one in ("exact", "h2o@64")]
    answer, meta = recommend([], texts=texts), audited[0].meta
    facts = fact_summaries([made_row("exact", 30), made_row("exact", 31, sheet=2), made_row("h2o@64", 5)])
    html = page([], answer, meta, texts=texts, facts=facts)
    head, exact, h2o = html.split("Facts returned", 1)[1].split("<tr")[:3]
    assert ">61 of 64<" in exact and ">5 of 32<" in h2o and "61 of 64" not in head
    assert "Facts returned" not in page([], answer, meta, texts=texts)


def test_a_model_that_cannot_recall_is_said_to_be_unable(
    audited: tuple[Answer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(audited[1], tmp_path / "out")
    facts = tmp_path / "out" / FACTS
    exact = read_records(facts, SheetRow, 2**20, FACTS, "a row")[0]
    write_records(facts, [replace(exact, bets=(0.01,) * 4, right=(0,) * 4)])
    monkeypatch.setattr(Replaying, "measure", lambda *given: pytest.fail(f"another setting was asked: {given}"))
    monkeypatch.setattr(engine, "Worker", Replaying)
    answer = run(hiding(tmp_path / "out"), lambda total, text: None)
    assert not answer.facts and "It cannot do this task, whatever the cache" in answer.facts_note
    html, text = shown(answer, answer.facts, answer.facts_note)
    for said in (html, " ".join(text.split())):
        assert "returns 0 of 4 facts on 1 sheet" in said and said.count("0 of 4 ") == 1
    assert answer.as_dict()["facts"] == []


def test_guesses_are_told_from_recall() -> None:
    assert made_row("exact", 0).only_guesses and made_row("exact", 1).only_guesses
    assert not made_row("exact", 4).only_guesses
    weak = unreadable(by_pair(made_row("exact", 1)))
    assert list(weak) == [FactSheet(512, 32, 1)]
    assert "1 of 32 facts on 1 sheet" in unreadable_note(list(weak.values()))
    assert unreadable(by_pair(made_row("h2o@4", 0))) == {}  # only exact's row decides


def test_facts_stop_no_setting_of_a_race_and_come_before_further_passages() -> None:
    text, sheet, more = TextCell("a", 64, 256), FactSheet(64, 4, 1), TextCell("a (2)", 64, 256)
    grid = Grid((text, sheet), ("exact", "h2o@8"), (more,))
    chosen = race(grid, ["exact", "h2o"], 0.01)
    chosen.hurry()
    exact = replace(made_row("exact", 4, 4), context=64)
    lost = replace(made_row("h2o@8", 0, 4), context=64)
    rows = by_pair(exact, lost)
    assert chosen(rows) == [(text, "exact"), (text, "h2o@8"), (sheet, "exact"), (sheet, "h2o@8")]
    blind = by_pair(replace(lost, method="exact"))
    assert chosen(blind)[2:] == [(sheet, "exact")]
    assert Fixed(grid.pairs, 0.5)(blind)[2:] == [(sheet, "exact")]


def test_sheets_that_do_not_fit_into_the_minutes_are_left_out_by_name() -> None:
    clock = Clock(1.0, lambda text: None, per_token=10.0)
    assert not clock.fits(str(FactSheet(512, 32, 2)), 600)
    assert "sheet 2 of 32 facts, 512 tokens of context" in clock.note()[0]


def test_facts_can_be_left_out_and_are_bounded() -> None:
    assert AuditRequest().sheets == 2 and AuditRequest(facts=0).sheets == 0
    assert AuditRequest(texts=(), tasks=("kv",)).sheets == 0 and AuditRequest(texts=(), facts=3).sheets == 3
    for wrong in (-1, 101):
        with pytest.raises(ValueError, match="--facts must be"):
            AuditRequest(facts=wrong).check()


def test_sheets_follow_the_contexts_and_the_tokenizer(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    sheets, note = audited_sheets(tokenizer, (32, 64, 512, 1024), 2, 0)
    assert [(one.cell.context, one.cell.facts) for one in sheets[::2]] == [(64, 4), (512, 32), (1024, 32)]
    assert note == "" and all(len(one.prompt) <= one.cell.context for one in sheets)
    assert audited_sheets(tokenizer, (512,), 0, 0) == ([], "")

    class Coarse:
        """Give each word one token, and each number only its first digit."""

        def __call__(self, text: str, **more: Any) -> Any:
            return type("Ids", (), {"input_ids": [ord(word[0]) for word in text.split()]})

    found, said = audited_sheets(Coarse(), (512,), 2, 0)
    assert found == [] and "begin those of another one" in said and said.startswith("No facts were hidden")


def test_rows_are_checked_and_read_back(tmp_path: Path) -> None:
    rows = [made_row("exact", 30), made_row("h2o@4", 2)]
    write_records(tmp_path / FACTS, rows)
    assert read_records(tmp_path / FACTS, SheetRow, 2**20, FACTS, "a row") == rows
    with pytest.raises(ValueError, match="one bet and one outcome for each of the 32 facts"):
        replace(rows[0], right=(1, 0))
    with pytest.raises(ValueError, match="no probability"):
        replace(rows[0], bets=(1.5,) * 32)
    with pytest.raises(ValueError, match="one setting and context at a time"):
        fact_summary(rows)
