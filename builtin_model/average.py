"""Average the weights of several training runs: `python -m builtin_model.average --out DIR RUN RUN ...`.

Runs that were resumed from one another, each with its own decay of the learning rate to zero, end at different points
of one basin of the loss. Their mean has a lower loss than any of them (Izmailov et al. 2018, "Averaging weights leads
to wider optima and better generalization", arXiv 1803.05407).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS, NOTE = "model.safetensors", "training.json"


def average(runs: Sequence[Path], out: Path) -> None:
    """Write a model folder with the mean of the runs' weights.

    Its `training.json` is the last run's, with the steps of all runs added. Raises ValueError if there is no run, or if
    the runs' weights differ in name or shape.
    """
    if not runs:
        raise ValueError("average needs the folder of at least one run")
    weights = [load_file(run / WEIGHTS) for run in runs]
    shapes = [{name: tensor.shape for name, tensor in one.items()} for one in weights]
    for run, shape in zip(runs, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(f"{run} and {runs[0]} have different weights: only runs of one model can be averaged")
    mean = {
        name: sum((one[name].double() for one in weights[1:]), weights[0][name].double())
        .div(len(weights))
        .to(weights[0][name].dtype)
        for name in weights[0]
    }
    out.mkdir(parents=True, exist_ok=True)
    for file in runs[-1].glob("*.json"):
        shutil.copyfile(file, out / file.name)
    save_file(mean, out / WEIGHTS, metadata={"format": "pt"})
    steps = [json.loads((run / NOTE).read_text())["steps"] for run in runs]
    facts = json.loads((runs[-1] / NOTE).read_text()) | {"averaged_steps": steps}
    (out / NOTE).write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    """Average runs from the command line."""
    parser = argparse.ArgumentParser(prog="python -m builtin_model.average", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="model folders of the trainer, the last one last")
    parser.add_argument("--out", type=Path, required=True, help="folder for the averaged model")
    given = parser.parse_args()
    average(given.runs, given.out)


if __name__ == "__main__":
    main()
