"""Hold what a benchmark is asked to measure, and refuse impossible wishes before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kvfloor.bench.records import BenchRow, OperatorShare
from kvfloor.files import open_folder
from kvfloor.statistics import LEAST_FOR_MEDIAN

PARTS = {
    "read": "one decode step's read, beside a plain read of the same bytes and torch's attention",
    "token": "one decoded token of two models, with stock and with compressed caches",
    "prefill": "a prompt through one layer's attention, streamed and dense",
    "append": "a token's cost for every method of constant memory, from young to old states",
    "start": "the default audit, the import, the command line's help, the install",
    "kvpress": "a prompt with its compression, and a token after it, beside kvpress",
}
"""Map each part's name to what it times."""

Found = BenchRow | OperatorShare | str


@dataclass(frozen=True)
class BenchRequest:
    """Hold one run's wishes.

    parts    names of parts, of PARTS; or their letters a to f
    quick    True for a short run: fewer contexts, models and turns
    repeats  most turns of a comparison; None: 60, or 20 in a quick run
    threads  torch's threads where a target does not ask for one; None: torch's own number
    profile  True to profile decoded tokens too
    path     file for the JSON document; None: none
    command  the command line, for the document
    """

    parts: Sequence[str] = tuple(PARTS)
    quick: bool = False
    repeats: int | None = None
    threads: int | None = None
    profile: bool = False
    path: Path | None = None
    command: str = "kvfloor bench"

    @property
    def turns(self) -> int:
        """Return the most turns of a comparison."""
        return self.repeats or (20 if self.quick else 60)

    @property
    def seconds(self) -> float:
        """Return the seconds after which a comparison begins no further turn."""
        return 2.0 if self.quick else 15.0

    def names(self) -> tuple[str, ...]:
        """Return the parts' names in the order of PARTS, each once. Raises ValueError for an unknown part."""
        by_letter = dict(zip("abcdef", PARTS, strict=True))
        chosen = [by_letter.get(part, part) for part in self.parts]
        unknown = [part for part in chosen if part not in PARTS]
        if unknown or not chosen:
            given = f"unknown part {unknown[0]!r}" if unknown else "no part is given"
            raise ValueError(f"{given}: --parts takes {', '.join(PARTS)}, or their letters a to f")
        return tuple(part for part in PARTS if part in chosen)

    def check(self) -> None:
        """Raise ValueError for an unknown part, for numbers out of range, and for a file that cannot be written."""
        self.names()
        if self.repeats is not None and self.repeats < LEAST_FOR_MEDIAN:
            raise ValueError(
                f"--repeats must be at least {LEAST_FOR_MEDIAN}, the fewest turns with a 95 % interval of a median; "
                f"got {self.repeats}"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {self.threads}")
        if self.path is not None:
            if self.path.is_dir():
                raise ValueError(f"cannot write {str(self.path)!r}: it is a folder; name a file in it")
            open_folder(self.path.parent)


Part = Callable[[BenchRequest], Iterator[Found]]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's threads to `count`, and set the old number back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, such as "float32"."""
    return str(dtype).removeprefix("torch.")
