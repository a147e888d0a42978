"""The committed comparison with kvpress holds what it states, and no table is written where a stated equality fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfloor import parse

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "bench/peers"), str(ROOT / "docs")]

import parity_table as parity  # noqa: E402
from pairs import PAIRS, STEPWISE, WITHOUT, Pair  # noqa: E402
from peers_page import peers_page, read_table  # noqa: E402

ROWS = read_table()
SAME = [row for row in ROWS if row["rule"] == "same"]


def test_every_pair_has_its_rows() -> None:
    found = {(row["press"], row["method"], row["rule"]) for row in ROWS}
    assert found == {(pair.title, pair.ours, pair.rule) for pair in (*PAIRS, *STEPWISE)}
    assert {row["text"] for row in SAME} == {"speech", "facts"} and {row["kept"] for row in SAME} == {"256", "512"}
    once = {(pair.title, pair.ours) for pair in PAIRS if pair.rule == "same"}
    assert all(sum((row["press"], row["method"]) == pair for row in SAME) == 3 for pair in once)
    assert not {pair.press for pair in PAIRS} & set(WITHOUT)


@pytest.mark.parametrize("pair", [*PAIRS, *STEPWISE], ids=lambda pair: pair.title)
def test_every_method_of_the_table_is_one(pair: Pair) -> None:
    assert str(parse(f"{pair.method}@256")).partition("(")[0] == pair.method.partition("(")[0]
    assert bool(pair.note) == (pair.rule == "other")


@pytest.mark.parametrize("row", SAME, ids=lambda row: f"{row['press']} {row['text']} {row['kept']}")
def test_equal_rules_have_equal_divergences(row: dict[str, str]) -> None:
    assert 0.001 < float(row["kvpress"]) < 1.0
    assert abs(float(row["kvpress"]) - float(row["kvfloor"])) <= parity.TOLERANCE + 1e-6
    assert float(row["difference"]) <= parity.TOLERANCE
    if row["common"]:
        assert float(row["common"]) > 0.999 and float(row["gap"]) <= parity.ROUNDING
        if float(row["least"]) == 1.0:  # the same tokens everywhere, so rounding is all that is left
            assert float(row["largest"]) < 1e-4 and float(row["difference"]) < 1e-6


def test_random_rules_do_not_differ() -> None:
    rows = [row for row in ROWS if row["rule"] == "random"]
    assert len(rows) == 2 and all(float(row["p"]) >= parity.LEAST_P for row in rows)


def test_the_page_tells_every_row_and_every_press_without_a_counterpart() -> None:
    page = peers_page()
    assert all(f"`{row['press']}`" in page and row["kvpress"] in page for row in ROWS)
    assert all(f"`{press}` {why}." in page for press, why in WITHOUT.items())


# ---- what is compared ------------------------------------------------------------------------------------------


def reading(kl: list[float], kept: list[int], scores: list[float] | None = None) -> parity.Reading:
    mask = torch.zeros(1, 1, 4, dtype=torch.bool)
    mask[..., kept] = True
    return parity.Reading(torch.tensor(kl), mask, None if scores is None else [torch.tensor([scores])])


def test_two_readings_are_compared_token_by_token() -> None:
    found: Any = parity.compared(reading([0.1, 0.3], [0, 1], [4.0, 2.0, 1.5, 0.0]), reading([0.2, 0.0], [0, 2]))
    assert found == pytest.approx(
        {"kvpress": 0.2, "kvfloor": 0.1, "difference": 0.1, "largest": 0.3, "common": 0.5, "least": 0.5, "gap": 0.25}
    )


@pytest.mark.parametrize(
    ("rule", "figures", "broken"),
    [
        ("same", {"difference": 1e-5, "gap": 1e-6}, False),
        ("same", {"difference": 2e-4, "gap": 0.0}, True),
        ("same", {"difference": 0.0, "gap": 0.01}, True),
        ("same", {"difference": float("nan")}, True),
        ("other", {"difference": 0.5, "gap": 0.5}, False),
        ("random", {"p": 0.4, "intervals": ""}, False),
        ("random", {"p": 0.001, "intervals": "0.1 to 0.2; 0.3 to 0.4"}, True),
    ],
)
def test_a_broken_equality_is_named(rule: Any, figures: dict[str, Any], broken: bool) -> None:
    table = parity.Table()
    table.add("speech", 256, Pair("KnormPress", rule=rule), {"kvpress": 0.1, "kvfloor": 0.1} | figures)
    assert bool(table.broken) == broken and all("KnormPress() on speech" in line for line in table.broken)


def test_the_permutation_test_counts_splits() -> None:
    """Two pairs split 6 ways: apart as {1, 2}, {3, 4} and its mirror; all splits of equal means are as far apart."""
    assert parity.permutation_p([1.0, 2.0], [3.0, 4.0]) == pytest.approx(2 / 6)
    assert parity.permutation_p([1.0, 4.0], [2.0, 3.0]) == 1.0
