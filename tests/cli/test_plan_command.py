"""`kvfloor plan`: a table of eighty columns, one JSON document, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvfloor import models
from kvfloor.planning import plan
from tests.cli.running import kvfloor


def test_the_document_is_the_plan() -> None:
    words = (
        "--batch",
        "2",
        "--memory",
        "1GiB",
        "--methods",
        "h2o,snapkv@64",
        "--budgets",
        "25%,40",
        "--dtype",
        "float32",
    )
    run = kvfloor("plan", "--context", "256", *words, "--json")
    given = {"methods": ["h2o", "snapkv@64"], "budgets": ["25%", "40"], "dtype": "float32"}
    assert run.returncode == 0 and run.stderr == ""
    expected = plan(context=256, batch=2, memory="1GiB", **given).as_dict()  # type: ignore[arg-type]
    assert json.loads(run.stdout) == json.loads(json.dumps(expected))


def test_the_table_has_every_line_and_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_bytes((models.builtin_path() / "config.json").read_bytes())
    run = kvfloor("plan", "--context", "9000", "--memory", "64MiB", "--model", "a model", cwd=tmp_path)
    assert run.returncode == 0 and all(len(line) <= 80 for line in run.stdout.splitlines())
    for word in ("a model (llama)", "875,904", "1.67 MiB", "stock", "exact", "quant(bits=4)", "h2o@25%", "2,250"):
        assert word in run.stdout, word
    assert "for any method, in the worst case" in run.stdout and "trained for" in run.stdout
    assert "requests" not in kvfloor("plan", "--context", "64").stdout


def test_a_constant_cache_fits_any_context_or_none() -> None:
    words = ("plan", "--context", "512", "--methods", "sinks@64", "--memory")
    for memory, longest in (("64MiB", "any"), ("1.7MiB", "none")):
        rows = [line.split() for line in kvfloor(*words, memory).stdout.splitlines()]
        last = {row[0]: row[-1] for row in rows if row}
        assert last["sinks@64"] == longest and last["exact"].replace(",", "").isdigit()


BAD = {
    "context": (("--context", "0"), "--context"),
    "no context": ((), "--context"),
    "model": (("--context", "8", "--model", "/nowhere"), "no model at '/nowhere'"),
    "gguf": (("--context", "8", "--model", "mine.gguf"), "config.json"),
    "weights": (("--context", "8", "--memory", "1MB"), "751,808 bytes are missing"),
    "memory": (("--context", "8", "--memory", "much"), "24GiB"),
    "dtype": (("--context", "8", "--dtype", "int4"), "bfloat16, float16, float32"),
    "method": (("--context", "8", "--methods", "windw"), "did you mean 'window'"),
    "unbounded": (("--context", "8", "--methods", "h2o", "--budgets", ","), "h2o@512"),
    "budget": (("--context", "8", "--budgets", "1e9"), "budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, tmp_path: Path) -> None:
    words, told = BAD[case]
    run = kvfloor("plan", *words, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert told in run.stderr and run.stderr.startswith("kvfloor: ") and run.stderr.count("\n") == 1
