"""An audit on a Ray cluster has the rows of one in this process, even if workers die."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfloor.audit.cluster import Cluster
from kvfloor.audit.run import run
from tests.audit.replaying import small, without_times

DEADLY = """
import os
from dataclasses import dataclass
from kvfloor.methods.policies.window import Window

@dataclass(frozen=True)
class Deadly(Window):
    name = "deadly"
    def open(self, *arguments, **named):
        os.kill(os.getpid(), 9)
"""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return Ray, with a cluster of its own whose workers have one thread each."""
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ray
    ray.shutdown()
    torch.set_num_threads(before)


def asked(out: Path, **changes: Any) -> Any:
    return small(out, **{"texts": ("mixture-0",), "continuation": 512} | changes)


def test_rows_equal_those_of_one_process_though_a_worker_dies(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(asked(tmp_path / "local"), lambda total, text: None)
    workers: list[Any] = []
    start = Cluster._start

    def started(self: Cluster) -> None:
        start(self)
        workers.append(list(self._jobs.values())[-1][0])

    monkeypatch.setattr(Cluster, "_start", started)
    steps: list[str] = []

    def track(total: int, text: str) -> None:
        steps.append(text)
        if len(steps) == 6:
            for worker in workers[:2]:
                ray.kill(worker)

    run(asked(tmp_path / "ray", engine="ray", workers=2), track)
    assert len(workers) == 4 and not ray.is_initialized()
    assert without_times(tmp_path / "ray") == without_times(tmp_path / "local")


@pytest.mark.usefixtures("ray")
def test_a_measurement_that_kills_its_workers_ends_the_audit_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly_policy.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    question = asked(tmp_path / "out", methods=("deadly_policy:Deadly",), tasks=(), engine="ray", workers=1)
    with pytest.raises(ValueError, match=r"^3 Ray workers died while they measured deadly.*@16 on mixture-0, 64 "):
        run(question, lambda total, text: None)
    assert (tmp_path / "out/nats.jsonl").read_text().count("\n") == 6


@pytest.mark.usefixtures("ray")
def test_what_a_worker_refuses_and_a_cluster_without_room_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="positions of the model 'builtin'"):
        run(asked(tmp_path / "out", contexts=(60_000,), engine="ray", workers=1), lambda total, text: None)
    many = (os.cpu_count() or 1) + 1
    with pytest.raises(ValueError, match=r"has room for \d+ workers of 1 threads each"):
        run(asked(tmp_path / "out", engine="ray", workers=many), lambda total, text: None)
    with pytest.raises(ValueError, match=r"Ray cannot be reached at '127.0.0.1:1'"):
        run(asked(tmp_path / "out", engine="ray", ray_address="127.0.0.1:1"), lambda total, text: None)


def test_missing_ray_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"--engine ray needs Ray: pip install 'kvfloor\[ray\]'"):
        run(asked(tmp_path / "out", engine="ray"), lambda total, text: None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": "spark"}, "--engine 'spark': choose from local, ray"),
        ({"workers": 2}, "--workers and --ray-address are for --engine ray"),
        ({"ray_address": "x"}, "--workers and --ray-address are for --engine ray"),
        ({"engine": "ray", "minutes": 3}, "--minutes plans for one process"),
        ({"engine": "ray", "workers": 0}, "--workers 0: give at least 1"),
    ],
)
def test_engines_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        run(asked(tmp_path / "out", **changes), lambda total, text: None)
    assert not (tmp_path / "out").exists()
