"""Draw the attention-output error per layer and kv head, one map per setting (a KV-cache compressor with its budget).

The error is the relative l2 error of a head's attention output against the exact cache, which keeps every token. An
audit measures it for each setting on cells (task, context length, protocol) and on one text. A map shows the mean over
these.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvfloor.audit.output_errors import ErrorMap
from kvfloor.audit.rows import Row

FAINTEST, STRONGEST = 1e-3, 1.0
"""Errors drawn with no colour and with full colour; the scale between is logarithmic and the same for every map."""

_ALL_LABELS = 12  # layers up to which a map labels each of them and has room for digits


@dataclass(frozen=True)
class Tile:
    """Hold one square of a map: a layer and kv head, with its mean error.

    column  place of the layer on the map, from the left, counted from 0
    ink     strength of the square's colour, from 0 (none) to 1 (full)
    """

    column: int
    layer: int
    head: int
    error: float
    ink: float


@dataclass(frozen=True)
class Heatmap:
    """Hold the map of one setting (method with budget): one tile (square) per layer and kv head.

    overall  the setting's error, averaged over layers and over everything that it was measured on
    layers   the layers' numbers, from the left
    heads    number of kv heads per layer
    """

    setting: str
    overall: float
    layers: tuple[int, ...]
    heads: int
    tiles: tuple[Tile, ...]

    @property
    def labels(self) -> tuple[tuple[int, int], ...]:
        """Return (column, layer's number) for the columns that get a label.

        These are all columns if the map has at most 12, else every fifth.
        """
        step = 1 if len(self.layers) <= _ALL_LABELS else 5
        return tuple((column, layer) for column, layer in enumerate(self.layers) if column % step == 0)

    @property
    def numbered(self) -> bool:
        """Return True if the map has at most 12 layers: its tiles then have room for their errors in digits."""
        return len(self.layers) <= _ALL_LABELS


def heatmaps(rows: Sequence[Row | ErrorMap]) -> tuple[Heatmap, ...]:
    """Return one map per setting, in the order of `rows`; the setting `exact`, whose error is zero, gets none.

    Each of `rows` has a setting's errors by layer and head, a `Row` those on a cell, an `ErrorMap` those on a text.
    Raises ValueError where those of one setting differ in their number of layers or kv heads.
    """
    settings: dict[str, list[Row | ErrorMap]] = {}
    for row in rows:
        if row.method != "exact" and row.output_error_by_head:
            settings.setdefault(row.method, []).append(row)
    return tuple(_heatmap(setting, group) for setting, group in settings.items())


def ink(error: float) -> float:
    """Return the strength, in [0, 1], of the colour that an error is drawn with.

    It is 0 for errors up to FAINTEST (0.001), 1 from STRONGEST (1) on, and grows with the log of the error between.
    """
    if error <= FAINTEST:
        return 0.0
    return min(1.0, math.log(error / FAINTEST) / math.log(STRONGEST / FAINTEST))


def _heatmap(setting: str, rows: list[Row | ErrorMap]) -> Heatmap:
    shapes = {tuple(len(layer) for layer in row.output_error_by_head) for row in rows}
    if len(shapes) > 1 or len(set(*shapes)) > 1:
        raise ValueError(f"{setting!r}: its rows differ in layers or kv heads: {sorted(shapes)}; audit one model")
    known = [row.layers for row in rows if isinstance(row, ErrorMap)]
    layers = known[0] if known else tuple(range(len(rows[0].output_error_by_head)))
    heads = len(rows[0].output_error_by_head[0])
    tiles = []
    for column, layer in enumerate(layers):
        for head in range(heads):
            error = math.fsum(row.output_error_by_head[column][head] for row in rows) / len(rows)
            tiles.append(Tile(column, layer, head, error, ink(error)))
    overall = math.fsum(row.output_error for row in rows) / len(rows)
    return Heatmap(setting, overall, layers, heads, tuple(tiles))
