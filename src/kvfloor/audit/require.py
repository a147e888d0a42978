"""`--require`: conditions on the rows, which turn an audit into a check with an exit code.

Grammar, with the word `and` between clauses:

    clause = [METHOD ":"] [TASK "."] FIGURE (">=" | "<=" | ">" | "<") NUMBER
    FIGURE = a figure of a row: score, score_low, diff_low, state_bytes, decode_ms_per_token, ...
    NUMBER = a decimal number, optionally followed by %, KiB, MiB or GiB

e.g. `h2o@256:recall.score>=0.9 and h2o@256:diff_low>=-15%`.

METHOD is a setting as the rows write it, or the same without arguments (`h2o@256` means `h2o(recent=64)@256`
too) or without a budget (`h2o` means all its budgets). Without METHOD a clause is about the settings that
were asked for, not the baselines beside them; without TASK, about every task. It must hold on every row it is
about.

Exit codes: 0 where every clause holds, 1 where one does not, 2 (ValueError here) for text that is no
condition, or is about no row: nothing is ever met by being about nothing.
"""

import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvfloor.audit.names import bare_name, split_setting
from kvfloor.audit.rows import CONTRACT_FIELDS, Row

FIGURES = tuple(name for name in CONTRACT_FIELDS if name not in ("method", "task", "protocol"))

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_UNITS = {"": 1.0, "%": 0.01, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_CLAUSE = re.compile(
    r"\s*(?:(?P<method>.+):)?\s*(?:(?P<task>[^:]+)\.)?(?P<figure>\w+)\s*(?P<comparison>>=|<=|>|<)"
    r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?P<unit>%|KiB|MiB|GiB|)\s*",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class Clause:
    """One parsed condition; `method` and `task` are None where the text names none."""

    text: str
    method: str | None
    task: str | None
    figure: str
    comparison: str
    bound: float

    def is_about(self, row: Row, asked: Collection[str]) -> bool:
        if self.task is not None and row.task != self.task:
            return False
        return row.method in asked if self.method is None else _names(self.method, row)

    def holds(self, row: Row) -> bool:
        """Whether the row's figure meets the bound; a figure that was not measured does not."""
        value = getattr(row, self.figure)
        return value is not None and _COMPARISONS[self.comparison](value, self.bound)


def parse_requirement(text: str) -> tuple[Clause, ...]:
    """The clauses of a `--require` text. Raises ValueError naming the clause, the grammar and the figures."""
    return tuple(_parse_clause(part.strip()) for part in re.split(r"\s+and\s+", text))


def shortfalls(clauses: Sequence[Clause], rows: Sequence[Row], asked: Collection[str]) -> list[str]:
    """One line per row that misses a clause; empty where everything holds.

    `asked` are the settings the user asked for, as the rows write them.
    Raises ValueError for a clause that is about no row.
    """
    lines = []
    for clause in clauses:
        about = [row for row in rows if clause.is_about(row, asked)]
        if not about:
            settings, tasks = (", ".join(sorted(names)) for names in ({r.method for r in rows}, {r.task for r in rows}))
            raise ValueError(f"{clause.text!r} is about no row: the settings are {settings}; the tasks are {tasks}")
        for row in about:
            if not clause.holds(row):
                value = getattr(row, clause.figure)
                found = "not measured" if value is None else f"{value:,.6g}"
                lines.append(f"{clause.text}: {row.method} on {row.cell} has {clause.figure} {found}")
    return lines


def _parse_clause(text: str) -> Clause:
    match = _CLAUSE.fullmatch(text)
    if match is None or match["figure"] not in FIGURES:
        raise ValueError(
            f"{text!r} is no condition: write [METHOD:][TASK.]FIGURE>=NUMBER, e.g. "
            "'h2o@256:recall.score>=0.9', with "
            f">=, <=, > or < and a figure of {', '.join(FIGURES)}"
        )
    unit = next(factor for name, factor in _UNITS.items() if name.lower() == match["unit"].lower())
    return Clause(
        text=text,
        method=match["method"].strip() if match["method"] else None,
        task=match["task"].strip() if match["task"] else None,
        figure=match["figure"],
        comparison=match["comparison"],
        bound=float(match["number"]) * unit,
    )


def _names(pattern: str, row: Row) -> bool:
    """Whether a METHOD of the grammar names the row's setting."""
    if pattern == row.method:
        return True
    method, budget = split_setting(pattern)
    row_method, row_budget = split_setting(row.method)
    same_method = method in (row_method, bare_name(row.method))
    return same_method and (budget is None or budget in (row_budget, str(row.budget_tokens)))
