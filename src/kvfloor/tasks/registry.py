"""List the built-in tasks, and look a task up by its name, or by `module:TASK` in the user's own code."""

from __future__ import annotations

import difflib
import importlib

from .copying import COPY
from .kv import KV
from .needles import NEEDLES
from .passkey import PASSKEY, PASSKEY64
from .recall import RECALL
from .registers import REGISTERS_TASK
from .task import Task
from .vartrack import VARTRACK
from .words import WORDS

TASKS: dict[str, Task] = {
    task.name: task for task in (RECALL, KV, PASSKEY, PASSKEY64, NEEDLES, VARTRACK, WORDS, COPY, REGISTERS_TASK)
}


def lookup(name: str) -> Task:
    """Return the built-in task of this name, or import the task that `module:TASK` names.

    Raises ValueError where there is none, naming the built-in tasks or the reason why the import failed.
    """
    if ":" in name:
        return _imported(name)
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown task {name!r}; the tasks are {', '.join(TASKS)}, and module:TASK brings your own{hint}"
        )
    return TASKS[name]


def _imported(name: str) -> Task:
    module, _, attribute = name.partition(":")
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as cause:
        raise ValueError(f"{name} cannot be imported: {cause}") from None
    if not isinstance(task, Task):
        raise ValueError(f"{name} is a {type(task).__name__}; give a kvfloor.tasks.Task")
    if task.name in TASKS:
        raise ValueError(f"{name} is named {task.name!r}, which is a built-in task: give it another name")
    return task
