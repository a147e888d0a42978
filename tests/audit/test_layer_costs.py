"""Costs of methods in single layers, against the model's own attention with tokens hidden in that layer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvfloor.audit.chosen import with_chosen
from kvfloor.audit.layer_costs import measure_layers
from kvfloor.audit.nats import figures
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.run import run
from kvfloor.audit.texts import GENERATED, excerpts
from kvfloor.hf import CompressedCache, prepare
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.methods.grammar import parse
from kvfloor.methods.mixed.costs import CostTable, write_costs
from kvfloor.models import load
from tests.cli.running import kvfloor

CONTEXT, SCORED, KEPT = 90, 512, 40
WINDOW = f"window(block=1)@{KEPT}"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = load()
    return prepare(model), lambda text: tokenizer(text).input_ids


@pytest.fixture(scope="module")
def table(loaded: tuple[Any, Any]) -> CostTable:
    methods = (WINDOW, "exact:k4v4", "exact:k2v2", "exact")
    return measure_layers(*loaded, methods, texts=GENERATED[:1], context=CONTEXT, scored=SCORED)


@torch.inference_mode()
def with_a_window_in(model: nn.Module, layers: range, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits if these layers see only a token and the KEPT before it."""
    place = torch.arange(ids.shape[1])
    behind = place.unsqueeze(1) - place
    causal, seen = behind >= 0, (behind >= 0) & (behind <= KEPT)

    def masked(mask: torch.Tensor) -> Any:
        return lambda layer, args, kwargs: (args, kwargs | {"attention_mask": mask[None, None]})

    hooks = [
        layer.register_forward_pre_hook(masked(seen if i in layers else causal), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)  # type: ignore[union-attr, arg-type]
    ]
    try:
        return model(ids).logits[0, CONTEXT - 1 : -1]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("together", [1, 3])
def test_a_window_in_one_unit_costs_what_hiding_tokens_there_does(
    loaded: tuple[Any, Any], table: CostTable, together: int
) -> None:
    texts = {"texts": GENERATED[:1], "context": CONTEXT, "scored": SCORED}
    found = table if together == 1 else measure_layers(*loaded, [WINDOW], **texts, together=together)
    plain, _ = load()
    (excerpt,) = excerpts(GENERATED[:1], [CONTEXT], SCORED, loaded[1])
    ids = torch.tensor([excerpt.context + excerpt.continuation])
    exact = with_a_window_in(plain, range(0), ids)
    units = list(found.units())
    assert [unit for unit, _ in units] == ([(i, i) for i in range(4)] if together == 1 else [(0, 2), (3, 3)])
    costs = []
    for (first, last), rows in units:
        wanted = figures([exact], [with_a_window_in(plain, range(first, last + 1), ids)], [ids[0, CONTEXT:]]).kl
        (window,) = (row for row in rows if row.method == WINDOW)
        assert window.nats == pytest.approx(sum(wanted) / SCORED, rel=1e-3, abs=1e-6)
        assert window.low < window.nats < window.high
        costs.append(window.nats)
    assert max(costs) > 10 * min(costs)  # the mutant: all layers at once, or always the same one


def test_the_table_has_exact_at_no_cost_and_each_method_once(loaded: tuple[Any, Any], table: CostTable) -> None:
    assert table.layers == 4 and dict(table.model) == fingerprint(loaded[0])
    for _, rows in table.units():
        assert [row.method for row in rows] == ["exact", WINDOW, "exact:k4v4", "exact:k2v2"]
        assert rows[0].nats == 0 < rows[2].nats < rows[3].nats


def test_what_is_no_method_of_a_layer_is_refused_before_measuring(loaded: tuple[Any, Any]) -> None:
    for methods, words in ((["h2o@1MiB"], "whole cache"), (["auto"], "whole model"), (["tensor"], "pairs of tokens")):
        with pytest.raises(ValueError, match=words):
            measure_layers(*loaded, methods, texts=GENERATED[:1], context=CONTEXT, scored=SCORED)
    with pytest.raises(ValueError, match="too few scored tokens"):
        measure_layers(*loaded, texts=GENERATED[:1], context=CONTEXT, scored=64)
    with pytest.raises(ValueError, match="together"):
        measure_layers(*loaded, texts=GENERATED[:1], context=CONTEXT, scored=SCORED, together=0)


def test_an_audit_measures_the_layers_that_auto_chooses(table: CostTable, tmp_path: Path) -> None:
    write_costs(tmp_path / "costs.json", table)
    asked = f"auto(rows='{tmp_path}/costs.json')@250KiB"
    said: list[str] = []
    question = AuditRequest(methods=("h2o", asked), texts=GENERATED[:1], tasks=(), contexts=(CONTEXT,), out=tmp_path)
    found, notes = with_chosen(question, lambda total, text: said.append(text), said.append)
    model, _ = load()
    wanted = str(CompressedCache(prepare(model), asked, context=CONTEXT).method)
    assert found.methods == ("h2o", wanted) and parse(wanted).kinds and f"{asked} after 90 tokens is {wanted}" in said
    plain = AuditRequest(methods=("h2o",), texts=GENERATED[:1], tasks=(), contexts=(CONTEXT,))
    assert not notes and with_chosen(plain, lambda total, text: said.append(text), said.append)[0] is plain
    with pytest.raises(ValueError, match="choose first"):
        AuditRequest(methods=(asked,), prompts=tmp_path / "prompts.jsonl").check()


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    found = kvfloor("measure-layers", "--out", str(tmp_path / "costs.json"), "--methods", "h2o@1MiB")
    assert found.returncode == 2 and "bytes are for a whole cache" in found.stderr and found.stderr.count("\n") == 1
    assert not (tmp_path / "costs.json").exists()


@pytest.mark.slow
def test_measured_costs_become_a_row_of_an_audit(tmp_path: Path) -> None:
    """From the command that measures to the rows, the errors by head and the report of the setting."""
    costs = tmp_path / "costs.json"
    words = ("--methods", "exact:k4v4,exact:k3v3,sinks@25%", "--context", "128", "--json")
    assert kvfloor("measure-layers", "--out", str(costs), *words).returncode == 0
    question = AuditRequest(
        methods=(f"auto(rows='{costs}')@400KiB",),
        budgets=("64",),
        texts=GENERATED[:1],
        tasks=("recall",),
        contexts=(256,),
        continuation=512,
        n=32,
        out=tmp_path / "audit",
    )
    answer = run(question, lambda total, text: None)
    (text,) = (row for row in answer.texts if row.name == "layers")
    (row,) = (row for row in answer.rows if row.name == "layers")
    assert text.method == row.method == str(parse(row.method)) and text.state_bytes <= 400 * 1024
    assert any(one.method == row.method for one in answer.closer.error_maps)
    assert any(one.setting == row.method for one in answer.recommendation.judged)
