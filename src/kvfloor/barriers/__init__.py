"""Barriers: one hard instance per theorem, each played against any method. docs/floors.md has the proofs."""

from collections.abc import Callable
from typing import Any

from kvfloor.barriers import spike
from kvfloor.barriers.spike import Result
from kvfloor.method import Method

BARRIERS: dict[str, Callable[..., Result]] = {"spike": spike.play}


def play(method: Method | str, *, barrier: str = "spike", **arguments: Any) -> Result:
    """Play the named barrier with its own arguments (`kvfloor.barriers.spike.play` lists them).

    Raises ValueError listing the barriers there are, and whatever the barrier refuses.
    """
    if barrier not in BARRIERS:
        raise ValueError(f"barrier must be one of {', '.join(BARRIERS)}, got {barrier!r}")
    return BARRIERS[barrier](method, **arguments)


__all__ = ["BARRIERS", "Result", "play"]
