"""Plan what an audit measures: its settings (methods x budgets, and the baselines), and the samples of each cell.

A setting is a method with its budget. A baseline is a setting that every audit measures, for comparison. A cell is a
task at a context length under a protocol: "after" asks a sample's question after its context is compressed, "visible"
before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvfloor.audit.chat import PLAIN, Chat
from kvfloor.audit.protocols import PROTOCOLS
from kvfloor.audit.rows import Cell
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.core.budget import Budget, parse_budget
from kvfloor.core.method import Method, standard_law
from kvfloor.methods.grammar import parse
from kvfloor.tasks import Question, Task, expand, lookup

BASELINES = {
    "exact": "keeps every token at full precision",
    "quant(bits=8)": "keeps every token at 8 bits",
    "quant(bits=4)": "keeps every token at 4 bits",
    "random": "keeps a random sample of the tokens: the control every idea must beat",
    "window": "keeps the most recent tokens (recency)",
    "sinks": "keeps the first tokens and the most recent ones",
}
"""Describe in words each method that every audit compares with."""

METHODS = ("h2o", "snapkv")
BUDGETS = {True: ("64", "192"), False: ("25%", "50%")}
"""Budgets for the built-in model (True) and any other (False)."""
TASKS = ("recall", "passkey64", "vartrack", "registers")


@dataclass(frozen=True)
class Item:
    """Hold one sample as text: its context, and the questions about it that are asked in one conversation."""

    context: str
    turns: tuple[Question, ...]

    @property
    def question(self) -> str:
        """Return the first question."""
        return self.turns[0].ask

    @property
    def answer(self) -> str:
        """Return the right answer to the first question."""
        return self.turns[0].answer

    @property
    def split(self) -> bool:
        """Return True if the sample has a question apart from its context; False for a bare prompt."""
        return bool(self.turns[0].ask)


@dataclass(frozen=True)
class Work:
    """Hold one cell of the audit (task, context length, protocol) and its samples.

    chat: True if the samples are put into the model's chat template.
    """

    cell: Cell
    items: tuple[Item, ...]
    chat: bool = False


def settings(methods: Iterable[str], budgets: Sequence[str]) -> list[BudgetedMethod]:
    """Return the settings of an audit: every method under every budget, the baselines first, none of them twice.

    methods  texts of methods, e.g. `h2o`. One with a budget, e.g. `h2o@256`, runs under that budget alone; one that
             takes no budget runs once
    budgets  texts of budgets, e.g. `256`, `25%`, `64MiB`
    A baseline that is also among `methods` is marked as a baseline and as asked for. Raises ValueError for an unknown
    method, and for a budget smaller than the number of tokens that the method protects from eviction.
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
    """Raise ValueError unless every name is a protocol ("after" or "visible") and there is at least one."""
    unknown = [name for name in protocols if name not in PROTOCOLS]
    if unknown or not protocols:
        raise ValueError(f"protocol {(unknown or ['none'])[0]!r}: choose from {', '.join(PROTOCOLS)}")


def chosen_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names, each once.

    A name is that of a built-in task, e.g. "recall"; of a group of tasks, e.g. "ruler"; or `module:TASK` for a task in
    the user's own module. Raises ValueError for a name that is no task, for two tasks of one name, and for an empty
    list.
    """
    if not names:
        raise ValueError(f"an audit needs at least one task, for example --tasks {TASKS[0]}")
    tasks = [lookup(name) for name in dict.fromkeys(expand(names))]
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
    chat: Chat = PLAIN,
) -> list[Work]:
    """Return the cells of an audit (tasks x contexts x protocols) with `n` generated samples each.

    tasks, contexts, protocols  names of tasks, context lengths in tokens, names of protocols
    seed                        seed of the samples, which are the same for every protocol
    count                       function that returns the number of tokens of a text; a sample's context has at most as
                                many as the cell's context length
    chat                        rule that decides which tasks are put into the model's chat template
    """
    work = []
    for task in chosen_tasks(tasks):
        for context in dict.fromkeys(contexts):
            items = _items(task, context, range(n), seed, count, chat)
            wrapped = chat.takes(task.chat)
            work += [Work(Cell(task.name, context, one), items, wrapped) for one in dict.fromkeys(protocols)]
    return work


def round_work(
    cell: Cell, tasks: Sequence[str], n: int, seed: int, count: Callable[[str], int], chat: Chat = PLAIN
) -> Work:
    """Return a cell with the `n` generated samples of its round: round 1 has samples 0 to n - 1, round 2 the next n.

    cell         the cell, with the number of the round
    tasks        names of the audit's tasks, as for `task_work`; the cell's task is among them
    seed, count  seed of the samples, and function that returns the number of tokens of a text
    chat         rule that decides which tasks are put into the model's chat template
    """
    task = next(one for one in chosen_tasks(tasks) if one.name == cell.task)
    items = _items(task, cell.context, range((cell.round - 1) * n, cell.round * n), seed, count, chat)
    return Work(cell, items, chat.takes(task.chat))


def _items(
    task: Task, context: int, indices: range, seed: int, count: Callable[[str], int], chat: Chat
) -> tuple[Item, ...]:
    """Return a task's generated samples of these indices, each with a context of at most `context` tokens.

    Tokens are counted by `count`, or by `chat.count` if the task is put into the chat template. Raises ValueError if
    the samples differ in their number of questions.
    """
    size = chat.count if chat.takes(task.chat) and chat.count else count
    samples = [task.generate(seed, i, context, count=size) for i in indices]
    items = tuple(Item(one.context, one.turns) for one in samples)
    if len({len(item.turns) for item in items}) > 1:
        raise ValueError(f"the samples of {task.name} differ in their number of turns: give all the same number")
    return items


def prompt_work(
    name: str,
    items: tuple[Item, ...],
    protocols: Sequence[Any],
    count: Callable[[str], int],
    chat: Chat = PLAIN,
) -> list[Work]:
    """Return the cells of a user's own samples, one per protocol, with `name` in place of a task's name.

    items  the samples
    count  function that returns the number of tokens of a text; the cells' context length is that of the longest sample
    chat   rule that decides if the samples are put into the model's chat template
    If a sample is a bare prompt without a separate question, only one cell is returned, with the protocol "visible".
    """
    allowed = [p for p in dict.fromkeys(protocols) if p == "visible" or all(item.split for item in items)]
    wrapped = chat.takes(True)
    size = chat.count if wrapped and chat.count else count
    context = max(size(item.context) for item in items)
    return [Work(Cell(name, context, protocol), items, wrapped) for protocol in allowed or ["visible"]]
