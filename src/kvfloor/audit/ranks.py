"""Measure on a model that is sharded by tensor parallelism over several processes, the ranks: rank 0 leads the others.

Rank 0 runs the audit: it alone plans, reads the clock, writes files and prints. Before it measures anything, it tells
the other ranks what, and all ranks make the same call of the same worker, because a forward of a sharded model needs
them all. Afterwards they wait for each other. What the other ranks find is the same, and is dropped.
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
    """Return (rank, number of ranks) of this process, as torchrun sets them in the environment; None if it did not."""
    rank, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return None if rank is None or count is None else (int(rank), int(count))


def join() -> None:
    """Connect this process with the other ranks; each calls this once. Raises ValueError where GPUs are too few."""
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
    """Measure as a `Worker` does, on rank 0: tell the other ranks each call, which they make too."""

    def __init__(self, question: AuditRequest, folder: Path, track: Callable[[str], None]) -> None:
        """Load this rank's part of the model in `folder`; arguments and errors as for a `Worker`."""
        _tell("load", folder.absolute())
        self._worker = Worker(question, folder, track)
        _meet()

    @property
    def grid(self) -> Grid:
        """Return the places and settings of the audit."""
        return self._worker.grid

    def tokens(self, place: Place) -> int:
        """Return the number of tokens that one setting takes in on a place."""
        return self._worker.tokens(place)

    def open(self, place: Place) -> None:
        """Compute what all settings share on a place."""
        _tell("open", place)
        self._worker.open(place)
        _meet()

    def measure(self, place: Place, setting: str, exact: AnyRow | None) -> Measured:
        """Measure a setting on a place; `exact` is the row of the setting `exact` there, None for `exact` itself."""
        _tell("measure", place, setting, exact)
        found = self._worker.measure(place, setting, exact)
        _meet()
        return found

    def look_closer(
        self, rows: Sequence[Row], texts: Sequence[TextRow], answer: Recommendation, track: Callable[[str], None]
    ) -> Closer:
        """Measure what explains an audit's result, given its rows."""
        _tell("look_closer", rows, texts, answer, _silent)
        found = self._worker.look_closer(rows, texts, answer, track)
        _meet()
        return found


def dismiss() -> None:
    """End the other ranks' work, from rank 0."""
    _tell("end")
    dist.destroy_process_group()


def follow(question: AuditRequest) -> None:
    """Make every call that rank 0 tells, until it dismisses this rank.

    Raises ValueError, naming the rank, for whatever goes wrong here; the process must then end, so that whoever started
    it ends the others.
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
    """Wait until all ranks are here."""
    dist.barrier(group=_calls)


def _silent(text: str) -> None:
    del text
