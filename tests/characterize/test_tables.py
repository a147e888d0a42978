"""The committed tables are what the scripts beside them give, and the docs tell each of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "characterize"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
RERUN = ("early_tokens", "isolated_needle", "selector_recall", "subgen_bound", "taylor_error")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_its_table_and_its_paragraph(script: str) -> None:
    lines = (FOLDER / f"{script}.tsv").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 2 and len({line.count("\t") for line in lines}) == 1
    assert f"characterize/{script}.py" in (ROOT / "docs/shapes.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("script", RERUN)
def test_running_again_gives_the_same_table(tmp_path: Path, script: str) -> None:
    """Up to what another processor rounds differently."""
    shutil.copytree(FOLDER, tmp_path / "characterize", ignore=shutil.ignore_patterns("*.tsv", "__pycache__"))
    subprocess.run([sys.executable, "-m", f"characterize.{script}"], cwd=tmp_path, check=True, capture_output=True)
    found, kept = (
        [line.split("\t") for line in (folder / f"{script}.tsv").read_text(encoding="utf-8").splitlines()]
        for folder in (tmp_path / "characterize", FOLDER)
    )
    assert [len(row) for row in found] == [len(row) for row in kept]
    for mine, theirs in zip(found, kept, strict=True):
        assert all(same(a, b) for a, b in zip(mine, theirs, strict=True)), (mine, theirs)


def same(a: str, b: str) -> bool:
    try:
        return float(a) == pytest.approx(float(b), rel=0.02, abs=1e-9)
    except ValueError:
        return a == b
