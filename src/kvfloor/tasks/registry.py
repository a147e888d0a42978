"""List the tasks and their groups, and look a task up by its name, or by `module:TASK` in the user's own code.

A group is a named list of tasks: "builtin" (the tasks that the built-in model was trained on), "ruler" or "assistant".
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence

from .copying import COPY
from .instructions import INSTRUCTIONS
from .kv import KV
from .ledger import LEDGER
from .needles import NEEDLES
from .passkey import PASSKEY, PASSKEY64
from .recall import RECALL
from .registers import REGISTERS_TASK
from .ruler import RULER
from .task import Task
from .tool_call import TOOL_CALL
from .turns import TURNS_TASK
from .vartrack import VARTRACK
from .words import WORDS

TASKS: dict[str, Task] = {
    task.name: task for task in (RECALL, KV, PASSKEY, PASSKEY64, NEEDLES, VARTRACK, WORDS, COPY, REGISTERS_TASK)
}
"""Map the names of the tasks in the vocabulary of the built-in model, which was trained on them."""

GROUPS: dict[str, tuple[Task, ...]] = {
    "builtin": tuple(TASKS.values()),
    "ruler": RULER,
    "assistant": (TOOL_CALL, INSTRUCTIONS, TURNS_TASK, LEDGER),
}
"""Map each group's name to its tasks. Those of "ruler" and "assistant" are in plain English, for any tokenizer."""

EVERY: dict[str, Task] = {task.name: task for group in GROUPS.values() for task in group}
"""Map the name of every task of the package to it."""


def expand(names: Sequence[str]) -> list[str]:
    """Return the task names for a list of names of tasks and groups: a group's name gives all its tasks' names.

    "all" means the group "builtin". Any other name is returned as it is.
    """
    groups = GROUPS | {"all": GROUPS["builtin"]}
    return [one for name in names for one in ([task.name for task in groups[name]] if name in groups else [name])]


def lookup(name: str) -> Task:
    """Return the built-in task of this name, or import the task that `module:TASK` names.

    Raises ValueError for an unknown name, listing the built-in tasks, and for an import that fails or gives no usable
    task.
    """
    if ":" in name:
        return _imported(name)
    if name not in EVERY:
        near = difflib.get_close_matches(name, (*EVERY, *GROUPS), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown task {name!r}; the tasks are {', '.join(EVERY)}, the groups {', '.join(GROUPS)}, and "
            f"module:TASK brings your own{hint}"
        )
    return EVERY[name]


def _imported(name: str) -> Task:
    module, _, attribute = name.partition(":")
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as cause:
        raise ValueError(f"{name} cannot be imported: {cause}") from None
    if not isinstance(task, Task):
        raise ValueError(f"{name} is a {type(task).__name__}; give a kvfloor.tasks.Task")
    if task.name in EVERY:
        raise ValueError(f"{name} is named {task.name!r}, which is a built-in task: give it another name")
    return task
