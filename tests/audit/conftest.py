"""Make audit rows by hand, one number at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvfloor.audit import request as audit_request
from kvfloor.audit.bounds import Bounds
from kvfloor.audit.rows import Protocol, Row, measured_row
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.methods.grammar import parse

Maker = Callable[..., Row]


@pytest.fixture
def row() -> Maker:
    """Return `row`: row(method, right=..., task=..., size=...) makes a row with `right` of n samples right.

    Exact has all samples right unless `exact_right` is given.
    """

    def make(
        method: str,
        right: int = 40,
        task: str = "recall",
        size: int = 1000,
        n: int = 40,
        exact_right: int = 40,
        protocol: Protocol = "after",
        peak: int | None = None,
        baseline: bool = False,
        bounds: Bounds | None = None,
        cold: int = 0,
    ) -> Row:
        return measured_row(
            setting=BudgetedMethod(parse(method), baseline=baseline),
            budget_tokens=None,
            task=task,
            context=512,
            protocol=protocol,
            outcomes=[1] * right + [0] * (n - right),
            exact_outcomes=[1] * exact_right + [0] * (n - exact_right),
            state_bytes=size,
            peak_state_bytes=size if peak is None else peak,
            exact_bytes=10_000,
            floor_bytes=500,
            token_id_bytes=100,
            bytes_read_per_token=size,
            output_error_by_layer=[0.1, 0.3],
            output_error_by_head=[[0.1, 0.1], [0.2, 0.4]],
            prefill_ms=1.0,
            decode_ms_per_token=0.5,
            output_tokens=3.0,
            bounds=bounds,
            cold_bytes=cold,
        )

    return make


@pytest.fixture(autouse=True)
def no_facts_unless_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave hidden facts out of audits that do not ask for them: they cost seconds, and few tests are about them."""
    if "facts" not in request.path.name:
        monkeypatch.setattr(audit_request, "_USUAL_SHEETS", 0)
