"""Describe the audit from which a report's numbers come."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Meta:
    """Record the source of a report's numbers: the model, the command, versions and machine.

    model       the model's name or path, as the user gave it
    seed        the seed of all tasks and methods
    command     the command line that makes this report again
    versions    name -> version of each program that took part (kvfloor, torch, transformers, python, ...)
    machine     the machine in words
    duration_s  duration of the audit in seconds
    notes       further plain sentences, e.g. which tasks were left out and why
    hashes      file name -> SHA-256 of what was measured: the model's weights, texts, prompts
    """

    model: str
    seed: int
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""
    duration_s: float = 0.0
    notes: tuple[str, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
