"""The rooms outside the wheel import what is there."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
ROOMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ("characterize", "survey", "builtin_model")
    for path in (ROOT / room).rglob("*.py")
    if not path.stem.startswith("__")
)


@pytest.fixture
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module(request.param)


@pytest.mark.parametrize("bench", sorted(path.stem for path in BENCH.glob("*.py")), indirect=True)
def test_every_benchmark_can_be_imported(bench: ModuleType) -> None:
    assert bench.__doc__


@pytest.mark.parametrize("name", ROOMS)
def test_every_module_outside_the_wheel_can_be_imported(name: str) -> None:
    assert importlib.import_module(name).__doc__
