"""The examples run on the built-in model and print the figures that they are there to show."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> list[str]:
    """The lines that the example named by the test's marker prints."""
    torch.set_num_threads(1)
    runpy.run_path(str(FOLDER / request.param), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def number(pattern: str, line: str) -> int:
    found = re.search(pattern, line)
    assert found is not None, line
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("printed", ["chat_under_a_byte_budget.py"], indirect=True)
def test_a_chat_stays_under_its_bytes_and_remembers(printed: list[str]) -> None:
    *turns, total = printed
    assert len(turns) == 7
    sizes = [number(r"cache ([\d,]+) bytes", line) for line in turns]
    assert all(0 < size <= 2**20 for size in sizes) and len(set(sizes)) == 1
    assert number(r"a usual cache ([\d,]+)", total) > 9 * 2**20
    assert re.search(r"is (\d+) \(wanted \1\)", turns[-1])  # what was said 2,000 tokens ago
    assert number(r"right (\d) of 7", total) >= 6


@pytest.mark.parametrize("printed", ["long_document_in_chunks.py"], indirect=True)
def test_a_long_document_fits_a_small_cache(printed: list[str]) -> None:
    wanted = re.search(r"\.\.\. (\d+)$", printed[0])
    assert wanted is not None
    exact, window, chosen = printed[1:]
    for line in (exact, chosen):
        assert line.endswith(f"answered {wanted[1]}")
    assert not window.endswith(f"answered {wanted[1]}")
    for line in (window, chosen):
        assert number(r"held +([\d,]+)", line) <= 256 + 31
        assert 10 * number(r"peak +([\d,]+)", line) < number(r"peak +([\d,]+)", exact)


@pytest.mark.parametrize("printed", ["padded_batch.py"], indirect=True)
def test_padded_rows_are_as_they_are_alone(printed: list[str]) -> None:
    *rows, _ = printed
    assert len(rows) == 3 and [number(r"and +(\d+) pads", line) > 0 for line in rows] == [True, True, False]
    for line in rows:
        assert line.endswith(", as it does alone") and re.search(r"answered (\d+) \(wanted \1\)", line)
        assert number(r"kept +(\d+)", line) <= 96 + 31


def test_no_example_is_left_out() -> None:
    tested = re.findall(r'\["(\w+\.py)"\], indirect', Path(__file__).read_text(encoding="utf-8"))
    assert sorted(tested) == sorted(path.name for path in FOLDER.glob("*.py"))
