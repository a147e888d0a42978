"""Run an audit from start to end: plan the work, measure it, recommend a setting, write `rows.jsonl`."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from kvfloor.audit.explain import why
from kvfloor.audit.heads import Head, heads
from kvfloor.audit.meta import Meta
from kvfloor.audit.plan import (
    BUDGETS,
    METHODS,
    TASKS,
    check_protocols,
    chosen_tasks,
    prompt_work,
    read_prompts,
    settings,
    task_work,
)
from kvfloor.audit.recommend import Recommendation, recommend
from kvfloor.audit.require import conditions, shortfalls
from kvfloor.audit.rows import Row, document, write_rows
from kvfloor.files import open_folder
from kvfloor.statistics import MIN_SAMPLES

DEFAULT_SAMPLES = 40
DEFAULT_CONTEXT = 512


@dataclass(frozen=True)
class AuditRequest:
    """Hold the arguments of an audit: every field has the command line's default.

    model     "builtin" or a local folder
    methods   texts of methods, without the baselines, which always run too
    budgets   texts of budgets: tokens, shares or bytes
    tasks     names or module:TASK, unless `prompts` is given
    prompts   file of the user's own samples (`read_prompts`), used in place of tasks; None: tasks
    contexts  lengths of contexts in tokens
    n         samples per row, at least 32
    protocols "after": the question follows the compression; "visible": it is compressed with the context
    require   conditions on the rows (`audit/require.py`), or None
    out       folder for `rows.jsonl` and the report
    command   command line that the report shows
    """

    model: str = "builtin"
    methods: Sequence[str] = METHODS
    budgets: Sequence[str] = BUDGETS
    tasks: Sequence[str] = TASKS
    prompts: Path | None = None
    contexts: Sequence[int] = (DEFAULT_CONTEXT,)
    protocols: Sequence[str] = ("after",)
    n: int = DEFAULT_SAMPLES
    seed: int = 0
    require: str | None = None
    out: Path = Path("out/audit")
    command: str = "kvfloor audit"


@dataclass(frozen=True)
class Answer:
    """Hold the results of an audit: rows, kv heads' floors, recommendation, and the request that they answer.

    report      path of the HTML page, which `kvfloor.report.render` writes later
    shortfalls  a line for each row that misses a condition of `require`
    """

    rows: list[Row]
    heads: list[Head]
    recommendation: Recommendation
    report: Path
    shortfalls: tuple[str, ...]
    question: AuditRequest
    meta: Meta

    def as_dict(self) -> dict:
        """Return the document of `kvfloor audit --json` as plain JSON types."""
        plain = document(
            model=self.question.model,
            seed=self.question.seed,
            rows=self.rows,
            method=self.recommendation.method,
            why=why(self.recommendation),
            report=str(self.report),
        )
        return plain | {"heads": [head.as_dict() for head in self.heads]}


def run(question: AuditRequest, track: Callable[[int, str], None]) -> Answer:
    """Run the audit that is asked for, write its `rows.jsonl`, and return its results.

    `track(total, text)` is called before each of `total` measurements, which `text` names. Raises ValueError with one
    line for anything in `question` that cannot be done; nothing is written then.
    """
    begin = time.perf_counter()
    if question.n < MIN_SAMPLES:
        raise ValueError(f"--n {question.n}: a row needs at least {MIN_SAMPLES} samples; leave cells out, not samples")
    check_protocols(question.protocols)
    known = tuple(task.name for task in chosen_tasks(question.tasks))
    plan = settings(question.methods, question.budgets)
    tasks = known if question.prompts is None else (question.prompts.stem,)
    required = () if question.require is None else conditions(question.require, plan, tasks)
    items = None if question.prompts is None else read_prompts(question.prompts, question.n)
    open_folder(question.out)

    from kvfloor.audit.measure import Bench, run_cells
    from kvfloor.hf import prepare
    from kvfloor.models import load

    model, tokenizer = load(question.model)
    bench = Bench(prepare(model), tokenizer, question.seed)
    if question.prompts is not None and items is not None:
        work = prompt_work(question.prompts.stem, items, question.protocols, bench.count)
    else:
        work = task_work(question.tasks, question.contexts, question.protocols, question.n, question.seed, bench.count)
    total = (len(plan) + 1) * len(work)
    rows, floors = run_cells(bench, plan, work, lambda text: track(total, text))
    by_head = heads(floors, rows)
    answer = recommend(rows)
    report = question.out / "report.html"
    meta = Meta(
        model=question.model,
        seed=question.seed,
        command=question.command,
        versions={
            "kvfloor": version("kvfloor"),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        machine=f"{platform.machine()}, {_threads()} torch threads",
        duration_s=time.perf_counter() - begin,
    )
    write_rows(question.out / "rows.jsonl", rows)
    return Answer(rows, by_head, answer, report, tuple(shortfalls(required, rows)), question, meta)


def _threads() -> int:
    import torch

    return torch.get_num_threads()
