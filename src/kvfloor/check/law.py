"""Define a check: a plain function of a method and a setting that raises `Broken` if its law fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kvfloor.core.method import Method


class Broken(AssertionError):
    """Report a law that does not hold.

    It is raised explicitly, never by `assert`: the verdict is the same under `python -O`.
    """


def require(holds: bool, otherwise: str) -> None:
    """Raise Broken with the sentence `otherwise` unless `holds`."""
    if not holds:
        raise Broken(otherwise)


@dataclass(frozen=True)
class Setting:
    """Hold the conditions of a trial: the cache's dtype, the size of the GQA group, the seed of data and states."""

    dtype: torch.dtype = torch.float32
    g: int = 4
    seed: int = 0

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, g={self.g}"


@dataclass(frozen=True)
class Check:
    """Hold the check of one law, and the settings that it is tried under.

    run           the check, which raises Broken if the law does not hold
    not_claimed   returns the reason why the method does not claim this law, or None if it does
    over          "dtype" or "g" or both: the law is tried under several of each named one, and under a single value of
                  the other
    """

    run: Callable[[Method, Setting], None]
    not_claimed: Callable[[Method], str | None]
    over: tuple[Literal["dtype", "g"], ...]

    @property
    def name(self) -> str:
        return self.run.__name__.removeprefix("check_")

    @property
    def law(self) -> str:
        """Return the law in one sentence: the first line of the function's docstring."""
        return (self.run.__doc__ or "").strip().partition("\n")[0]
