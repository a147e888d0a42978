"""Check an audit's rows against the conditions of `--require`, so that the command ends with an exit code.

Grammar, with the word `and` between clauses:

    clause = [METHOD ":"] [TASK "."] FIGURE (">=" | "<=" | ">" | "<") NUMBER
    FIGURE = a field of a row: score, score_low, diff_low, state_bytes, decode_ms_per_token, ...
             or of a summary: kl, kl_high, same_top, loss_change, state_bytes, ...
    NUMBER = a decimal number, optionally followed by %, KiB, MiB or GiB

e.g. `h2o@256:recall.score>=0.9 and h2o@256:diff_low>=-15%`, or `snapkv@50%:kl_high<=0.02`.

A setting is a method with its budget. A row is the result of one setting on one task at one context length under one
protocol. A summary has one setting's figures over all texts, on which next-token predictions are compared.

METHOD is a setting in any spelling that `--methods` accepts. A METHOD without arguments means the method with any
arguments (`h2o@256` means `h2o(recent=64)@256` too); a METHOD without a budget means every budget. A clause without
METHOD is about the settings that the user asked for, not about the baselines that every audit adds. A clause without
TASK is about every task. A clause must hold in every row and summary that it is about. Some figures, such as bytes, are
in rows and in summaries: a clause on them is about rows, and, if it has no TASK, about summaries too.

Exit codes: 0 if every clause holds, 1 if one does not, 2 (ValueError here, before any measurement) for text that is no
condition, or that is about no row and no summary. A clause about nothing is an error, because it would always hold.
"""

import math
import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields

from kvfloor.audit.nats import Divergence, TextSummary
from kvfloor.audit.rows import CONTRACT_FIELDS, Row
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.methods.grammar import parse
from kvfloor.splitting import outline, split_words

_WORDS = ("method", "task", "protocol", "configuration", "name", "budget", "baseline", "parts")
FIGURES = tuple(name for name in CONTRACT_FIELDS if name not in _WORDS)
_NATS = (*(field.name for field in fields(Divergence)), "perplexity_ratio")
TEXT_FIGURES = (*_NATS, *(field.name for field in fields(TextSummary) if field.name in FIGURES))

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_UNITS = {"": 1.0, "%": 0.01, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_CLAUSE = re.compile(
    r"\s*(?:(?P<method>.+):)?\s*(?:(?P<task>[^:]+)\.)?(?P<figure>\w+)\s*(?P<comparison>>=|<=|>|<)"
    r"\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?P<unit>%|KiB|MiB|GiB|)\s*",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class Clause:
    """Hold one parsed clause of `--require`.

    text        the clause as it was written
    setting     the METHOD; None if the clause has none
    every       True if the METHOD has no arguments, so that it means the method with any arguments
    task        the TASK; None if the clause has none
    figure      name of the field, of a row or a summary, that is compared
    comparison  one of >=, <=, >, <
    bound       the number to compare with, in the field's unit: 90% is 0.9, 1KiB is 1024
    """

    text: str
    setting: BudgetedMethod | None
    every: bool
    task: str | None
    figure: str
    comparison: str
    bound: float

    def names(self, setting: BudgetedMethod) -> bool:
        """Return True if the clause is about this setting of the audit.

        A METHOD means the settings with its name, its arguments and its budget. If it has no arguments or no budget,
        any are accepted. A clause without METHOD is about every setting that the user asked for.
        """
        named = self.setting
        if named is None:
            return setting.asked
        alike = named.name == setting.name if self.every else named.configuration == setting.configuration
        return alike and named.budget in (None, setting.budget)

    def value(self, measured: Row | TextSummary) -> float | None:
        """Return the clause's figure from a row or a summary (`TextSummary`); None if it was not measured."""
        if isinstance(measured, TextSummary) and self.figure in _NATS:
            return getattr(measured.figures, self.figure)
        return getattr(measured, self.figure)

    def holds(self, measured: Row | TextSummary) -> bool:
        """Return True if the clause's figure was measured for this row or summary, and meets the bound."""
        value = self.value(measured)
        return value is not None and _COMPARISONS[self.comparison](value, self.bound)


@dataclass(frozen=True)
class Condition:
    """Hold a clause of `--require`, with the settings and tasks of the audit that it is about.

    methods  the settings as text, e.g. `h2o@256`
    tasks    names of the tasks; empty if the clause is about no row
    texts    True if the clause is about the settings' summaries over all texts
    """

    clause: Clause
    methods: frozenset[str]
    tasks: frozenset[str]
    texts: bool = False

    def is_about(self, measured: Row | TextSummary) -> bool:
        if isinstance(measured, TextSummary):
            return self.texts and measured.setting in self.methods
        return measured.method in self.methods and measured.task in self.tasks


def conditions(
    text: str, settings: Sequence[BudgetedMethod], tasks: Collection[str], texts: Collection[str] = ()
) -> tuple[Condition, ...]:
    """Parse the text of `--require`, and return one condition per clause.

    text          the clauses, with `and` between them
    settings      all settings of the audit, baselines included
    tasks, texts  names of the audit's tasks and texts
    Raises ValueError naming a clause that does not follow the grammar, with the grammar and the known figures, or a
    clause that is about nothing that the audit measures.
    """
    found = []
    for part in split_words(text.strip(), r"\s+and\s+") or [text]:
        clause = _parse_clause(part)
        methods = frozenset(one.text for one in settings if clause.names(one))
        about = frozenset(task for task in tasks if clause.figure in FIGURES and clause.task in (None, task))
        of_texts = bool(texts) and clause.figure in TEXT_FIGURES and clause.task is None
        if not methods or not (about or of_texts):
            raise ValueError(
                f"{clause.text!r} is about no row: the settings asked for are "
                f"{', '.join(one.text for one in settings if one.asked) or 'none'}; the baselines are "
                f"{', '.join(one.text for one in settings if one.baseline)}; the tasks are "
                f"{', '.join(tasks) or 'none'}; the texts are {', '.join(texts) or 'none'}, whose "
                f"figures are {', '.join(TEXT_FIGURES)}"
            )
        found.append(Condition(clause, methods, about, of_texts))
    return tuple(found)


def shortfalls(conditions: Sequence[Condition], rows: Sequence[Row], texts: Sequence[TextSummary] = ()) -> list[str]:
    """Return one line of text for each row and each summary in which a condition does not hold.

    A setting that a condition on texts is about, but that read no text, has a line too. The list is empty if every
    condition holds. `texts` has one summary per setting that read texts.
    """
    lines = []
    for condition in conditions:
        clause = condition.clause
        for measured in (*rows, *texts):
            if condition.is_about(measured) and not clause.holds(measured):
                value = clause.value(measured)
                found = "not measured" if value is None else f"{value:,.6g}"
                where = f"{measured.method} on {measured.cell}" if isinstance(measured, Row) else measured.setting
                lines.append(f"{clause.text}: {where} has {clause.figure} {found}")
        if condition.texts:
            missing = condition.methods - {one.setting for one in texts}
            lines += [f"{clause.text}: {setting} has read no text" for setting in sorted(missing)]
    return lines


def uncovered(conditions: Sequence[Condition], left_out: Sequence[Row]) -> list[str]:
    """Return one line of text for each pair of a condition and a left-out cell on which it cannot be checked.

    A cell is a task, context length and protocol. It is left out if the exact cache, which keeps every token, scores
    too low on it. Only the exact cache is measured there, so no condition on the task is shown to hold. `left_out` has
    the exact cache's row of each such cell.
    """
    return [
        f"{condition.clause.text}: {row.cell} was left out, exact scores {row.score:.3g} there"
        for condition in conditions
        for row in left_out
        if row.task in condition.tasks
    ]


def _parse_clause(text: str) -> Clause:
    match = _CLAUSE.fullmatch(outline(text))
    if match is None or match["figure"] not in (*FIGURES, *TEXT_FIGURES) or not math.isfinite(float(match["number"])):
        raise ValueError(
            f"{text!r} is no condition: write [METHOD:][TASK.]FIGURE>=NUMBER, e.g. "
            "'h2o@256:recall.score>=0.9', with "
            f">=, <=, > or < and a figure of {', '.join(dict.fromkeys((*FIGURES, *TEXT_FIGURES)))}"
        )
    method, task = (text[match.start(group) : match.end(group)].strip() or None for group in ("method", "task"))
    unit = next(factor for name, factor in _UNITS.items() if name.lower() == match["unit"].lower())
    return Clause(
        text=text,
        setting=None if method is None else BudgetedMethod(parse(method)),
        every=method is not None and "(" not in method,
        task=task,
        figure=match["figure"],
        comparison=match["comparison"],
        bound=float(match["number"]) * unit,
    )
