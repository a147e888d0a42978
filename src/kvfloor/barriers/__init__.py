"""Barriers: one hard instance per theorem, each played against any method. docs/floors.md has the proofs."""

from collections.abc import Callable

from kvfloor.barriers.spike import Result, play

BARRIERS: dict[str, Callable[..., Result]] = {"spike": play}


def barrier(name: str) -> Callable[..., Result]:
    """The function that plays the named barrier; ValueError listing what there is."""
    if name not in BARRIERS:
        raise ValueError(f"barrier must be one of {', '.join(BARRIERS)}, got {name!r}")
    return BARRIERS[name]


__all__ = ["BARRIERS", "Result", "barrier", "play"]
