"""A table of costs is read as it was written; a damaged or incomplete one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvfloor.methods.mixed.costs import MOST_BYTES, CostTable, LayerCost, read_costs, write_costs

MODEL = {"model": "Tiny", "adapters": [], "sha256": "0" * 64}


def row(first: int, last: int, method: str = "exact", nats: float = 0.0) -> LayerCost:
    return LayerCost(first, last, method, nats, nats, nats)


def table(*rows: LayerCost, layers: int = 3) -> CostTable:
    return CostTable(MODEL, layers, ("novel",), 1024, 512, rows)


WHOLE = table(row(0, 1), row(0, 1, "exact:k5v4", 0.25), row(2, 2), row(2, 2, "snapkv@25%", 1e-9))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.json", WHOLE)
    assert read_costs(tmp_path / "costs.json") == WHOLE
    assert [unit for unit, _ in WHOLE.units()] == [(0, 1), (2, 2)]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((row(0, 1),), "for 2 of 3 layers"),
        ((row(0, 0), row(2, 2)), "layer 1 are missing"),
        ((row(0, 1), row(1, 2)), "layer 2 are missing"),
        ((row(0, 1), row(2, 2), row(0, 1, "exact:k5v4")), "layer 3 are missing"),
        ((row(0, 2), row(0, 2)), "a method twice"),
        ((row(0, 3),), "for 4 of 3 layers"),
        ((), "for 0 of 3"),
    ],
)
def test_units_are_all_layers_once(rows: tuple[LayerCost, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        table(*rows)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((1, 0, "exact", 0.0), "first <= last"),
        ((-1, 0, "exact", 0.0), "first <= last"),
        ((0, 0, "exact", float("nan")), "no finite number"),
        ((0, 0, "nosuch", 0.0), "unknown"),
        ((0, 0, "h2o@2MiB", 0.0), "not in bytes"),
    ],
)
def test_a_cost_of_no_layer_method_is_refused(values: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        row(*values)


def edited(change: Any) -> str:
    plain = {"schema": 1, **json.loads(json.dumps(WHOLE.as_dict()))}
    change(plain)
    return json.dumps(plain)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"schema": 1}',
        edited(lambda plain: plain.update(schema=2)),
        edited(lambda plain: plain.pop("layers")),
        edited(lambda plain: plain.update(more=1)),
        edited(lambda plain: plain.update(rows=3)),
        edited(lambda plain: plain["rows"][0].pop("nats")),
        edited(lambda plain: plain["rows"].clear()),
        edited(lambda plain: plain["rows"][1].update(method=5)),
        edited(lambda plain: plain.update(layers="3")),
        edited(lambda plain: plain.update(model=[1])),
        edited(lambda plain: plain.update(texts=4)),
    ],
)
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json.*measure-layers"):
        read_costs(path)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing"):
        read_costs(tmp_path / "missing.json")
    with (tmp_path / "huge.json").open("wb") as stream:
        stream.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match="bytes"):
        read_costs(tmp_path / "huge.json")
