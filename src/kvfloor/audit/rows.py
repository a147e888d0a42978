"""Hold the measured rows of an audit, and write them as `rows.jsonl` and as the `--json` document.

A row is the result of one setting (method with its budget) on one cell (task, context length, protocol). "exact" is the
cache that keeps every token.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

from kvfloor.audit.bounds import Bounds
from kvfloor.audit.protocols import Protocol
from kvfloor.audit.records import read_records, write_records
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.statistics import MIN_SAMPLES, paired_counts, paired_difference_interval, wilson_interval

SCHEMA = 1
MOST_BYTES = 2**28  # of a rows.jsonl


class Cell(NamedTuple):
    """Identify a cell of an audit, and a round of its samples.

    task      the task's name
    context   the context length in tokens
    protocol  "visible": a question is compressed with its context; "after": it follows the compression
    round     1: the cell's first n samples, 2: the next n, and so on. Only an audit with a time limit has rounds after
              the first
    All rows of a cell and round have the same samples, and are compared sample by sample.
    """

    task: str
    context: int
    protocol: str
    round: int = 1

    def __str__(self) -> str:
        place = "question visible" if self.protocol == "visible" else "question after"
        more = f", samples of round {self.round}" if self.round > 1 else ""
        return f"{self.task} at {self.context:,} tokens, {place}{more}"

    @property
    def first(self) -> "Cell":
        """Return the cell with the first round of its samples."""
        return self._replace(round=1)


@dataclass(frozen=True)
class Row:
    """Record one setting measured on one cell.

    Bytes are of the whole cache: all layers and heads (of all ranks, on a sharded model) of one sequence.

    method                 the setting as text, e.g. `h2o(recent=64)@256`
    budget_tokens          tokens kept per kv head; None if the budget is not one number
    task, context          the task's name; the number of tokens of context
    protocol               "visible": a question is compressed with its context; "after": it follows the compression
    n                      number of samples, at least 32
    score                  share of right samples, i.e. of ones in `outcomes`
    score_low, score_high  95 % Wilson interval of the score
    exact_score            the exact cache's share on the same samples
    diff_low, diff_high    95 % Tango interval of the paired difference score - exact_score
    state_bytes            bytes at the end of the context
    peak_state_bytes       the most bytes at any moment
    exact_bytes            bytes of the exact cache at the end of the same context
    floor_bytes            lower bound on the bytes that any method needs, for worst-case keys and values
    bytes_read_per_token   bytes of the cache that are read to produce one token
    output_error           mean of `output_error_by_layer`
    prefill_ms             milliseconds to read the context, per sample; methods that compress only at its end share
                           one run of the model, whose time is counted for each of them
    decode_ms_per_token    median milliseconds to decode a token, per sample; None if no token was decoded
    output_tokens          mean length of the answers, in tokens
    configuration          the setting without its budget, e.g. `h2o(recent=64)`
    name                   the setting without budget and arguments, e.g. `h2o`
    budget                 the budget as the user gave it; None without one
    baseline               True for the settings that every audit compares with
    parts                  name of each part of the answers -> share, from 0 to 1, that its check gave; mean over the
                           samples. A task may check an answer in several parts, e.g. "first word"; the answer is right
                           if each has the share 1
    token_id_bytes         bytes of the context's token ids, from which the model could recompute the cache:
                           context x log2(vocabulary) / 8
    output_error_by_layer  relative L2 error of the attention output against exact, same queries: (layers,)
    output_error_by_head   the same per layer and kv head: (layers, kv heads)
    outcomes               one number per sample, in the samples' order: 1 if all its questions are answered right, else
                           0
    gained, lost           numbers of samples that only this setting answers right, and that only exact answers right
    round                  number of the round of samples, from 1. Output errors are measured in the first round alone:
                           in a later one `output_error` is 0, and the errors by layer and by head are empty
    rounds                 number of rounds whose samples are in this row: 1 as measured, more if `audit/rounds.py`
                           joined several rows, which may widen the intervals
    cold_bytes             bytes kept on the host or a disk at the end of the context, beside `state_bytes`
    checked                answers of a method that certifies them (`tiered`) whose true error was computed, in round 1
                           alone; 0 for other methods
    largest_bound          the largest bound of these answers, over the largest norm of a value that their query saw;
                           None without any, or if one was infinite
    largest_error          the largest true error of these answers, likewise; None without any
    violations             number of these answers that err more than their bound: any is a fault of the method
    """

    method: str
    budget_tokens: int | None
    task: str
    context: int
    protocol: Protocol
    n: int
    score: float
    score_low: float
    score_high: float
    exact_score: float
    diff_low: float
    diff_high: float
    state_bytes: int
    peak_state_bytes: int
    exact_bytes: int
    floor_bytes: int
    bytes_read_per_token: float
    output_error: float
    prefill_ms: float
    decode_ms_per_token: float | None
    output_tokens: float
    configuration: str
    name: str
    budget: str | None
    baseline: bool
    parts: dict[str, float]
    token_id_bytes: int
    output_error_by_layer: tuple[float, ...]
    output_error_by_head: tuple[tuple[float, ...], ...]
    outcomes: tuple[int, ...]
    gained: int
    lost: int
    round: int = 1
    rounds: int = 1
    cold_bytes: int = 0
    checked: int = 0
    largest_bound: float | None = None
    largest_error: float | None = None
    violations: int = 0

    def __post_init__(self) -> None:
        where = f"row {self.method!r} on {self.task!r}"
        if self.protocol not in get_args(Protocol):
            raise ValueError(f"{where}: protocol {self.protocol!r} is not one of {', '.join(get_args(Protocol))}")
        if self.round < 1 or self.rounds < 1:
            raise ValueError(f"{where}: round = {self.round} and rounds = {self.rounds}; both count from 1")
        if self.n < MIN_SAMPLES or self.n != len(self.outcomes):
            raise ValueError(
                f"{where}: n = {self.n} with {len(self.outcomes)} outcomes; a row needs at least "
                f"{MIN_SAMPLES} "
                "samples and one outcome for each: raise the number of samples"
            )
        if any(outcome not in (0, 1) for outcome in self.outcomes):
            raise ValueError(f"{where}: outcomes are 0 (wrong) or 1 (right), one per sample")
        if round(self.score * self.n) != sum(self.outcomes) or round(self.exact_score * self.n) != (
            sum(self.outcomes) - self.gained + self.lost
        ):
            raise ValueError(f"{where}: score, exact_score, gained and lost do not follow from the outcomes")
        if not self.parts or any(not 0 <= share <= 1 for share in self.parts.values()):
            raise ValueError(f"{where}: parts = {self.parts}; give the share of at least one part, each from 0 to 1")
        for name, value in vars(self).items():
            if (name == "context" or name.endswith("_bytes")) and not (isinstance(value, int) and value >= 0):
                raise ValueError(f"{where}: {name} = {value!r}; give a whole number >= 0")
        if self.exact_bytes == 0 or self.peak_state_bytes < self.state_bytes:
            raise ValueError(
                f"{where}: exact_bytes = {self.exact_bytes}, state_bytes = {self.state_bytes}, "
                f"peak_state_bytes = {self.peak_state_bytes}; exact holds something, and the peak is at "
                "least the end"
            )
        for name, number in self._numbers():
            if not math.isfinite(number):
                raise ValueError(f"{where}: {name} = {number}; give a finite number, or None where it was not measured")

    def _numbers(self) -> Iterable[tuple[str, float]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                yield field.name, value
        yield from (("output_error_by_layer", error) for error in self.output_error_by_layer)
        yield from (("output_error_by_head", error) for layer in self.output_error_by_head for error in layer)

    @property
    def cell(self) -> Cell:
        return Cell(self.task, self.context, self.protocol, self.round)

    @property
    def below_floor(self) -> bool:
        """Return True if the cache has fewer bytes than the worst-case floor (`floor_bytes`).

        This is possible, because the floor holds for the worst data, and the audited data may be easier.
        """
        return self.state_bytes < self.floor_bytes


CONTRACT_FIELDS = tuple(field.name for field in fields(Row))[:26]
"""The fields of a row in the `--json` document, which scripts rely on; `rows.jsonl` has the others too."""


def measured_row(
    *,
    setting: BudgetedMethod,
    budget_tokens: int | None,
    task: str,
    context: int,
    protocol: Protocol,
    outcomes: Sequence[int],
    exact_outcomes: Sequence[int],
    state_bytes: int,
    peak_state_bytes: int,
    exact_bytes: int,
    floor_bytes: int,
    token_id_bytes: int,
    bytes_read_per_token: float,
    output_error_by_layer: Sequence[float],
    output_error_by_head: Sequence[Sequence[float]],
    prefill_ms: float,
    decode_ms_per_token: float | None,
    output_tokens: float,
    parts: dict[str, float] | None = None,
    round: int = 1,
    cold_bytes: int = 0,
    bounds: Bounds | None = None,
) -> Row:
    """Build a row from the measurements of a setting: compute its score, intervals and paired difference to exact.

    Bytes are of the whole cache of one sample, of all ranks on a sharded model.

    setting                the method with its budget
    budget_tokens          tokens kept per kv head; None if the budget is not one number
    task, context          the task's name; the number of tokens of context
    protocol               "visible": a question is compressed with its context; "after": it follows the compression
    outcomes               one number per sample: 1 if all its questions are answered right, else 0
    exact_outcomes         the exact cache's outcomes on the same samples in the same order; for the exact cache's own
                           row they are `outcomes` again
    state_bytes            bytes at the end of the context; `peak_state_bytes` are the most at any moment
    exact_bytes            bytes of the exact cache at the end of the same context
    floor_bytes            lower bound on the bytes that any method needs, for worst-case keys and values
    token_id_bytes         bytes of the context's token ids
    bytes_read_per_token   bytes of the cache that are read to produce one token
    output_error_by_layer  relative L2 error of the attention output: (layers,); `output_error_by_head` is the same per
                           layer and kv head: (layers, kv heads)
    prefill_ms             milliseconds to read the context, per sample
    decode_ms_per_token    median milliseconds to decode a token, per sample; None if no token was decoded
    output_tokens          mean length of the answers, in tokens
    parts                  name of each part in which the task checks an answer -> mean share of its check, from 0 to 1;
                           None: an answer has one part
    round                  number of the round of samples, from 1
    cold_bytes             bytes kept on the host or a disk at the end of the context
    bounds                 what a check of the method's error bounds found; None if it certifies no answers

    Raises ValueError where fewer than 32 samples were run, `outcomes` and `exact_outcomes` differ in length, or a
    number is not finite.
    """
    n, method = len(outcomes), setting.text
    gained, lost = paired_counts(outcomes, exact_outcomes)
    if n < MIN_SAMPLES:
        raise ValueError(
            f"{method!r} on {task!r} ran {n} samples; a row needs at least {MIN_SAMPLES}: raise the number"
        )
    score_low, score_high = wilson_interval(sum(outcomes), n)
    same = method == "exact"
    diff_low, diff_high = (0.0, 0.0) if same else paired_difference_interval(gained, lost, n)
    return Row(
        method=method,
        budget_tokens=budget_tokens,
        task=task,
        context=context,
        protocol=protocol,
        n=n,
        score=sum(outcomes) / n,
        score_low=score_low,
        score_high=score_high,
        exact_score=sum(exact_outcomes) / n,
        diff_low=diff_low,
        diff_high=diff_high,
        state_bytes=state_bytes,
        peak_state_bytes=peak_state_bytes,
        exact_bytes=exact_bytes,
        floor_bytes=floor_bytes,
        bytes_read_per_token=float(bytes_read_per_token),
        output_error=math.fsum(output_error_by_layer) / max(1, len(output_error_by_layer)),
        prefill_ms=float(prefill_ms),
        decode_ms_per_token=None if decode_ms_per_token is None else float(decode_ms_per_token),
        output_tokens=float(output_tokens),
        configuration=setting.configuration,
        name=setting.name,
        budget=setting.budget,
        baseline=setting.baseline,
        parts={name: float(share) for name, share in (parts or {"answer": sum(outcomes) / n}).items()},
        token_id_bytes=token_id_bytes,
        output_error_by_layer=tuple(float(error) for error in output_error_by_layer),
        output_error_by_head=tuple(tuple(float(error) for error in layer) for layer in output_error_by_head),
        outcomes=tuple(int(outcome) for outcome in outcomes),
        gained=gained,
        lost=lost,
        round=round,
        cold_bytes=cold_bytes,
        checked=0 if bounds is None else bounds.checked,
        largest_bound=None if bounds is None else bounds.bound,
        largest_error=None if bounds is None else bounds.error,
        violations=0 if bounds is None else bounds.violations,
    )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows to a `rows.jsonl` at `path`, one row with all its fields per line.

    If the write fails, the file is left as it was and ValueError is raised.
    """
    write_records(path, rows)


def read_rows(path: Path) -> list[Row]:
    """Read the rows that `write_rows` wrote. Raises ValueError naming the file and line that is not a row.

    A file of more than MOST_BYTES raises ValueError too.
    """
    return read_records(path, Row, MOST_BYTES, "rows.jsonl", "an audit row")


def certified_figures(row: Row) -> dict[str, Any]:
    """Return what the check of a certified method's bounds found in a row, by the names of its fields.

    The row's method, task, context and protocol come first, then hot (`state_bytes`), cold and read bytes.
    """
    where = ("method", "task", "context", "protocol", "state_bytes", "cold_bytes", "bytes_read_per_token")
    return {name: getattr(row, name) for name in (*where, "checked", "largest_bound", "largest_error", "violations")}


def document(
    *, model: str, seed: int, rows: Iterable[Row], method: str | None, why: str, report: str
) -> dict[str, Any]:
    """Build the JSON document that `kvfloor audit --json` prints.

    The document has a schema number, the model, the seed, the rows, the recommended setting `method` with its reason
    `why`, and the report's path. `method` is None if no setting is safe. A row has the fields that scripts may rely on
    (CONTRACT_FIELDS).
    """
    return {
        "schema": SCHEMA,
        "model": model,
        "seed": seed,
        "rows": [{name: getattr(row, name) for name in CONTRACT_FIELDS} for row in rows],
        "recommendation": {"method": method, "why": why},
        "report": report,
    }
