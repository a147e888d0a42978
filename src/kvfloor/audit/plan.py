"""What an audit runs: the settings (methods x budgets, baselines always in) and the samples of each cell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfloor.audit.rows import Cell
from kvfloor.core.budget import Budget, parse_budget
from kvfloor.core.method import Method, standard_law
from kvfloor.methods.registry import parse

BASELINES = ("exact", "quant(bits=8)", "quant(bits=4)", "random", "window", "sinks")
METHODS = ("h2o", "subgen")
BUDGETS = ("64", "192")
TASKS = ("recall", "passkey64", "vartrack", "registers")


@dataclass(frozen=True)
class Item:
    """One sample to answer: context and question as text, and the only right answer.

    `ends` says that the answer must be followed by the end of text, which the built-in tasks agree on.
    """

    context: str
    question: str
    answer: str
    ends: bool = True


@dataclass(frozen=True)
class Work:
    """One cell of the audit and its samples."""

    cell: Cell
    items: tuple[Item, ...]


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated list; commas inside parentheses belong to their part."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def settings(methods: Iterable[str], budgets: Sequence[str]) -> list[Method]:
    """Every method under every budget, the baselines first, each setting once.

    A method whose text has a budget keeps it; one that no budget bounds runs once. Raises ValueError for an
    unknown method and for a budget smaller than what the method protects.
    """
    sizes: list[Budget] = [parse_budget(text) for text in budgets]
    if not sizes:
        raise ValueError("an audit needs at least one budget, for example --budgets 64,256")
    found: dict[str, Method] = {}
    for text in (*BASELINES, *methods):
        method = standard_law(parse(text), "an audit")
        options = [method] if getattr(method, "budget", None) is not None else _under(method, sizes)
        for option in options:
            found.setdefault(str(option), option)
    return list(found.values())


def _under(method: Method, sizes: Sequence[Budget]) -> list[Method]:
    bounded = [method.with_budget(size) for size in sizes]
    return [m for m in bounded if m is not None] or [method]


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise ValueError for a name that is no built-in task."""
    from kvfloor.tasks import TASKS as KNOWN

    unknown = [name for name in tasks if name not in KNOWN]
    if unknown or not tasks:
        raise ValueError(f"unknown task {(unknown or [''])[0]!r}; the tasks are {', '.join(KNOWN)}")


def task_work(
    tasks: Sequence[str],
    contexts: Sequence[int],
    protocols: Sequence[Any],
    n: int,
    seed: int,
    count: Callable[[str], int],
) -> list[Work]:
    """Cells of the built-in tasks; samples are the same for every protocol."""
    from kvfloor.tasks import TASKS as KNOWN

    check_tasks(tasks)
    work = []
    for task in tasks:
        for context in contexts:
            samples = [KNOWN[task].generate(seed, i, context, count=count) for i in range(n)]
            items = tuple(Item(s.context, s.questions[0].ask, s.questions[0].answer) for s in samples)
            work += [Work(Cell(task, context, protocol), items) for protocol in protocols]
    return work


def read_prompts(path: Path, n: int) -> tuple[Item, ...]:
    """A user's JSON lines: {"prompt", "answer"}, or {"context", "question", "answer"}.

    Raises ValueError naming the file and the line that is broken, or how many samples there are if fewer than `n`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise ValueError(f"cannot read the prompts file {str(path)!r}: {cause}") from None
    items = tuple(_item(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if len(items) < n:
        raise ValueError(f"{path} has {len(items)} samples; an audit row needs at least {n}: add prompts")
    return items


def prompt_work(
    name: str, items: tuple[Item, ...], protocols: Sequence[Any], count: Callable[[str], int]
) -> list[Work]:
    """Cells of a user's prompts; a bare prompt has no separate question, so only `visible` applies to it."""
    split = all(item.question for item in items)
    allowed = [p for p in protocols if split or p == "visible"] or ["visible"]
    context = max(count(item.context) for item in items)
    return [Work(Cell(name, context, protocol), items) for protocol in allowed]


def _item(line: str, where: str) -> Item:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as cause:
        raise ValueError(f"{where} is not JSON: {cause.msg} at column {cause.colno}") from None
    forms = ({"prompt", "answer"}, {"context", "question", "answer"})
    fits = isinstance(record, dict) and any(
        form <= record.keys() and all(isinstance(record[key], str) and record[key] for key in form) for form in forms
    )
    if not fits:
        raise ValueError(f'{where} must have non-empty texts "prompt" and "answer", or "context", "question", "answer"')
    if "prompt" in record:
        return Item(record["prompt"], "", record["answer"], ends=False)
    return Item(record["context"], record["question"], record["answer"], ends=False)
