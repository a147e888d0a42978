"""Measure on needle tasks what an eighth of the bytes answers: fewer tokens alone, or fewer tokens and fewer bits.

    python -m characterize.frontier_tasks [--out DIR]

The script runs `kvfloor audit` on SmolLM2 with RULER's tasks that this model can do, one of each kind: one needle,
one among needles with other keys, several values of one key, several keys. A text of 1,024 tokens is taken in under the
method; the question follows. `tokens` keeps 9.5 % of the tokens as they are, `both` keeps 34 % of them in 4 bits per
number for keys and 3 for values. Either way it is an eighth of the bytes of a 16-bit exact cache; a sixth with h2o,
which keeps queries too. Columns: task, what is dropped, policy, setting, bytes in a model of 16 bits as a share of
exact's, samples, share of right answers with its 95 % Wilson interval, exact's share on the same samples, and, for
`both`, the paired difference from `tokens` with the same policy with its 95 % Tango interval. About 40 minutes on one
core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from characterize.lib.table import Row, save
from kvfloor.audit import rows as audit
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.run import run
from kvfloor.core.budget import resolve
from kvfloor.core.spec import Spec
from kvfloor.hf.held import zeros_held
from kvfloor.methods.grammar import parse
from kvfloor.statistics import paired_counts, paired_difference_interval

TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
CONTEXT = 1024
POLICIES = ("sinks", "h2o", "snapkv")
DROPPED = {"tokens": "{}@9.5%", "both": "{}:k4v3@34%"}
FIELDS = (
    *("task", "dropped", "policy", "setting", "share", "n", "score", "low", "high", "exact"),
    *("gain", "gain_low", "gain_high"),
)
HEAD = Spec(rows=3, d=64, dv=64, dtype=torch.bfloat16)
"""The caches of one layer of SmolLM2, as in a model of 16 bits."""

QUERIES = 3  # query heads per kv head


def share(setting: str) -> float:
    """Return the bytes that a setting holds after CONTEXT tokens, as a share of those of `exact`, both in 16 bits."""
    methods = (resolve(parse(text), HEAD, length=CONTEXT, g=QUERIES) for text in (setting, "exact"))
    budgeted, exact = (zeros_held(method, HEAD, QUERIES, CONTEXT).after for method in methods)
    return budgeted / exact


def measured(folder: Path) -> list[audit.Row]:
    """Run the audit in `folder`, and return its rows: one per task and setting."""
    request = AuditRequest(
        model="smollm2",
        methods=[text.format(policy) for policy in POLICIES for text in DROPPED.values()],
        budgets=("9.5%",),
        tasks=TASKS,
        texts=(),
        contexts=(CONTEXT,),
        least_exact=0.0,
        out=folder,
    )
    return run(request, lambda total, text: print(text, flush=True)).rows


def table(rows: Sequence[audit.Row]) -> list[Row]:
    """Return one row per task, policy and way of dropping; columns as in FIELDS."""
    at, found = {(row.task, row.method): row for row in rows}, []
    for task in TASKS:
        for policy in POLICIES:
            alone = at[task, DROPPED["tokens"].format(policy)]
            for dropped, text in DROPPED.items():
                row = at[task, text.format(policy)]
                gain: tuple[object, ...] = ("", "", "")
                if row is not alone:
                    gained, lost = paired_counts(row.outcomes, alone.outcomes)
                    gain = ((gained - lost) / row.n, *paired_difference_interval(gained, lost, row.n))
                figures = (row.n, row.score, row.score_low, row.score_high, row.exact_score)
                found.append((task, dropped, policy, row.method, share(row.method), *figures, *gain))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder that keeps the measured rows")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        save(__file__, FIELDS, table(measured(given.out or Path(scratch))))


if __name__ == "__main__":
    main()
