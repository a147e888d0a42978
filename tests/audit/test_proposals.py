"""Settings with one method per layer that an audit proposes, against all choices from the costs that it measured."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from kvfloor.audit import proposals as proposing
from kvfloor.audit.proposals import AIM, FILE, proposals
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.run import run
from kvfloor.audit.texts import GENERATED, UNREAD, excerpts, text_of, unread_excerpt
from kvfloor.hf import prepare
from kvfloor.hf.held import held_bytes
from kvfloor.hf.mixed import cache_shapes
from kvfloor.methods.grammar import parse
from kvfloor.methods.mixed.costs import read_costs
from kvfloor.models import load
from tests.cli.running import kvfloor

CONTEXT, FEW = 96, ("exact:k5v4", "exact:k3v3")
LIMIT = 0.05


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = load()
    return prepare(model), tokenizer


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    """Let costs be measured for two methods alone, which saves time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposing, "METHODS", FEW)
        yield


@pytest.fixture(scope="module")
def costs(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return the file of costs that a proposal wrote, and its steps."""
    folder, steps = tmp_path_factory.mktemp("costs"), list[str]()
    question = request_for(folder, mixed=("limit",))
    proposals(question, *loaded, lambda _, text: steps.append(text), lambda text: None)
    return folder / FILE, steps


def request_for(out: Path, **more: Any) -> AuditRequest:
    plain: dict[str, Any] = {"methods": ("h2o",), "budgets": ("48",), "texts": GENERATED[:1], "tasks": ()}
    return AuditRequest(**plain | {"contexts": (CONTEXT,), "kl_limit": LIMIT, "out": out} | more)


def never(total: int, text: str) -> None:
    pytest.fail(f"{text} is measured again")


def test_proposals_are_the_best_of_all_choices_and_costs_are_measured_once(
    loaded: tuple[Any, Any], costs: tuple[Path, list[str]]
) -> None:
    path, steps = costs
    shapes, dtype = cache_shapes(loaded[0])
    question = request_for(path.parent, mixed=("limit", "250KiB"))
    said: list[str] = []
    (least, why_least), (sized, why_sized) = proposals(question, *loaded, never, said.append)
    table = read_costs(path)
    assert len(steps) == 1 + 4 * len(FEW) and table.texts == (UNREAD,) and UNREAD not in question.text_names
    sizes = {text: held_bytes(parse(text), shapes[:1], CONTEXT, dtype, 1)[1].after for text in ("exact", *FEW)}
    nats = [{row.method: row.nats for row in rows} for _, rows in table.units()]
    choices = [
        (sum(sizes[text] for text in texts), sum(cost[text] for cost, text in zip(nats, texts, strict=True)), texts)
        for texts in product(sizes, repeat=4)
    ]

    def text_of_choice(texts: tuple[str, ...]) -> str:
        return str(parse(f"layers({','.join(texts)})"))

    wanted = min(one for one in choices if one[1] <= AIM * LIMIT)
    assert least == text_of_choice(wanted[2]) and "layers(4*" not in least
    assert wanted[0] < sum(sizes["exact"] for _ in range(4)) and f"{least} was proposed by --mixed limit" in why_least
    wanted = min((one for one in choices if one[0] <= 250 * 1024), key=lambda one: one[1])
    assert sized == text_of_choice(wanted[2]) and "the least sum of costs in 250KiB" in why_sized and why_sized in said

    with pytest.raises(ValueError, match="--mixed 1KiB after 96 tokens: 1,024 bytes are too few"):
        proposals(request_for(path.parent, mixed=("1KiB",)), *loaded, never, said.append)


@pytest.mark.parametrize("change", ["fresh", "cut off", "of another length"])
def test_costs_that_do_not_fit_are_measured_again(
    loaded: tuple[Any, Any], costs: tuple[Path, list[str]], change: str, tmp_path: Path
) -> None:
    text = costs[0].read_text()
    (tmp_path / FILE).write_text(text[:99] if change == "cut off" else text)
    length = 97 if change == "of another length" else CONTEXT
    question = request_for(tmp_path, mixed=("limit",), fresh=change == "fresh", contexts=(length,))
    with pytest.raises(KeyboardInterrupt):
        proposals(question, *loaded, interrupt, lambda text: None)
    assert (tmp_path / FILE).exists()


def interrupt(total: int, text: str) -> None:
    raise KeyboardInterrupt


def test_an_audit_measures_and_judges_what_it_proposes(costs: tuple[Path, list[str]], tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(costs[0].read_bytes())
    question = request_for(tmp_path, mixed=("limit",), continuation=512)
    answer = run(question, lambda total, text: None)
    (row,) = (row for row in answer.texts if row.name == "layers")
    (judged,) = (one for one in answer.recommendation.judged if one.setting == row.method)
    (note,) = (note for note in answer.meta.notes if "--mixed limit" in note)
    assert note.startswith(f"{row.method} was proposed") and judged.divergence is not None
    if judged.believed:
        assert answer.recommendation.chosen is not None
        assert answer.recommendation.chosen.state_bytes <= judged.state_bytes
    said: list[str] = []
    again = run(question, lambda total, text: None, said.append)
    assert any("the report is made anew" in line for line in said) and again.meta.notes == answer.meta.notes


def test_the_text_of_the_costs_is_none_that_the_audit_reads(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    _, tokenizer = loaded

    def encode(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    words = " ".join(f"{number}" for number in range(10, 100))
    (tmp_path / "long.txt").write_text(" ".join([words] * 8))
    (tmp_path / "short.txt").write_text(" ".join([words] * 4))
    long, short = str(tmp_path / "long.txt"), str(tmp_path / "short.txt")
    head, whole = encode(""), encode(text_of(long, 0))
    read, context, continuation = 300, 60, 200
    found = unread_excerpt([short, long], read, context, continuation, encode)
    begin = len(head) + read
    assert found.cell.text == "long (unread)" and (found.cell.context, found.cell.continuation) == (60, 200)
    assert found.context + found.continuation == head + whole[begin : begin + 260 - len(head)]
    (first,) = excerpts([long], [100], 200, encode)
    assert len(first.context + first.continuation) == read <= begin
    assert unread_excerpt([short], read, context, continuation, encode).cell.text == "speech (unread)"
    assert unread_excerpt(GENERATED, read, context, continuation, encode).cell.text == UNREAD
    with pytest.raises(ValueError, match="none of the texts"):
        unread_excerpt([short], read, 10**6, continuation, encode)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"mixed": ("25%",)}, "--mixed '25%': give limit, or a size such as 8MiB"),
        ({"mixed": ("limit",), "minutes": 600.0}, "leave it out with --minutes"),
        ({"mixed": ("8MiB",), "shard": (1, 2)}, "leave it out with --shard"),
        ({"mixed": ("8MiB",), "tp": 2}, "leave it out with --tp"),
    ],
)
def test_impossible_wishes_are_named(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        request_for(tmp_path, **more).check()


def test_the_command_takes_the_wish(tmp_path: Path) -> None:
    found = kvfloor("audit", "--mixed", "12", "--out", str(tmp_path))
    assert found.returncode == 2 and found.stderr == "kvfloor: --mixed '12': give limit, or a size such as 8MiB\n"
