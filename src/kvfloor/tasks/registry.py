"""The one table of built-in tasks."""

from __future__ import annotations

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
