"""Map the error of the attention output per layer and kv head, on the first text that an audit reads.

A setting is a method with its budget. The model runs once with an exact cache, which keeps every token, over the text's
context and the first tokens of its continuation; its queries, keys and values are recorded. Each setting then answers
the recorded queries of the continuation from the recorded keys and values.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfloor.audit import traces
from kvfloor.audit.heads import HeadFloor, head_floors
from kvfloor.audit.nats import TextCell, TextRow
from kvfloor.audit.records import read_records, write_records
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.audit.texts import Excerpt
from kvfloor.core.budget import resolve
from kvfloor.core.method import Method

ASKED = 64
"""Tokens of the continuation whose attention outputs are compared."""

MOST_RECORDED_BYTES = 2**30
"""Bytes of queries, keys and values that are recorded at most; of a longer context only the beginning is."""

MOST_FLOOR_WORK = 2**22
"""`head_floors.most_work` for a text: 4 kv heads at 1,024 tokens take a hundredth of an audit's time."""

MOST_BYTES = 2**28  # of an output_errors.jsonl


@dataclass(frozen=True)
class ErrorMap:
    """Record one setting's relative error of the attention output per layer and kv head, on one text.

    method                the setting as text, e.g. `h2o@256`
    text                  the text's name
    context               number of tokens of context that were recorded; fewer than the audit's context if that was too
                          long to be recorded
    continuation          number of tokens after the context whose queries were answered; the method goes on compressing
                          during these
    state_bytes           bytes of the setting's whole cache at the end of the audit's context
    layers                numbers of the layers whose cache is compressed, as the model counts them
    output_error_by_head  ||output - exact|| / ||exact||: (layers, kv heads). `output` is the attention output under the
                          setting, `exact` that of exact attention for the same queries
    """

    method: str
    text: str
    context: int
    continuation: int
    state_bytes: int
    layers: tuple[int, ...]
    output_error_by_head: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.output_error_by_head) or not self.layers:
            raise ValueError(f"errors of {self.method!r}: give one list of errors for each of the layers {self.layers}")

    @property
    def cell(self) -> TextCell:
        return TextCell(self.text, self.context, self.continuation)

    @property
    def output_error(self) -> float:
        """Return the mean error over all layers and kv heads."""
        return statistics.fmean(error for layer in self.output_error_by_head for error in layer)


def map_errors(
    model: Any,
    settings: Sequence[BudgetedMethod],
    excerpt: Excerpt,
    rows: Sequence[TextRow],
    progress: Callable[[str], None],
) -> tuple[list[ErrorMap], list[HeadFloor]]:
    """Run the model on an excerpt, and return (the settings' error maps, the memory floors of the model's kv heads).

    A floor is a lower bound on the bytes that any method needs for a head.

    settings  the settings of the audit. One without a row on this excerpt gets no map, nor does `exact`, whose error is
              zero
    excerpt   the context and the continuation that the audit reads of a text, as token ids
    rows      the settings' results on the texts; those on this excerpt give the bytes
    progress  function that is called with a line of text before each step
    The list of floors is empty if the context was too long to be recorded from beginning to end.
    """
    context, asked = _that_fit(model, excerpt)
    progress(f"{excerpt.cell}: recording the attention's inputs")
    recorded = traces.record(model, [context], [asked])
    cell = TextCell(excerpt.cell.text, len(context), len(asked))
    sizes = {row.method: row.state_bytes for row in rows if row.cell == excerpt.cell}
    maps = []
    for setting in settings:
        if setting.text == "exact" or setting.text not in sizes:
            continue
        progress(f"{excerpt.cell}: {setting.text}, error by head")
        errors = traces.errors(recorded, _in_tokens(setting.method, recorded, len(context)))
        table = tuple(tuple(layer) for layer in errors)
        layers = tuple(trace.layer for trace in recorded)
        maps.append(ErrorMap(setting.text, *cell, sizes[setting.text], layers, table))
    if len(context) < len(excerpt.context):
        return maps, []
    progress(f"{excerpt.cell}: floors of the heads")
    return maps, head_floors(cell, recorded, MOST_FLOOR_WORK)


def write_error_maps(path: Path, maps: Iterable[ErrorMap]) -> None:
    """Write the maps to an `output_errors.jsonl` at `path`, one per line; a failed write leaves the file as it was."""
    write_records(path, maps)


def read_error_maps(path: Path) -> list[ErrorMap]:
    """Read the maps that `write_error_maps` wrote. Raises ValueError naming the file and line that is not a map.

    A file of more than MOST_BYTES raises ValueError too.
    """
    return read_records(path, ErrorMap, MOST_BYTES, "output_errors.jsonl", "a map of output errors")


def _that_fit(model: Any, excerpt: Excerpt) -> tuple[list[int], list[int]]:
    """Return (context, next tokens): the token ids of an excerpt on which the model is recorded.

    The next tokens are the 64 (ASKED) after the context, whose queries are answered. If the recorded tensors would
    exceed MOST_RECORDED_BYTES, the context is cut to its beginning, and the next tokens are those after the cut.
    """
    most = MOST_RECORDED_BYTES // traces.token_bytes(model)
    ids = excerpt.context + excerpt.continuation
    cut = max(1, min(len(excerpt.context), most - ASKED))
    return ids[:cut], ids[cut : cut + ASKED]


def _in_tokens(method: Method, recorded: Sequence[traces.Trace], length: int) -> Method:
    """Return the method with its budget converted to tokens per kv head, for a context of `length` tokens.

    recorded: the recorded queries, keys and values, one entry per layer. They give the numbers of heads, the widths and
    the dtype.
    """
    trace = recorded[0]
    return resolve(method, trace.spec(trace.kv_heads), layers=len(recorded), length=length, g=trace.q.shape[1])
