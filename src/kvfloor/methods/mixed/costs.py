"""Read and write the costs of methods in single layers of a model, as they were measured on texts.

The cost of a method in a unit is the KL divergence of the model's next-token predictions from exact ones, in nats per
token, if the unit's layers have this method and all other layers keep every token. A unit is a run of adjacent
compressed layers, i.e. layers with attention over all tokens; mostly it is one layer. The file is one JSON document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from kvfloor.core.budget import size_bytes
from kvfloor.files import read_regular, replace_file
from kvfloor.methods.grammar import parse
from kvfloor.splitting import shortened

SCHEMA = 1
MOST_BYTES = 2**26
_WHAT = "file of costs"


@dataclass(frozen=True)
class LayerCost:
    """Hold the cost of one method in one unit.

    first, last  indices of the unit's first and last layer, among the compressed layers
    method       the method as text; its budget, if it has one, is in tokens or a share of the context
    nats         mean KL divergence in nats per token; low, high: its 95 % interval over blocks of the scored tokens
    """

    first: int
    last: int
    method: str
    nats: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (isinstance(self.first, int) and isinstance(self.last, int) and 0 <= self.first <= self.last):
            raise ValueError(f"a unit has layers first <= last, got {self.first!r} and {self.last!r}")
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (self.nats, self.low, self.high)):
            raise ValueError(f"the cost of {shortened(str(self.method))} is no finite number of nats")
        budget = parse(self.method).budget
        if isinstance(budget, str) and size_bytes(budget) is not None:
            raise ValueError(f"{self.method}: the budget of one layer's method is in tokens or a share, not in bytes")


@dataclass(frozen=True)
class CostTable:
    """Hold the costs of methods in all units of a model, and what they were measured on.

    model    the model's fingerprint (`kvfloor.hf.fingerprint`)
    layers   number of compressed layers of the model
    texts    names of the texts; context, scored: tokens taken in before, and tokens predicted, of each text
    rows     the costs, unit after unit; the units are all layers in their order, each once
    Raises ValueError if they are not, and if a unit has a method twice.
    """

    model: Mapping[str, Any]
    layers: int
    texts: tuple[str, ...]
    context: int
    scored: int
    rows: tuple[LayerCost, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.model, Mapping) or not isinstance(self.model.get("sha256"), str):
            raise ValueError(f"it names no model by its digest, but {self.model!r}")
        next_layer = 0
        for (first, last), rows in self.units():
            if first != next_layer:
                raise ValueError(f"the costs of layer {next_layer} are missing or not in the layers' order")
            if len({row.method for row in rows}) < len(rows):
                raise ValueError(f"layers {first} to {last} have a method twice")
            next_layer = last + 1
        if next_layer != self.layers:
            raise ValueError(f"the costs are for {next_layer} of {self.layers} layers")

    def as_dict(self) -> dict[str, Any]:
        """Return the table as a dict of JSON types."""
        return asdict(self)

    def units(self) -> Iterator[tuple[tuple[int, int], list[LayerCost]]]:
        """Yield ((first layer, last layer), costs) of each unit, in the layers' order."""
        for unit, rows in groupby(self.rows, key=lambda row: (row.first, row.last)):
            yield unit, list(rows)


def write_costs(path: str | Path, table: CostTable) -> None:
    """Write the table to the file `path`; a failed write leaves the file as it was."""
    replace_file(path, json.dumps({"schema": SCHEMA, **table.as_dict()}, allow_nan=False, indent=0) + "\n")


def read_costs(path: str | Path) -> CostTable:
    """Read the table that `write_costs` wrote to `path`.

    Raises ValueError naming the file if it cannot be read, has more than MOST_BYTES, or is no such table.
    """
    data = read_regular(path, MOST_BYTES, _WHAT)
    try:
        plain = json.loads(data)
        if not isinstance(plain, dict) or plain.pop("schema", None) != SCHEMA:
            raise ValueError(f'it has no "schema": {SCHEMA}')
        if plain.keys() != {field.name for field in fields(CostTable)}:
            raise ValueError(f"it has the fields {', '.join(plain)}")
        rows = tuple(LayerCost(**row) for row in plain.pop("rows"))
        return CostTable(
            plain["model"], plain["layers"], tuple(plain["texts"]), plain["context"], plain["scored"], rows
        )
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as cause:
        raise ValueError(f"{str(path)!r} is no file of costs that kvfloor measure-layers wrote: {cause}") from cause
