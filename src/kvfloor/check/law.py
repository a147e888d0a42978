"""Define a check: a function that tests one law on a method under a setting, and raises `Broken` if the law fails.

A method is a KV-cache compressor. A law is a rule of docs/contract.md that its cache must obey.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kvfloor.core.method import Method


class Broken(AssertionError):
    """Report that a method breaks a law of the contract.

    It is raised explicitly, never by `assert`: the verdict is the same under `python -O`.
    """


def require(holds: bool, otherwise: str) -> None:
    """Raise Broken with the sentence `otherwise` if `holds` is False."""
    if not holds:
        raise Broken(otherwise)


@dataclass(frozen=True)
class Setting:
    """Hold the conditions under which a law is tested: the cache's dtype, the size g of the GQA group, and the seed."""

    dtype: torch.dtype = torch.float32
    g: int = 4
    seed: int = 0

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, g={self.g}"


@dataclass(frozen=True)
class Check:
    """Hold one law of the contract, and the settings under which it is tested.

    run           function of a method and a setting that raises Broken if the law fails
    not_claimed   function of a method that returns the reason why the law does not apply to it, None if it applies
    over          names of the fields of a setting, "dtype" or "g", on which the outcome may depend: the law is tested
                  for several values of these fields, and for one value of the others
    """

    run: Callable[[Method, Setting], None]
    not_claimed: Callable[[Method], str | None]
    over: tuple[Literal["dtype", "g"], ...]

    @property
    def name(self) -> str:
        return self.run.__name__.removeprefix("check_")

    @property
    def law(self) -> str:
        """Return the law in one sentence: the first line of the docstring of the check's function `run`."""
        return (self.run.__doc__ or "").strip().partition("\n")[0]
