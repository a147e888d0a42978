"""Plan an audit's work: the settings (methods x budgets, baselines always in) and the samples of each cell.

A cell is a task at a context length under a protocol (when the question comes). A baseline is a method that every audit
compares with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvfloor.audit.protocols import PROTOCOLS
from kvfloor.audit.rows import Cell
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.core.budget import Budget, parse_budget
from kvfloor.core.method import Method, standard_law
from kvfloor.files import read_regular
from kvfloor.methods.grammar import parse
from kvfloor.tasks import Task, lookup

BASELINES = {
    "exact": "keeps every token at full precision",
    "quant(bits=8)": "keeps every token at 8 bits",
    "quant(bits=4)": "keeps every token at 4 bits",
    "random": "keeps a random sample of the tokens: the control every idea must beat",
    "window": "keeps the most recent tokens (recency)",
    "sinks": "keeps the first tokens and the most recent ones",
}
"""Map each method that every audit compares with to a description in words."""

METHODS = ("h2o", "snapkv")
BUDGETS = {True: ("64", "192"), False: ("25%", "50%")}
"""Budgets for the built-in model (True) and any other (False)."""
MOST_PROMPT_BYTES = 2**28
TASKS = ("recall", "passkey64", "vartrack", "registers")


@dataclass(frozen=True)
class Item:
    """Hold one sample: its context and question as text, and the only right answer.

    `ends` is True if the end of text must follow the answer, as in the built-in tasks.
    """

    context: str
    question: str
    answer: str
    ends: bool = True


@dataclass(frozen=True)
class Work:
    """Hold one cell of the audit (task, context length, protocol) and its samples."""

    cell: Cell
    items: tuple[Item, ...]


def settings(methods: Iterable[str], budgets: Sequence[str]) -> list[BudgetedMethod]:
    """Return the settings of an audit: every method under every budget, the baselines first, each setting once.

    A method whose text has a budget runs under that budget alone. A method that takes no budget runs once. A baseline
    that is also among `methods` is marked as a baseline and as asked for. Raises ValueError for an unknown method, and
    for a budget smaller than the number of tokens that the method protects from eviction.
    """
    sizes: list[Budget] = [parse_budget(text) for text in budgets]
    if not sizes:
        raise ValueError("an audit needs at least one budget, for example --budgets 64,256")
    found = {one.text: one for text in BASELINES for one in _under(parse(text), sizes, baseline=True)}
    for text in methods:
        for one in _under(standard_law(parse(text), "an audit"), sizes, asked=True):
            found[one.text] = replace(one, baseline=one.text in found and found[one.text].baseline)
    return list(found.values())


def _under(method: Method, sizes: Sequence[Budget], **marks: bool) -> list[BudgetedMethod]:
    if method.budget is not None:
        return [BudgetedMethod(method, **marks)]
    bounded = [method.with_budget(size) for size in sizes]
    return [BudgetedMethod(one, **marks) for one in bounded if one is not None] or [BudgetedMethod(method, **marks)]


def check_protocols(protocols: Sequence[str]) -> None:
    """Raise ValueError unless every name is a protocol ("after" or "visible") and there is at least one.

    "after" asks a sample's question after its context is compressed, "visible" before.
    """
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown or not protocols:
        raise ValueError(f"protocol {(unknown or ['none'])[0]!r}: choose from {', '.join(PROTOCOLS)}")


def chosen_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names, each once: built-in ones, or a third party's as `module:TASK`.

    Raises ValueError for a name that is no task, for two tasks of one name, and for an empty list.
    """
    if not names:
        raise ValueError(f"an audit needs at least one task, for example --tasks {TASKS[0]}")
    tasks = [lookup(name) for name in dict.fromkeys(names)]
    for task in tasks:
        if [other.name for other in tasks].count(task.name) > 1:
            raise ValueError(f"two of the tasks are named {task.name!r}: a report tells them apart by name only")
    return tasks


def task_work(
    tasks: Sequence[str],
    contexts: Sequence[int],
    protocols: Sequence[Any],
    n: int,
    seed: int,
    count: Callable[[str], int],
) -> list[Work]:
    """Return the cells of an audit (tasks x contexts x protocols) with `n` generated samples each.

    Samples are the same for every protocol. `count` counts the tokens of a text. A sample's context has at most as many
    tokens as the cell's context length.
    """
    work = []
    for task in chosen_tasks(tasks):
        for context in dict.fromkeys(contexts):
            samples = [task.generate(seed, i, context, count=count) for i in range(n)]
            items = tuple(Item(s.context, s.questions[0].ask, s.questions[0].answer) for s in samples)
            work += [Work(Cell(task.name, context, protocol), items) for protocol in dict.fromkeys(protocols)]
    return work


def read_prompts(path: Path, n: int) -> tuple[Item, ...]:
    """Read a user's samples from JSON lines: {"prompt", "answer"}, or {"context", "question", "answer"}.

    Raises ValueError naming the file and the broken line, or the number of samples if it is less than `n`.
    """
    try:
        lines = read_regular(path, MOST_PROMPT_BYTES, "prompts file").decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as cause:
        raise ValueError(f"cannot read the prompts file {str(path)!r}: {cause}") from None
    items = tuple(_item(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if len(items) < n:
        raise ValueError(f"{path} has {len(items)} samples; an audit row needs at least {n}: add prompts")
    return items


def prompt_work(
    name: str, items: tuple[Item, ...], protocols: Sequence[Any], count: Callable[[str], int]
) -> list[Work]:
    """Return the cells of a user's own samples, one per protocol, with `name` in place of a task's name.

    The cells' context length is that of the longest sample context, in tokens by `count`. A bare prompt has no separate
    question, so only the protocol "visible" (compress the question with the context) applies to it.
    """
    split = all(item.question for item in items)
    allowed = [p for p in dict.fromkeys(protocols) if split or p == "visible"] or ["visible"]
    context = max(count(item.context) for item in items)
    return [Work(Cell(name, context, protocol), items) for protocol in allowed]


def _item(line: str, where: str) -> Item:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as cause:
        raise ValueError(f"{where} is not JSON: {cause.msg} at column {cause.colno}") from None
    except (ValueError, RecursionError) as cause:  # a number of thousands of digits, brackets thousands deep
        raise ValueError(f"{where} is not JSON that can be read: {cause}") from None
    forms = ({"prompt", "answer"}, {"context", "question", "answer"})
    fits = isinstance(record, dict) and any(
        form <= record.keys() and all(isinstance(record[key], str) and record[key] for key in form) for form in forms
    )
    if not fits:
        raise ValueError(f'{where} must have non-empty texts "prompt" and "answer", or "context", "question", "answer"')
    if any(0xD800 <= ord(c) < 0xE000 for value in record.values() if isinstance(value, str) for c in value):
        raise ValueError(f"{where} has half of a surrogate pair, which is no text: write the character itself")
    if "prompt" in record:
        return Item(record["prompt"], "", record["answer"], ends=False)
    return Item(record["context"], record["question"], record["answer"], ends=False)
