"""Hold the rows of a benchmark and write them as one JSON document."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

from kvfloor.bench.timing import Timed
from kvfloor.files import read_regular, replace_file
from kvfloor.statistics import median_interval

SCHEMA = 1
MOST_BYTES = 2**26

Interval = tuple[float, float]


@dataclass(frozen=True)
class BenchRow:
    """Hold the time of one version of one piece of work, beside a baseline that took turns with it.

    part            the benchmark's part, such as "token"
    name            the version, such as a method's text
    model           what it ran in: a model's name, or the shapes of the layer
    context         tokens in the cache; tokens read, in a prefill
    dtype           of keys and values
    threads, turns  torch's threads; calls that were timed
    ms              median milliseconds per call; with its 95 % interval
    baseline        the version that it is compared with; None: none
    ratio           median over turns of the baseline's time over this one's, so above 1 is faster; with its 95 %
                    interval
    slope           change of a token's cost with every doubling of the tokens before it, as a share of the cost of a
                    young state of the same method; with its 95 % interval
    tail            the 99.99th percentile of a token's processor time, as a multiple of its median
    nbytes          bytes that the version holds at the end
    peak            the most bytes that it held, as a multiple of those at the end
    target, asked   the target that the row answers to, such as "T1", and what it asks, in words
    judged, bound   the field that the target bounds, and the bound, such as ">= 0.6"
    met             whether the row's figure keeps the bound; None: no target
    crowded         True if other work ran beside it, so that the times are not to be trusted
    """

    part: str
    name: str
    model: str
    context: int
    dtype: str
    threads: int
    turns: int
    ms: float
    ms_interval: Interval | None = None
    baseline: str | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None
    slope: float | None = None
    slope_interval: Interval | None = None
    tail: float | None = None
    nbytes: int | None = None
    peak: float | None = None
    target: str | None = None
    asked: str | None = None
    judged: str | None = None
    bound: str | None = None
    met: bool | None = None
    crowded: bool = False

    @property
    def interval(self) -> Interval | None:
        """Return the interval of the judged figure, or of the ratio; None where there is none."""
        return getattr(self, f"{self.judged or 'ratio'}_interval", None)

    @classmethod
    def timed(
        cls, timed: Timed, name: str, *, baseline: str | None = None, shown: str | None = None, **more: Any
    ) -> BenchRow:
        """Make the row of one version of a timed comparison.

        name      the version, a key of `timed.ms`
        baseline  the version to compare it with; None: none
        shown     the version's name in the row; its key unless given
        more      the row's other fields
        """
        ms, ratios = timed.ms[name], () if baseline is None else timed.ratios(name, baseline)
        return cls(
            name=shown or name,
            threads=timed.threads,
            turns=len(ms),
            ms=median(ms),
            ms_interval=median_interval(ms),
            baseline=baseline,
            ratio=median(ratios) if ratios else None,
            ratio_interval=median_interval(ratios) if ratios else None,
            crowded=timed.crowded,
            **more,
        )


@dataclass(frozen=True)
class OperatorShare:
    """Hold one operator's share of the processor time of a decoded token, as torch.profiler counts it.

    model, context, dtype  as in a row; name: the cache
    operator, share        the operator's name, and its own time over that of all operators
    calls                  calls per token
    """

    model: str
    name: str
    context: int
    dtype: str
    operator: str
    share: float
    calls: float


@dataclass
class BenchDocument:
    """Hold all that one run measured, and how.

    command   the command line; machine: what it ran on
    quick     True for the short run
    gate      the tests or checks that passed before anything was timed
    parts     the parts that were asked for
    complete  False while the run goes on, and after it was stopped
    skipped   lines that say what was left out, and why
    """

    command: str
    quick: bool
    gate: str
    parts: tuple[str, ...]
    machine: Mapping[str, Any]
    complete: bool = False
    skipped: list[str] = field(default_factory=list)
    rows: list[BenchRow] = field(default_factory=list)
    profiles: list[OperatorShare] = field(default_factory=list)

    def text(self) -> str:
        """Return the JSON document, one row a line; no number has more than six significant digits."""
        head = {name: value for name, value in asdict(self).items() if name not in ("rows", "profiles")}
        lines = [f'"schema": {SCHEMA}', *(f"{json.dumps(name)}: {_json(value)}" for name, value in head.items())]
        for name, records in (("rows", self.rows), ("profiles", self.profiles)):
            inside = ",\n".join(_json(asdict(one)) for one in records)
            lines.append(f'"{name}": [\n{inside}\n]' if records else f'"{name}": []')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def write(self, path: Path) -> None:
        """Replace the file by the JSON document; on a failure the old file stays."""
        replace_file(path, self.text())


def read_document(path: Path) -> BenchDocument:
    """Return the document in a file. Raises ValueError for a file that holds none of this schema."""
    try:
        given = json.loads(read_regular(path, MOST_BYTES, "results of kvfloor bench"))
        if given.pop("schema") != SCHEMA:
            raise ValueError(f"not schema {SCHEMA}")
        given["rows"] = [_row(one) for one in given["rows"]]
        given["profiles"] = [OperatorShare(**one) for one in given["profiles"]]
        return BenchDocument(**given | {"parts": tuple(given["parts"])})
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} holds no results of kvfloor bench: {error!r}") from error


def _row(given: Mapping[str, Any]) -> BenchRow:
    names = {one.name for one in fields(BenchRow)}
    if unknown := set(given) - names:
        raise TypeError(f"unknown fields {sorted(unknown)}")
    row: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return BenchRow(**row)


def _json(value: Any) -> str:
    return json.dumps(_rounded(value), allow_nan=False, ensure_ascii=False)


def _rounded(value: Any) -> Any:
    """Return the value with six significant digits of every float in it."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
