"""The benchmarks import what is there, and draw the page that they promise."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module(request.param)


@pytest.mark.parametrize("bench", sorted(path.stem for path in BENCH.glob("*.py")), indirect=True)
def test_every_benchmark_can_be_imported(bench: ModuleType) -> None:
    assert bench.__doc__


@pytest.mark.parametrize("bench", ["streaming"], indirect=True)
def test_the_page_of_streaming_has_one_figure_per_method(bench: ModuleType) -> None:
    page = bench.page([1, 2, 4], {"h2o<@64": [1.0, 1.1, 0.9], "exact": [1.0, 1.0, 1.0]})
    assert page.count("<figure>") == 2 and "h2o&lt;@64" in page and "h2o<@64" not in page
