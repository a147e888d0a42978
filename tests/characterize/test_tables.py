"""The committed tables are what the scripts beside them give, and the docs tell each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "characterize"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("__"))
BUILTIN, BOTH = ("built-in 2k",), ("synthetic", "built-in 2k")
RERUN = {
    "early_tokens": BOTH,
    "isolated_needle": BOTH,
    "selector_recall": BOTH,
    "subgen_bound": BOTH,
    "taylor_error": BOTH,
    "balance_vs_uniform": BUILTIN,
    "summary_error": BUILTIN,
    "attention_spread": BUILTIN,
    "allocation_error": BUILTIN,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_its_table_and_its_paragraph(script: str) -> None:
    lines = table(FOLDER, script)
    assert len(lines) > 2 and len({line.count("\t") for line in lines}) == 1
    assert f"characterize/{script}.py" in (ROOT / "docs/shapes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", RERUN)
def test_every_claim_on_keys_is_measured_on_smollm2_as_well(script: str) -> None:
    found = {line.split("\t")[0] for line in table(FOLDER, script)}
    assert {"keys", *RERUN[script], "SmolLM2 2k", "SmolLM2 8k"} <= found


@pytest.mark.slow
@pytest.mark.parametrize("script", RERUN)
def test_running_again_gives_the_same_table(tmp_path: Path, script: str) -> None:
    """Up to what another processor rounds differently; without SmolLM2, which is not shipped."""
    shutil.copytree(FOLDER, tmp_path / "characterize", ignore=shutil.ignore_patterns("*.tsv", "__pycache__"))
    command = [sys.executable, "-m", f"characterize.{script}", "--keys", ",".join(RERUN[script])]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run(command, cwd=tmp_path, env=os.environ | cache, check=True, capture_output=True)
    found, kept = (
        [line.split("\t") for line in table(folder, script)] for folder in (tmp_path / "characterize", FOLDER)
    )
    kept = [row for row in kept if row[0] in ("keys", *RERUN[script])]
    assert [len(row) for row in found] == [len(row) for row in kept]
    for mine, theirs in zip(found, kept, strict=True):
        assert all(same(a, b) for a, b in zip(mine, theirs, strict=True)), (mine, theirs)


def table(folder: Path, script: str) -> list[str]:
    return (folder / f"{script}.tsv").read_text(encoding="utf-8").splitlines()


def same(a: str, b: str) -> bool:
    try:
        return float(a) == pytest.approx(float(b), rel=0.02, abs=1e-9)
    except ValueError:
        return a == b
