"""Measure the settings of an audit on a Ray cluster: each worker is a process with the model in its memory.

The driver is the process that the user started. It gives each free worker one measurement, and records each row that
comes back. A setting is a method with its budget. A place is a text, or a cell of the tasks (task, context length,
protocol). A measurement is a pair of place and setting, and its result is a row. The journal holds the rows, in memory
and in files. The setting `exact` keeps every token; the others are compared with its rows. The identity of an audit is
a dict of all that its rows depend on, such as file digests and versions.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvfloor.audit.clock import Clock
from kvfloor.audit.closer import Closer
from kvfloor.audit.engine import exact_row
from kvfloor.audit.grid import AnyRow, Asked, Grid, Pair, Place
from kvfloor.audit.handout import Handout
from kvfloor.audit.identity import differences, identity
from kvfloor.audit.journal import Journal, Measured
from kvfloor.audit.nats import TextRow
from kvfloor.audit.plan import settings
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.rows import Row
from kvfloor.audit.worker import Worker
from kvfloor.models.load import find

MOST_DEATHS = 3
"""Workers that may die on one measurement, before the audit ends with an error."""

_SECONDS = 10  # to wait for an answer of a cluster
_STORE_BYTES = 2**28  # of Ray's shared memory, when it is started here: rows are small


class Remote:
    """Measure settings inside a Ray worker, on calls from the driver."""

    def open(self, question: AuditRequest, known: dict[str, Any], folder: str, threads: int) -> Grid:
        """Load the model, and return the audit's places and settings.

        question  the arguments of the audit
        known     the identity of the audit as the driver found it
        folder    the driver's working folder, to which relative paths refer
        threads   number of torch threads, the same as in the driver, so that results have the same rounding
        Raises ValueError if this process finds another identity, e.g. another version of torch.
        """
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        torch.set_num_threads(threads)
        if os.path.isdir(folder):
            os.chdir(folder)
            sys.path.insert(0, folder)
        model = find(question.model, question.accept_terms)
        plan = settings(question.methods, question.budget_texts)
        names = differences(identity(question, plan, model), known)
        if names:
            raise ValueError(
                f"a Ray worker on {os.uname().nodename} has another {', '.join(names)} than this process: install the "
                "same versions on every node, and put the model and files where all nodes see them"
            )
        self._worker = Worker(question, model, lambda text: None)
        return self._worker.grid

    def measure(self, place: Place, setting: str, exact: AnyRow | None) -> Measured:
        """Measure a setting, given as text, on a place, and return its row.

        exact: the row of `exact` on this place; None while `exact` itself is measured. With the row of `exact` on a
        cell come the floors of the kv heads, i.e. lower bounds on the bytes that any method needs.
        """
        return self._worker.measure(place, setting, exact)

    def look_closer(self, rows: list[Row], texts: list[TextRow], answer: Recommendation) -> Closer:
        """Measure errors of the attention output and floors by kv head, and example answers, and return them.

        A floor is a lower bound on the bytes that any method needs for the head. The example answers are those of
        `exact` and of the recommended setting to the same prompts.

        rows, texts  the measured rows of the cells, and those of the texts
        answer       the recommendation that follows from these rows
        """
        return self._worker.look_closer(rows, texts, answer, lambda text: None)


class Cluster:
    """Measure with several workers of a Ray cluster.

    The cluster is a running one if an address is given (in the audit's arguments or RAY_ADDRESS), else it is started on
    this machine.
    """

    def __init__(
        self, question: AuditRequest, folder: Path, known: dict[str, Any], track: Callable[[str], None]
    ) -> None:
        """Start the workers, and wait until one of them has loaded the model.

        question  the arguments of the audit
        folder    not used: every worker finds the model on its own machine
        known     the identity of the audit
        track     function that is called with a line of text before a long step
        Raises ValueError if Ray is missing, or if the cluster is too small or cannot be reached.
        """
        del folder  # every worker finds the model on its own node
        self._ray = _ray()
        track("starting Ray workers")
        self._started_ray = not self._ray.is_initialized()
        self._jobs: dict[Any, tuple[Any, Pair | None]] = {}  # future -> (worker, its pair; None: it opens)
        try:
            if self._started_ray:
                _connect(self._ray, question.ray_address)
            self._threads = torch.get_num_threads()
            self._opening = (question, known, os.getcwd(), self._threads)
            self._remote = self._ray.remote(num_cpus=self._threads, max_restarts=0)(Remote)
            self._deaths: Counter[Pair | None] = Counter()
            for _ in range(_count(self._ray, question.workers, self._threads)):
                self._start()
            while (grid := self._finished()[2]) is None:
                pass
            self._grid: Grid = grid
        except BaseException:
            self.close()
            raise

    def look_closer(
        self, rows: Sequence[Row], texts: Sequence[TextRow], answer: Recommendation, track: Callable[[str], None]
    ) -> Closer:
        """Have one worker measure errors of the attention output and floors by kv head, and example answers.

        They are returned. A floor is a lower bound on the bytes that any method needs for the head. The example answers
        are those of `exact` and of the recommended setting to the same prompts.

        rows, texts  the measured rows of the cells, and those of the texts
        answer       the recommendation that follows from these rows
        track        function that is called with a line of text before the work
        """
        track("errors by head and example answers")
        try:
            return self._ray.get(self._first.look_closer.remote(list(rows), list(texts), answer))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayError as error:
            raise ValueError(
                f"the Ray worker died that measured errors by head ({type(error).__name__}): all rows are kept, and "
                "the same command goes on from there"
            ) from error

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here."""
        for worker, _ in self._jobs.values():
            self._ray.kill(worker)
        if self._started_ray:
            self._ray.shutdown()

    @property
    def grid(self) -> Grid:
        """Return the places and settings of the audit."""
        return self._grid

    def measure(self, asked: Asked, journal: Journal, clock: Clock, track: Callable[[str], None]) -> None:
        """Have the workers make every measurement that is asked for and has no row, and add its row to the journal.

        asked    function that returns the measurements to make, given the rows so far
        journal  the recorded rows
        clock    not used: an audit on a cluster has no time limit
        track    function that is called with a line of text before each measurement
        A measurement whose worker died is given to another worker. Raises ValueError if 3 workers (MOST_DEATHS) died on
        one measurement.
        """
        del clock  # no limit of minutes: `AuditRequest.check`
        handout = Handout(journal.missing(asked(journal.rows)), journal.rows)
        idle = [self._first]
        while True:
            for worker in list(idle):
                pair = handout.next(worker)
                if pair is not None:
                    track(f"{pair[0]}: {pair[1]}")
                    idle.remove(worker)
                    future = worker.measure.remote(*pair, exact_row(journal, *pair))
                    self._jobs[future] = worker, pair
            if not journal.missing(asked(journal.rows)):
                return
            worker, pair, result = self._finished()
            if isinstance(result, Measured) and pair is not None:
                journal.add(result)
                handout.done(pair)
                handout.keep(asked(journal.rows))
            if result is None:
                handout.lost(worker, pair)
            else:
                idle.append(worker)

    def _start(self) -> None:
        worker = self._remote.remote()
        self._jobs[worker.open.remote(*self._opening)] = worker, None

    def _finished(self) -> tuple[Any, Pair | None, Any]:
        """Wait until a worker finishes or dies, and return (worker, its measurement, its result).

        The result is a `Measured`, i.e. a row. If the worker was loading the model, the measurement is None and the
        result is a `Grid`, the audit's places and settings. If the worker died, the result is None, and a new worker is
        started in its place. Raises the worker's own exception, and ValueError if 3 workers (MOST_DEATHS) died on one
        measurement, or while they were loading the model.
        """
        (future, *_), _ = self._ray.wait(list(self._jobs), num_returns=1)
        worker, pair = self._jobs.pop(future)
        try:
            result = self._ray.get(future)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except self._ray.exceptions.RayError as error:
            self._deaths[pair] += 1
            if self._deaths[pair] >= MOST_DEATHS:
                doing = f"measured {pair[1]} on {pair[0]}" if pair else "loaded the model"
                raise ValueError(
                    f"{MOST_DEATHS} Ray workers died while they {doing} ({type(error).__name__}): is there memory for "
                    "a model in each worker? Start fewer with --workers"
                ) from error
            self._start()
            return worker, pair, None
        self._first = worker
        return worker, pair, result


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'kvfloor[ray]'") from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    """Connect the imported module `ray` to the Ray cluster at an address, or start a cluster on this machine.

    address: such as "host:port"; None: the one in the variable RAY_ADDRESS; if that is not set, a cluster is started.
    Raises ValueError if the cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    more = {"include_dashboard": False, "object_store_memory": _STORE_BYTES} if address == "local" else {}
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **more)
    except Exception as error:  # of several kinds, by address
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"Ray cannot be reached at {address!r} ({reason}): check --ray-address") from error


def _reach(address: str) -> None:
    """Raise OSError if nothing answers at an address of the form host:port.

    Without this check, Ray would wait for minutes before it fails. An address of another form is not tried.
    """
    found = re.fullmatch(r"(?:\[?)([^\]/]+?)(?:\]?):([0-9]{1,5})", address)
    if found is not None:
        socket.create_connection((found[1], int(found[2])), timeout=_SECONDS).close()


def _count(ray: Any, workers: int | None, threads: int) -> int:
    """Return the number of workers to start.

    ray      the imported module, connected to the cluster
    workers  the number that the user asked for; None: as many as the cluster has processors for
    threads  number of processors that each worker takes
    Raises ValueError if the cluster has too few processors.
    """
    room = int(ray.cluster_resources().get("CPU", 0)) // threads
    if workers is None and room:
        return room
    if workers is None or workers > room:
        raise ValueError(
            f"the Ray cluster has room for {room} workers of {threads} threads each: give --workers up to that, or set "
            "OMP_NUM_THREADS lower"
        )
    return workers
