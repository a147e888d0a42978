"""Join the rounds of samples that one setting was measured on into one row per setting and cell.

A setting is a method with its budget. A cell is a task at a context length under a protocol (question asked before or
after the compression). Round 1 of a cell has its first n samples, round 2 the next n, and so on. An audit with a time
limit is a race: undecided settings are measured on further rounds. The file `rows.jsonl` has one row per setting, cell
and round; verdicts and reports use the joined rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvfloor.audit.rows import Cell, Row
from kvfloor.statistics import confidence_of_look, paired_difference_interval, wilson_interval

MOST_ROUNDS = 8
"""Rounds of samples of one cell that a race may measure, the first included."""

_CONFIDENCE = 0.95  # of a row's intervals


def joined(rows: Iterable[Row], racing: bool = False) -> list[Row]:
    """Return one row per setting and cell, with the samples of all rounds that the setting was measured on.

    rows    measured rows, each of one round; their order is kept
    racing  True if the rows are those of a race. Then a row's intervals are wider, so that they hold with 95 %
            confidence although the audit may have stopped after any round

    Outcomes stand in the order of the rounds. A setting is compared with the exact cache, which keeps every token, on
    the setting's own rounds. The exact cache's own row has all rounds that any setting had. Bytes at the end of the
    context are means over the samples, rounded up; the peak of the bytes is the largest. Bytes read per token, times to
    read the context, lengths of answers and shares of parts are means. The time to decode a token is the median of the
    rounds' medians. Errors of the attention output are those of the first round.
    Raises ValueError if a setting has a round of a cell twice, or has no first round of it.
    """
    groups: dict[tuple[Cell, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.cell.first, row.method), []).append(row)
    return [_joined(sorted(group, key=lambda row: row.round), racing) for group in groups.values()]


def _joined(rows: Sequence[Row], racing: bool) -> Row:
    """Join one setting's rows on one cell, given in the order of their rounds, into one row; see `joined`."""
    first, numbers = rows[0], [row.round for row in rows]
    if numbers[0] != 1 or len(set(numbers)) != len(numbers):
        raise ValueError(f"{first.method!r} on {first.cell.first} has rounds {numbers}: give round 1, and each once")
    if len(rows) == 1 and not racing:
        return first
    outcomes = tuple(outcome for row in rows for outcome in row.outcomes)
    gained, lost, n = sum(row.gained for row in rows), sum(row.lost for row in rows), len(outcomes)
    confidence = confidence_of_look(_CONFIDENCE, len(rows)) if racing else _CONFIDENCE
    score_low, score_high = wilson_interval(sum(outcomes), n, confidence)
    is_exact = first.method == "exact"
    diff_low, diff_high = (0.0, 0.0) if is_exact else paired_difference_interval(gained, lost, n, confidence)
    decode = [row.decode_ms_per_token for row in rows if row.decode_ms_per_token is not None]

    def mean(name: str) -> float:
        return math.fsum(getattr(row, name) * row.n for row in rows) / n

    def whole_mean(name: str) -> int:
        return -(-sum(getattr(row, name) * row.n for row in rows) // n)

    return replace(
        first,
        n=n,
        score=sum(outcomes) / n,
        score_low=score_low,
        score_high=score_high,
        exact_score=(sum(outcomes) - gained + lost) / n,
        diff_low=diff_low,
        diff_high=diff_high,
        state_bytes=whole_mean("state_bytes"),
        peak_state_bytes=max(row.peak_state_bytes for row in rows),
        exact_bytes=whole_mean("exact_bytes"),
        cold_bytes=whole_mean("cold_bytes"),
        bytes_read_per_token=mean("bytes_read_per_token"),
        prefill_ms=mean("prefill_ms"),
        decode_ms_per_token=statistics.median(decode) if decode else None,
        output_tokens=mean("output_tokens"),
        parts={name: math.fsum(row.parts[name] * row.n for row in rows) / n for name in first.parts},
        outcomes=outcomes,
        gained=gained,
        lost=lost,
        rounds=len(rows),
    )
