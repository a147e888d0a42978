"""Drop: evicted tokens are forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfloor.method import Spec, Traits
from kvfloor.summaries.summary import Summary


@dataclass(frozen=True)
class Drop(Summary):
    """The default: nothing stays, so the summary's partial is empty."""

    name: ClassVar[str] = "drop"

    @property
    def traits(self) -> Traits:
        return Traits(turns=True)

    def open(self, spec: Spec) -> None:
        del spec
