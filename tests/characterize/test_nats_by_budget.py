"""The table of nats by budget: its rows, and the rank correlation of two parts."""

from __future__ import annotations

from characterize.nats_by_budget import FIELDS, PARTS, correlations, table
from kvfloor.audit.nats import TextSummary, summaries
from kvfloor.audit.plan import settings
from tests.audit.made_up import text_row


def found(**nats: float) -> list[TextSummary]:
    rows = [
        text_row("exact"),
        *(text_row(f"{name}@25%", nats=far, seed=i) for i, (name, far) in enumerate(nats.items())),
    ]
    return summaries(rows)


def test_ranks_are_compared_over_what_both_have() -> None:
    one = found(h2o=0.01, tova=0.1, window=1.0, random=3.0)
    parts = {
        "a": one,
        "b": found(tova=0.2, h2o=0.03, window=0.9),
        "c": found(h2o=1.0, tova=0.1, window=0.01, knorm=0.5),
    }
    assert [(a, b, n, round(rho, 9)) for a, b, n, rho in correlations(parts)] == [
        ("a", "b", 3, 1.0),
        ("a", "c", 3, -1.0),
        ("b", "c", 3, -1.0),
    ]


def test_rows_go_from_the_smallest_divergence_up() -> None:
    rows = table({"builtin-512": found(window=1.0, h2o=0.01)})
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("builtin", "exact", "none"),
        ("builtin", "h2o", "25%"),
        ("builtin", "window", "25%"),
    ]
    assert {len(row) for row in rows} == {len(FIELDS)}


def test_every_setting_of_the_plan_exists() -> None:
    for part in PARTS.values():
        for methods, budgets, _ in part.plan:
            assert {one.text for one in settings(methods, budgets) if one.asked}
