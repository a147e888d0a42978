"""Draw the attention-output error per layer and kv head, one map per setting (a method with its budget).

An error is averaged over the tasks, context lengths and protocols of an audit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.audit.rows import Row

FAINTEST, STRONGEST = 1e-3, 1.0
"""Errors drawn with no colour and with full colour; the scale between is logarithmic and the same for every map."""


@dataclass(frozen=True)
class Tile:
    """Hold one square of a map: a layer and kv head, its mean error, and the strength in [0, 1] of its colour."""

    layer: int
    head: int
    error: float
    ink: float


@dataclass(frozen=True)
class Heatmap:
    """Hold the map of one setting (method with budget): one tile (square) per layer and kv head.

    `overall` is the mean of the errors of all layers, over all rows of the setting.
    """

    setting: str
    overall: float
    layers: int
    heads: int
    tiles: tuple[Tile, ...]


def heatmaps(rows: Sequence[Row]) -> tuple[Heatmap, ...]:
    """Return one map per setting, in the rows' order; the setting `exact`, whose error is zero, gets none.

    Errors are averaged over the setting's rows, one per cell (task, context length, protocol). Raises ValueError where
    a setting's rows differ in their number of layers or kv heads.
    """
    settings: dict[str, list[Row]] = {}
    for row in rows:
        if row.method != "exact" and row.output_error_by_head:
            settings.setdefault(row.method, []).append(row)
    return tuple(_heatmap(setting, group) for setting, group in settings.items())


def ink(error: float) -> float:
    """Return the strength, in [0, 1], of the colour that an error is drawn with: 0 up to FAINTEST, 1 from STRONGEST on.

    The scale between is logarithmic.
    """
    if error <= FAINTEST:
        return 0.0
    return min(1.0, math.log(error / FAINTEST) / math.log(STRONGEST / FAINTEST))


def _heatmap(setting: str, rows: list[Row]) -> Heatmap:
    shapes = {tuple(len(layer) for layer in row.output_error_by_head) for row in rows}
    if len(shapes) > 1 or len(set(*shapes)) > 1:
        raise ValueError(f"{setting!r}: its rows differ in layers or kv heads: {sorted(shapes)}; audit one model")
    layers, heads = len(rows[0].output_error_by_head), len(rows[0].output_error_by_head[0])
    tiles = []
    for layer in range(layers):
        for head in range(heads):
            error = math.fsum(row.output_error_by_head[layer][head] for row in rows) / len(rows)
            tiles.append(Tile(layer, head, error, ink(error)))
    overall = math.fsum(row.output_error for row in rows) / len(rows)
    return Heatmap(setting, overall, layers, heads, tuple(tiles))
