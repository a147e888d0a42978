"""Describe the run that a report's rows come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Meta:
    """Record the source of a report's numbers.

    model       the model's name or path, as the user gave it
    seed        what every task and method was seeded with
    command     the line that makes this report again
    versions    name -> version of what took part (kvfloor, torch, transformers, python, ...)
    machine     the machine in words
    duration_s  how long the audit took
    notes       further plain sentences, e.g. which cells were cut and why
    """

    model: str
    seed: int
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    duration_s: float = 0.0
    notes: tuple[str, ...] = ()
