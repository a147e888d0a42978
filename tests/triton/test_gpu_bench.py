"""The script for a GPU runs from end to end on a CPU, on tiny shapes, and ends with 1 where a kernel errs."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench/gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(script: Any, monkeypatch: pytest.MonkeyPatch, out: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--out", str(out)])
    return script.main()


def test_a_dry_run_checks_and_writes_everything(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(script, monkeypatch, tmp_path) == 0
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert told["passed"] and told["complete"] and "CPU" in told["machine"]
    assert {row["method"].split("@")[0] for row in told["steps"]} == set(script.METHODS)
    assert {row["what"] for row in told["reads"]} >= {"copy", "split kernel", "torch sdpa", "codes exact:k4v4"}
    assert len(told["checks"]) == 10 and all(0 < row["error"] <= row["most"] for row in told["checks"])
    assert all(row["eager_us"] > 0 and row["graphed_us"] > 0 and row["waits"] == "" for row in told["steps"])
    for name in ("checks", "reads", "steps"):
        rows = list(csv.DictReader((tmp_path / f"{name}.tsv").open(), delimiter="\t"))
        assert len(rows) == len(told[name]) and rows[0].keys() == told[name][0].keys()


def test_a_kernel_that_errs_ends_it_with_1(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = script.attend_split

    def wrong(*given: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_mass = kernel(*given, **more)
        return mean * 1.01, log_mass

    monkeypatch.setattr(script, "attend_split", wrong)
    monkeypatch.setattr(script, "METHODS", ())
    assert run(script, monkeypatch, tmp_path) == 1
    failed = {row["what"] for row in json.loads((tmp_path / "gpu.json").read_text())["checks"] if not row["passed"]}
    assert failed and all(what.startswith("split") for what in failed)


def test_no_measurement_starts_late(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "MINUTES", 0.0)
    assert run(script, monkeypatch, tmp_path) == 0
    told = json.loads((tmp_path / "gpu.json").read_text())
    assert not told["complete"] and told["steps"] == [] and {row["what"] for row in told["reads"]} == {"copy"}


def test_without_a_gpu_it_says_so(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert script.main() == 2
    assert "--dry" in capsys.readouterr().err


def test_the_bytes_of_a_coded_read_are_those_that_slots_hold(script: Any) -> None:
    machine = script.TimedDevice(dry=True)
    for store in script.STORES[:2]:
        state = script.filled(machine, store, 64, 2, script.DRY)
        parts = state.slots.parts
        assert sum(part.packed[:1].nbytes for part in parts) + parts[1].scale[:1].nbytes == script.state_bytes(
            store, 1, script.DRY.d
        )
