"""Every answer is worked out again from the printed context alone, by another way than the generator's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from kvfloor.tasks import TASKS, Question, score


def only(found: list[str]) -> str:
    assert len(found) == 1, f"expected one match, found {found}"
    return found[0]


def from_recall(context: str, question: Question) -> str:
    return only(re.findall(rf"(?<!\S){question.ask} (\d\d)\.", context))


def from_kv(context: str, question: Question) -> str:
    return only(re.findall(rf"(?<!\S){question.ask} (\d{{4}})\.", context))


def from_passkey(context: str, question: Question) -> str:
    kind = question.ask.split()[3]
    return only(re.findall(rf"the {kind} key is (\d+)\.", context))


def from_needles(context: str, question: Question) -> str:
    key = question.ask.split("?")[0].removeprefix("what is the code of the ")
    return only(re.findall(rf"the code of the {key} is (\d+)\.", context))


def from_vartrack(context: str, question: Question) -> str:
    memory: dict[str, tuple[str, ...]] = {}
    for name, source in re.findall(r"let (\w+) = (\w+)\.", context):
        memory[name] = (source,) if source.isdigit() else (source, *memory[source])
    return " = ".join(memory[question.ask.split()[-2]])


def from_words(context: str, question: Question) -> str:
    counts = [count for _, count in Counter(context.split()).most_common()]
    assert all(abs(count * rank - counts[0]) < rank + 1 for rank, count in enumerate(counts, 1)), "Zipf's law"
    assert counts[0] >= 1.5 * counts[1], "the first must be clear"
    return Counter(context.split()).most_common(1)[0][0]


def from_copy(context: str, question: Question) -> str:
    return only(re.findall(r"begin passage (.*?) end passage\.", context))


def from_registers(context: str, question: Question) -> str:
    machine: dict[str, str] = {}
    for line in context.removesuffix(".").split(". "):
        name, value = line.split(" = ")
        machine[name] = value
    names = [f"r{i}" for i in range(len(machine))]
    assert f"list r0 to {names[-1]}." in question.ask
    return " ".join(f"{name} = {machine[name]}" for name in names).removeprefix("r0 = ")


SOLVERS: dict[str, Callable[[str, Question], str]] = {
    "recall": from_recall,
    "kv": from_kv,
    "passkey": from_passkey,
    "passkey64": from_passkey,
    "needles": from_needles,
    "vartrack": from_vartrack,
    "words": from_words,
    "copy": from_copy,
    "registers": from_registers,
}


def test_every_task_has_a_solver() -> None:
    assert set(SOLVERS) == set(TASKS)


@pytest.mark.parametrize("length", [96, 700, 2048])
@pytest.mark.parametrize("name", SOLVERS)
def test_answer_follows_from_the_context(name: str, length: int) -> None:
    for index in range(6):
        sample = TASKS[name].generate(3, index, length, questions=3)
        for question in sample.questions:
            assert SOLVERS[name](sample.context, question) == question.answer


@pytest.mark.parametrize("name", SOLVERS)
def test_no_question_gives_its_answer_away(name: str) -> None:
    """Another sample's context answers the same kind of question differently: the context is needed."""
    answers = {TASKS[name].generate(3, index, 400).questions[0].answer for index in range(12)}
    assert len(answers) >= 9


def test_score_ignores_white_space_only() -> None:
    assert score("48 = 21", " 48 =  21\n")
    assert not score("4821", "48 21")
    assert not score("4821", "4821 4821")
    assert not score("fox", "Fox")
