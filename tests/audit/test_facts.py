"""Bits certified of hidden facts, against the model's own forward over the whole text and against planted messages."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvfloor.audit.fact_rows import CHOICES, FactRow, gain
from kvfloor.audit.facts import measure_facts, require_prefix_code
from kvfloor.hf import prepare
from kvfloor.models import load
from kvfloor.report.facts import fact_lines
from kvfloor.tasks.recall import RECALL
from tests.cli.running import kvfloor

CONTEXT, FACTS, SHEETS = 160, 12, 2


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = load()
    return prepare(model), tokenizer


@pytest.fixture(scope="module")
def rows(loaded: tuple[Any, Any]) -> dict[str, FactRow]:
    found = measure_facts(*loaded, ("exact", "snapkv@40", "window@4"), context=CONTEXT, facts=FACTS, sheets=SHEETS)
    return {row.method: row for row in found}


@torch.inference_mode()
def test_exact_bets_as_the_model_without_a_cache(loaded: tuple[Any, Any], rows: dict[str, FactRow]) -> None:
    model, tokenizer = load()
    bets, right = [], 0
    for index in range(SHEETS):
        sheet = RECALL.generate(0, index, CONTEXT, difficulty=FACTS, questions=FACTS)
        for question in sheet.questions:
            ids = torch.tensor([tokenizer(f"{sheet.context} {question.ask} {question.answer}").input_ids])
            p = model(ids).logits[0, -2].double().softmax(-1)
            bets.append(float(p[ids[0, -1]]))
            right += int(p.argmax() == ids[0, -1])
    row = rows["exact"]
    assert (row.right, row.facts, row.sheets) == (right, SHEETS * FACTS, SHEETS)
    assert row.gain == pytest.approx(gain(bets, CHOICES), rel=1e-4)


def test_a_small_window_certifies_nothing_and_exact_nearly_everything(rows: dict[str, FactRow]) -> None:
    exact, some, none = rows["exact"], rows["snapkv@40"], rows["window@4"]
    assert exact.certified_bits > 0.7 * exact.hidden_bits
    assert none.certified_bits == 0 and none.right <= 4
    assert none.certified_bits < some.certified_bits < exact.certified_bits
    assert none.cache_bytes < some.cache_bytes < exact.cache_bytes
    for row in rows.values():
        assert not row.hides_memory
        assert 8 * row.needed_bytes <= row.hidden_bits
        assert row.right <= row.most_facts


def test_questions_do_not_change_the_message(loaded: tuple[Any, Any], rows: dict[str, FactRow]) -> None:
    few = measure_facts(*loaded, ("snapkv@40",), context=CONTEXT, facts=FACTS, sheets=1)
    assert 2 * few[0].cache_bytes == rows["snapkv@40"].cache_bytes


def test_bets_win_no_more_than_a_message_holds() -> None:
    """A message of `known` facts of 64: the gain exceeds their bits by t in at most a share 2^-t of the trials."""
    draw = random.Random(5)
    known, facts, trials, beyond = 9, 64, 400, 0
    for _ in range(trials):
        hidden = [draw.randrange(CHOICES) for _ in range(facts)]
        sent = hidden[:known]
        bets = []
        for i, value in enumerate(hidden):
            guess = sent[i] if i < known else draw.randrange(CHOICES)
            sure = 1.0 if i < known else 0.3
            bets.append(sure if guess == value else (1 - sure) / (CHOICES - 1))
        beyond += gain(bets, CHOICES) >= known * math.log2(CHOICES) + 3
    assert beyond <= trials / 8 + 3 * math.sqrt(trials / 8)
    assert gain([1.0] * known + [1 / CHOICES] * (facts - known), CHOICES) > 0.9 * known * math.log2(CHOICES) - 3


def test_bets_that_sum_to_more_than_one_would_certify_too_much() -> None:
    """The mutant of the prefix rule: a value's tokens that begin another's are bet on twice."""
    assert gain([1.0] * 64, CHOICES) > 64 * math.log2(CHOICES) - 64
    with pytest.raises(ValueError, match=r"begin those of another"):
        require_prefix_code([[4], [4, 7], [5, 1]])
    with pytest.raises(ValueError, match=r"begin those of another"):
        require_prefix_code([[4, 7], [5, 1], [4, 7]])
    require_prefix_code([[4, 7], [4, 8], [5]])


def test_memory_elsewhere_is_told(rows: dict[str, FactRow]) -> None:
    cheat = replace(rows["exact"], cache_bytes=3)
    assert cheat.hides_memory
    assert "keeps memory elsewhere" in fact_lines([cheat])[-1]
    assert "elsewhere" not in "\n".join(fact_lines(list(rows.values())))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"facts": 0}, "facts must be"),
        ({"facts": 1000}, "facts must be at most"),
        ({"sheets": 0}, "sheets must be"),
        ({"context": 20}, "longer context"),
        ({"methods": ("nothing@4",)}, "unknown"),
    ],
)
def test_bad_arguments_are_refused(loaded: tuple[Any, Any], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_facts(*loaded, **{"context": CONTEXT, "facts": FACTS, "sheets": 1} | wrong)


def test_the_command_prints_a_table_and_json() -> None:
    given = ("facts", "--methods", "exact,window@4", "--context", "120", "--facts", "6", "--sheets", "1")
    shown = kvfloor(*given)
    assert "bits certified" in shown.stdout and "window@4" in shown.stdout
    assert '"certified_bits"' in kvfloor(*given, "--json").stdout
