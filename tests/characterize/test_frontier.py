"""The table of bytes against nats: new rows beside saved ones, the frontier among all, shares of bytes."""

from __future__ import annotations

import pytest
import torch

from characterize.frontier import FIELDS, SOURCES, FrontierSource, saved_rows, table
from kvfloor.audit.nats import TextRow, TextSummary, summaries
from kvfloor.core.spec import Spec
from kvfloor.hf.held import zeros_held
from kvfloor.methods.grammar import parse

NAME = "smollm2-2048"


def measured(setting: str, kl: float) -> TextSummary:
    n = 512
    row = TextRow(
        *(setting, setting, setting, None, False, None, "speech", 2048, n),
        *((kl,) * n, (1.0,) * n, (1.0,) * n, (1,) * n),
        *(1, 1, 1, 1, 1, 10**6, 1, 1.0),
    )
    (found,) = summaries([row])
    return found


def test_the_saved_table_is_made_again_from_its_rows() -> None:
    for name in SOURCES:
        saved = saved_rows(name)
        assert [list(map(str, row)) for row in table(name, [], saved)] == [[row[x] for x in FIELDS] for row in saved]


def test_a_new_row_takes_its_place_and_the_frontier_of_rows_that_it_beats() -> None:
    saved = saved_rows(NAME)
    rows = [dict(zip(FIELDS, row, strict=True)) for row in table(NAME, [measured("exact:k4v3", 1e-7)], saved)]
    assert sorted(str(row["setting"]) for row in rows) == sorted(row["setting"] for row in saved)
    shares = [float(str(row["share"])) for row in rows]
    assert shares == sorted(shares, reverse=True)
    for row in rows:
        if float(str(row["share"])) > 0.27:
            assert row["frontier"] == ""
        if row["setting"] == "exact:k4v3":
            assert row["frontier"] == "yes" and row["kl"] == pytest.approx(1e-7)
    before = {row["setting"] for row in saved if row["frontier"] and float(row["share"]) < 0.25}
    assert before == {row["setting"] for row in rows if row["frontier"] and float(str(row["share"])) < 0.25}


def test_settings_are_each_once_and_have_their_budget() -> None:
    for source in SOURCES.values():
        assert len(source.settings) == len(set(source.settings)) and "exact" not in source.settings
    assert {"snapkv:k4v3@3.125%", "h2o@6.25%", "quant(bits=4)"} <= set(SOURCES[NAME].settings)
    assert "sinks:k4v3@3.125%" not in SOURCES[NAME].settings


@pytest.mark.parametrize("setting", ["exact", "snapkv@50%", "sinks:k4v3@25%", "exact:k3v3", "exact:k3v3(recent=16)"])
def test_a_share_is_of_a_state_that_has_room_for_its_tokens_alone(setting: str) -> None:
    source = FrontierSource("any", "any", 2, 2, 16, 2, 256, (), "")
    spec = Spec(2, 16, 16, dtype=torch.bfloat16)
    method = parse(setting.replace("50%", "128").replace("25%", "64"))
    state = method.open(spec)
    if setting.startswith("exact"):
        state.reserve(2, 256)
    zeros = torch.zeros(2, 256, 16, dtype=spec.dtype)
    state.step(zeros.unsqueeze(1).expand(-1, 2, -1, -1), zeros, zeros)
    state.seal()
    assert source.share(setting) == 2 * state.nbytes / (2 * 2 * 2 * 2 * 16 * 256)
    if setting.startswith("exact:"):
        assert zeros_held(method, spec, 2, 256).after > zeros_held(method, spec, 2, 256, spare=False).after
