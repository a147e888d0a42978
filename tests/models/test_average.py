"""Averaged weights are the mean, entry by entry, and say which steps they come from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builtin_model.average import average


def run(folder: Path, value: float, steps: int, width: int = 3) -> Path:
    folder.mkdir()
    save_file({"w": torch.full((2, width), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "training.json").write_text(json.dumps({"steps": steps, "seed": 0}))
    return folder


def test_the_mean_of_three_runs_and_their_steps(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, value, steps) for name, value, steps in (("a", 1.0, 5), ("b", 2.0, 7), ("c", 6.0, 9))]
    average(runs, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], torch.full((2, 3), 3.0))
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == {
        "steps": 9,
        "seed": 0,
        "averaged_steps": [5, 7, 9],
    }
    assert (tmp_path / "out" / "config.json").exists()


def test_runs_of_different_models_are_refused(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", 1.0, 5), run(tmp_path / "b", 1.0, 5, width=4)]
    with pytest.raises(ValueError, match="only runs of one model"):
        average(runs, tmp_path / "out")
    with pytest.raises(ValueError, match="at least one run"):
        average([], tmp_path / "out")
    assert not (tmp_path / "out").exists()
