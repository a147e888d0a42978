"""Measure on a model that is sharded by tensor parallelism over several processes, the ranks: rank 0 leads the others.

Rank 0 runs the audit: it alone plans, reads the clock, writes files and prints. Each rank has a `Worker`, which holds
its part of the model and measures. A forward of a sharded model needs all ranks. So rank 0 sends each call of its
worker to the other ranks, and these make the same call. Afterwards all ranks wait for each other. The results are the
same on all ranks; only rank 0 uses them.

A setting is a method with its budget. A place is a text, or a cell of the tasks (task, context length, protocol). A row
is the result of one setting on one place. The setting `exact` keeps every token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kvfloor.audit.closer import Closer
from kvfloor.audit.grid import AnyRow, Grid, Place
from kvfloor.audit.journal import Measured
from kvfloor.audit.nats import TextRow
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.rows import Row
from kvfloor.audit.worker import Worker

_WAIT = timedelta(days=30)  # of a rank for the next call
_SAY_SECONDS = 10  # an error of all ranks is told by rank 0, whose end ends the others before they speak

_calls: Any = None  # the group of all ranks, on the CPU, through which rank 0 tells the others its calls


def ranks_started() -> tuple[int, int] | None:
    """Return (rank of this process, number of ranks), which torchrun sets in the environment; None if it did not."""
    rank, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return None if rank is None or count is None else (int(rank), int(count))


def join() -> None:
    """Connect this process with the other ranks. Every rank calls this once. Raises ValueError if GPUs are too few."""
    global _calls
    backend, place = "gloo", int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if place >= torch.cuda.device_count():
            raise ValueError(
                f"--tp needs a GPU for each rank, and this machine has {torch.cuda.device_count()}: start fewer ranks"
            )
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    _calls = dist.new_group(backend="gloo", timeout=_WAIT)


class Lead:
    """Measure on rank 0 with the methods of a `Worker`; each call is sent to the other ranks, which make it too."""

    def __init__(self, question: AuditRequest, folder: Path, track: Callable[[str], None]) -> None:
        """Load the model in `folder` on all ranks, each its own part, and make the texts and samples of the audit.

        question  the arguments of the audit
        track     function that is called with a line of text before each long step
        Raises ValueError for a text that is too short, and for contexts longer than the model's positions.
        """
        _tell("load", folder.absolute())
        self._worker = Worker(question, folder, track)
        _meet()

    @property
    def grid(self) -> Grid:
        """Return the places and settings of the audit."""
        return self._worker.grid

    def tokens(self, place: Place) -> int:
        """Return the number of tokens that one setting reads on a place."""
        return self._worker.tokens(place)

    def open(self, place: Place) -> None:
        """Compute and keep the data that all settings share on a place, e.g. the exact cache's logits on a text."""
        _tell("open", place)
        self._worker.open(place)
        _meet()

    def measure(self, place: Place, setting: str, exact: AnyRow | None) -> Measured:
        """Measure a setting, given as text, on a place, and return its row.

        exact: the row of the setting `exact` on this place; None while `exact` itself is measured.
        """
        _tell("measure", place, setting, exact)
        found = self._worker.measure(place, setting, exact)
        _meet()
        return found

    def look_closer(
        self, rows: Sequence[Row], texts: Sequence[TextRow], answer: Recommendation, track: Callable[[str], None]
    ) -> Closer:
        """Measure errors of the attention output and floors by kv head, and example answers, and return them.

        A floor is a lower bound on the bytes that any method needs for the head. The example answers are those of
        `exact` and of the recommended setting to the same prompts.

        rows, texts  the measured rows of the cells, and those of the texts
        answer       the recommendation that follows from these rows
        track        function that is called with a line of text before each step
        """
        _tell("look_closer", rows, texts, answer, _silent)
        found = self._worker.look_closer(rows, texts, answer, track)
        _meet()
        return found


def dismiss() -> None:
    """Tell the other ranks to end, and disconnect from them. Rank 0 calls this."""
    _tell("end")
    dist.destroy_process_group()


def follow(question: AuditRequest) -> None:
    """Make every call that rank 0 sends, until it sends the end. Every rank but 0 calls this.

    question: the arguments of the audit. Any error of this rank is raised as a ValueError that names the rank. The
    process must then end, so that torchrun ends the other ranks.
    """
    worker: Worker | None = None
    try:
        while (call := _heard())[0] != "end":
            name, *arguments = call
            if name == "load":
                worker = Worker(question, arguments[0], _silent)
            else:
                getattr(worker, name)(*arguments)
            _meet()
    except Exception as cause:
        time.sleep(_SAY_SECONDS)
        raise ValueError(f"rank {dist.get_rank()}: {type(cause).__name__}: {cause}") from cause
    dist.destroy_process_group()


def _tell(name: str, *arguments: Any) -> None:
    dist.broadcast_object_list([(name, *arguments)], src=0, group=_calls)


def _heard() -> tuple[Any, ...]:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0, group=_calls)
    return box[0]


def _meet() -> None:
    """Wait until every rank has made the same call of `_meet`."""
    dist.barrier(group=_calls)


def _silent(text: str) -> None:
    del text
