"""Compute the report's tables as plain data, for both the page and the terminal.

A setting is a method (KV-cache compressor) with its budget; a cell is a task at a context length under a protocol
(question asked before or after the compression). A row is one setting measured on one cell. Its verdict is on its loss
of score against the exact cache, which keeps every token: "holds" (shown not to exceed the largest tolerated loss),
"falls" (shown to be above 0) or "open" (neither is shown).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from kvfloor.audit.criterion import Standard, Verdict
from kvfloor.audit.rows import Cell, Row

VERDICT_SIGNS: dict[Verdict, str] = {"holds": "✓", "open": "?", "falls": "✗"}
"""A sign beside the colour, so that a verdict is read without colour."""


@dataclass(frozen=True)
class CellScore:
    """Hold the row of one setting on one cell, and its verdict; both None if the setting was not measured there."""

    row: Row | None
    verdict: Verdict | None

    @property
    def sign(self) -> str:
        return VERDICT_SIGNS[self.verdict] if self.verdict else ""


@dataclass(frozen=True)
class SettingScores:
    """Hold one line of the scoreboard: a setting, its bytes, and its score on every cell.

    baseline     True if the setting's method is one that every audit compares with
    state_bytes  bytes of the setting's cache, and `exact_bytes` those of the exact cache; means over the cells
    scores       one entry per cell
    """

    setting: str
    baseline: bool
    state_bytes: float
    exact_bytes: float
    scores: tuple[CellScore, ...]


@dataclass(frozen=True)
class Sizes:
    """Hold the bytes of one setting's cache at one context length, the largest over tasks and protocols.

    baseline              True if the setting's method is one that every audit compares with
    context               tokens of context
    budget_tokens         tokens kept per kv head; None if the budget is not one number
    state_bytes           bytes at the end of the context; `peak_state_bytes` the most bytes at any moment
    exact_bytes           bytes of the exact cache at the end of the same context
    floor_bytes           lower bound on any method's bytes, for worst-case keys and values
    token_id_bytes        bytes of the context's token ids, from which a model may recompute keys and values
    bytes_read_per_token  bytes of the cache that are read to decode one token
    """

    setting: str
    baseline: bool
    context: int
    budget_tokens: int | None
    state_bytes: int
    peak_state_bytes: int
    exact_bytes: int
    floor_bytes: int
    token_id_bytes: int
    bytes_read_per_token: float


@dataclass(frozen=True)
class Speed:
    """Hold one setting's times at one context length: medians over tasks and protocols.

    baseline             True if the setting's method is one that every audit compares with
    context              tokens of context
    prefill_ms           milliseconds to read the context
    decode_ms_per_token  milliseconds to decode one token; None: not measured
    output_tokens        mean length of the answers, in tokens
    """

    setting: str
    baseline: bool
    context: int
    prefill_ms: float
    decode_ms_per_token: float | None
    output_tokens: float


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Return the rows sorted by setting: exact first, then the methods in the given rows' order, last the baselines.

    Each method's settings go from the largest bytes down. Baselines are the methods that every audit compares with.
    """
    methods = list(dict.fromkeys(row.configuration for row in rows))
    largest: dict[str, int] = {}
    for row in rows:
        largest[row.method] = max(row.state_bytes, largest.get(row.method, 0))

    def place(row: Row) -> tuple[bool, bool, int, int, str, Cell]:
        method = methods.index(row.configuration)
        return row.method != "exact", row.baseline, method, -largest[row.method], row.method, row.cell

    return sorted(rows, key=place)


def scoreboard(rows: Sequence[Row], standard: Standard) -> tuple[tuple[Cell, ...], tuple[SettingScores, ...]]:
    """Return the audit's cells, sorted, and one line per setting with its score on each of these cells.

    exact comes first, then the methods in the rows' order, last the baselines (methods that every audit compares with).
    A method's settings go from the largest bytes down. `standard` (tolerated loss and confidence) gives the verdicts.
    """
    cells = tuple(sorted({row.cell for row in rows}))
    found = {(row.method, row.cell): row for row in rows}
    lines = []
    for setting, group in _settings(rows).items():
        measured = [found.get((setting, cell)) for cell in cells]
        lines.append(
            SettingScores(
                setting=setting,
                baseline=group[0].baseline,
                state_bytes=sum(row.state_bytes for row in group) / len(group),
                exact_bytes=sum(row.exact_bytes for row in group) / len(group),
                scores=tuple(CellScore(row, standard.verdict(row) if row else None) for row in measured),
            )
        )
    return cells, tuple(lines)


def sizes(rows: Sequence[Row]) -> tuple[Sizes, ...]:
    """Return the bytes of every setting's cache: one `Sizes` per setting and context length.

    rows: all rows of the audit. The order is that of `ordered`: exact first, the baselines last.
    """
    return tuple(
        Sizes(
            setting=setting,
            baseline=group[0].baseline,
            context=context,
            budget_tokens=group[0].budget_tokens,
            state_bytes=max(row.state_bytes for row in group),
            peak_state_bytes=max(row.peak_state_bytes for row in group),
            exact_bytes=max(row.exact_bytes for row in group),
            floor_bytes=max(row.floor_bytes for row in group),
            token_id_bytes=max(row.token_id_bytes for row in group),
            bytes_read_per_token=max(row.bytes_read_per_token for row in group),
        )
        for (setting, context), group in _by_context(rows).items()
    )


def speeds(rows: Sequence[Row]) -> tuple[Speed, ...]:
    """Return the prefill and decode times: one `Speed` per setting and context length.

    rows: all rows of the audit. The order is that of `ordered`: exact first, the baselines last.
    """
    table = []
    for (setting, context), group in _by_context(rows).items():
        decode = [row.decode_ms_per_token for row in group if row.decode_ms_per_token is not None]
        table.append(
            Speed(
                setting=setting,
                baseline=group[0].baseline,
                context=context,
                prefill_ms=median(row.prefill_ms for row in group),
                decode_ms_per_token=median(decode) if decode else None,
                output_tokens=median(row.output_tokens for row in group),
            )
        )
    return tuple(table)


def _settings(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in ordered(rows):
        groups.setdefault(row.method, []).append(row)
    return groups


def _by_context(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in ordered(rows):
        groups.setdefault((row.method, row.context), []).append(row)
    return groups
