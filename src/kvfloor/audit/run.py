"""Run an audit from start to end: plan the work, measure it, recommend a setting, write `rows.jsonl`."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfloor.audit.clock import Clock
from kvfloor.audit.explain import why
from kvfloor.audit.meta import Meta
from kvfloor.audit.nats import TextRow, summaries, write_text_rows
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
from kvfloor.audit.recommend import KL_LIMIT, Recommendation, recommend
from kvfloor.audit.require import conditions, shortfalls
from kvfloor.audit.rows import Row, document, write_rows
from kvfloor.audit.texts import GENERATED, SHIPPED, check_scored, check_texts, excerpts
from kvfloor.files import open_folder
from kvfloor.models.load import BUILTIN
from kvfloor.statistics import MIN_SAMPLES

if TYPE_CHECKING:
    from kvfloor.audit.closer import Closer

DEFAULT_SAMPLES = 40
DEFAULT_CONTEXT = {True: 512, False: 1024}
"""Tokens of context for the built-in model (True) and any other (False)."""
_FEWEST_SCORED = 512


@dataclass(frozen=True)
class AuditRequest:
    """Hold the arguments of an audit: every field has the command line's default.

    model     "builtin" or a local folder
    methods   texts of methods, without the baselines, which always run too
    budgets   texts of budgets: tokens, shares or bytes; None: 64 and 192 tokens for the built-in model, a quarter and a
              half of the context for any other
    tasks     names or module:TASK, unless `prompts` is given; None: the default tasks for the built-in model, none for
              any other
    prompts   file of the user's own samples as JSON lines, used in place of tasks; None: tasks
    texts     names or files of texts to compare next-token distributions on (`audit/texts.py`); None: the generated
              ones for the built-in model, the shipped ones for any other
    contexts  lengths of contexts in tokens; None: 512 for the built-in model, 1,024 for any other
    continuation  number of tokens that are predicted after each text's context; None: as many as the longest context
              has, at least 512
    kl_limit  largest tolerated divergence, nats per token
    accept_terms  True if the user accepts the terms of use of a published model
    n         samples per row, at least 32
    protocols "after": the question follows the compression; "visible": it is compressed with the context
    require   conditions on the rows, such as "h2o@192:recall.score>=0.9" (`audit/require.py`), or None
    out       folder for `rows.jsonl` and the report
    command   command line that the report shows
    allow_beyond  True if contexts may be longer than the positions that the model was trained for
    minutes   time limit: texts and cells that do not fit are left out; None: no limit
    """

    model: str = "builtin"
    methods: Sequence[str] = METHODS
    budgets: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    prompts: Path | None = None
    texts: Sequence[str] | None = None
    contexts: Sequence[int] | None = None
    continuation: int | None = None
    kl_limit: float = KL_LIMIT
    accept_terms: bool = False
    protocols: Sequence[str] = ("after",)
    n: int = DEFAULT_SAMPLES
    seed: int = 0
    require: str | None = None
    out: Path = Path("out/audit")
    command: str = "kvfloor audit"
    allow_beyond: bool = False
    minutes: float | None = None

    @property
    def is_builtin(self) -> bool:
        return self.model == BUILTIN

    @property
    def budget_texts(self) -> Sequence[str]:
        """Return the budgets under which every method runs."""
        return BUDGETS[self.is_builtin] if self.budgets is None else self.budgets

    @property
    def task_names(self) -> Sequence[str]:
        """Return the names of the tasks to run; none if the user's own prompts are used in their place."""
        if self.prompts is not None or (self.tasks is None and not self.is_builtin):
            return ()
        return TASKS if self.tasks is None else self.tasks

    @property
    def text_names(self) -> Sequence[str]:
        """Return the names of the texts to read."""
        if self.texts is not None:
            return self.texts
        return GENERATED if self.is_builtin else SHIPPED

    @property
    def context_lengths(self) -> Sequence[int]:
        """Return the context lengths in tokens."""
        return (DEFAULT_CONTEXT[self.is_builtin],) if self.contexts is None else self.contexts

    @property
    def scored(self) -> int:
        """Return the number of tokens that are predicted after each text's context."""
        return max(*self.context_lengths, _FEWEST_SCORED) if self.continuation is None else self.continuation


@dataclass(frozen=True)
class Answer:
    """Hold the results of an audit: rows, recommendation, what explains it, and the request that they answer.

    rows        one per setting (method with budget) and cell of the tasks; texts: one per setting and text
    closer      errors by head, kv heads' floors and example answers
    report      path of the HTML page, which `kvfloor.report.render` writes later
    shortfalls  a line for each row that misses a condition of `require`
    """

    rows: list[Row]
    texts: list[TextRow]
    closer: Closer
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
        nats = [asdict(found) for found in summaries(self.texts)]
        return plain | {
            "texts": nats,
            "heads": [head.as_dict() for head in self.closer.heads],
            "output_errors": [asdict(one) for one in self.closer.error_maps],
            "examples": [asdict(one) for one in self.closer.examples],
        }


def _silent(text: str) -> None:
    del text


def run(question: AuditRequest, track: Callable[[int, str], None], announce: Callable[[str], None] = _silent) -> Answer:
    """Run the audit that is asked for, write its `rows.jsonl`, and return its results.

    `track(total, text)` is called before each of `total` measurements, which `text` names; total is 0 while the model
    is loaded. `announce` is called with a line of text that tells the expected time. Raises ValueError with one
    line for anything in `question` that cannot be done; nothing is written then.
    """
    begin = time.perf_counter()
    if not question.kl_limit > 0:
        raise ValueError(f"--kl-limit {question.kl_limit}: give a number of nats above 0, such as {KL_LIMIT}")
    if question.minutes is not None and not question.minutes > 0:
        raise ValueError(f"--minutes {question.minutes:g}: give a number above 0, or leave it out for no limit")
    if question.n < MIN_SAMPLES:
        raise ValueError(f"--n {question.n}: a row needs at least {MIN_SAMPLES} samples; leave cells out, not samples")
    check_protocols(question.protocols)
    names = question.task_names
    known = tuple(task.name for task in chosen_tasks(names)) if names else ()
    plan = settings(question.methods, question.budget_texts)
    tasks = known if question.prompts is None else (question.prompts.stem,)
    required = () if question.require is None else conditions(question.require, plan, tasks)
    items = None if question.prompts is None else read_prompts(question.prompts, question.n)
    if not (tasks or question.text_names):
        raise ValueError("an audit needs texts or tasks: leave --texts out, or name --tasks")
    check_texts(question.text_names)
    check_scored(len(question.text_names), question.scored, question.minutes is not None)
    open_folder(question.out)

    from kvfloor.audit.closer import look_closer
    from kvfloor.audit.measure import Bench, run_cells
    from kvfloor.audit.provenance import file_hash, model_hashes, text_hashes
    from kvfloor.audit.reading import Reader, read_excerpts
    from kvfloor.hf import prepare
    from kvfloor.models import load

    model, tokenizer = load(question.model, question.accept_terms, lambda text: track(0, text))
    bench = Bench(prepare(model), tokenizer, question.seed)
    contexts = question.context_lengths
    read = excerpts(question.text_names, contexts, question.scored, bench.encode)
    _require_positions(model, question, max(contexts) + (question.scored if read else 0))
    if question.prompts is not None and items is not None:
        work = prompt_work(question.prompts.stem, items, question.protocols, bench.count)
    else:
        work = task_work(names, contexts, question.protocols, question.n, question.seed, bench.count) if names else []
    longest = max(contexts) + question.scored
    hashes = model_hashes(question.model) | text_hashes(question.text_names, longest) | file_hash(question.prompts)
    clock = Clock(question.minutes, announce, begin)
    total = (len(plan) + 1) * (len(read) + len(work))
    texts = read_excerpts(Reader(model, question.seed), plan, read, lambda text: track(total, text), clock)
    rows, floors = run_cells(bench, plan, work, lambda text: track(total, text), clock)
    answer = recommend(rows, texts=texts, kl_limit=question.kl_limit)
    closer = look_closer(bench, plan, read, work, rows, texts, floors, answer, lambda text: track(total, text))
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
        notes=clock.note(),
        hashes=hashes,
    )
    write_rows(question.out / "rows.jsonl", rows)
    write_text_rows(question.out / "nats.jsonl", texts)
    closer.write(question.out)
    return Answer(rows, texts, closer, answer, report, tuple(shortfalls(required, rows)), question, meta)


def _require_positions(model: Any, question: AuditRequest, longest: int) -> None:
    """Raise ValueError if the audit's longest input, of `longest` tokens, exceeds the model's trained positions."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(most, int) and longest > most and not question.allow_beyond:
        raise ValueError(
            f"contexts and continuations of {longest:,} tokens are longer than the {most:,} positions of the model "
            f"{question.model!r}: give smaller ones, or pass --allow-beyond"
        )


def _threads() -> int:
    import torch

    return torch.get_num_threads()
