"""The tasks in plain English: each answer is worked out again from the printed text, and each part is checked alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from kvfloor.tasks import EVERY, GROUPS, TASKS, Sample, expand, lookup

NAMES = [task.name for task in GROUPS["assistant"]]


def pieces(text: str) -> int:
    return 1 + len(re.findall(r"[A-Za-z]{1,5}|\S", text))


def made(name: str, length: int = 2048, index: int = 0) -> Sample:
    return lookup(name).generate(5, index, length, count=pieces)


def shares(sample: Sample, *said: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for question, one in zip(sample.turns, said, strict=True):
        found |= question.shares(one, lambda text: text)
    return found


def test_the_groups_hold_every_task_once() -> None:
    assert set(EVERY) == {task.name for group in GROUPS.values() for task in group}
    assert sum(map(len, GROUPS.values())) == len(EVERY) == len(TASKS) + 12 + 4
    assert expand(["ruler", "recall"]) == [*(task.name for task in GROUPS["ruler"]), "recall"]
    assert expand(["all"]) == list(TASKS)
    assert all(task.chat == (name != "builtin") for name, group in GROUPS.items() for task in group)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1024, 5000])
def test_all_turns_together_fill_the_length_and_never_exceed_it(name: str, length: int) -> None:
    assert len({tuple(question.most for question in made(name, length, index).turns) for index in range(5)}) == 1
    for index in range(3):
        sample = made(name, length, index)
        whole = sample.context + "".join(question.lead for question in sample.turns)
        total = pieces(whole) + sum(question.most or 0 for question in sample.turns)
        assert 0.93 * length < total <= length


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_sample_and_others_another(name: str) -> None:
    assert made(name) == made(name) != made(name, index=1)
    by_words = lookup(name).generate(5, 0, 8192, count=lambda text: len(text.split()))
    by_letters = lookup(name).generate(5, 0, 8192, count=lambda text: len(text) // 3)
    assert [one.answer for one in by_words.questions] == [one.answer for one in by_letters.questions]


@pytest.mark.parametrize("name", NAMES)
def test_the_right_answers_meet_every_part(name: str) -> None:
    for index in range(8):
        sample = made(name, index=index)
        found = shares(sample, *(question.answer for question in sample.turns))
        assert len(found) == sum(len(question.parts) for question in sample.turns) > 1
        assert set(found.values()) == {1.0}
        assert set(shares(sample, *("no idea" for _ in sample.turns)).values()) == {0.0}


@pytest.mark.parametrize("index", range(6))
def test_a_calls_arguments_are_read_from_the_text(index: int) -> None:
    sample = made("tool_call", index=index)
    (person,) = re.findall(r"the delivery for the (\w+)\.", sample.questions[0].ask)
    about = re.findall(rf"The delivery for the {person} ([^.]*)\.", sample.context)
    call = {}
    for fact in about:
        if found := re.fullmatch(r"has the order number (\d{7})", fact):
            call["order_number"] = int(found[1])
        elif found := re.fullmatch(r"goes to the street (\d+ [A-Z]\w+ Road)", fact):
            call["street"] = found[1]
        elif found := re.fullmatch(r"consists of (\d+) crates of the goods called (\w+)", fact):
            call["crates"], call["goods"] = int(found[1]), found[2]
        else:
            call["express"] = {"is an express delivery": True, "is not an express delivery": False}[fact]
    assert len(about) == 4 and json.loads(sample.questions[0].answer) == {"name": "book_delivery", "arguments": call}
    assert sample.context.count("The delivery for the ") == 12
    assert '"parameters"' in sample.context[:200]


def test_every_wrong_argument_fails_its_own_part() -> None:
    sample = made("tool_call")
    call = json.loads(sample.questions[0].answer)
    for name, value in call["arguments"].items():
        for wrong in (str(value) if not isinstance(value, str) else value + " ", None, [value]):
            said = json.dumps(call | {"arguments": call["arguments"] | {name: wrong}})
            assert [part for part, share in shares(sample, said).items() if share < 1] == [name]
    assert [part for part, share in shares(sample, json.dumps(call | {"name": "book"})).items() if share < 1] == [
        "call"
    ]


def test_every_broken_instruction_fails_its_own_part() -> None:
    sample = made("instructions")
    right = sample.questions[0].answer
    first, number, last = right.split()[0], right.split()[1], right.split()[-1]
    rules = re.findall(r"^\d\. (.*)$", sample.context, re.MULTILINE)
    assert rules == [
        f"The first word of the answer is {first}.",
        f"The last word of the answer is {last}.",
        f"The answer mentions the number {number}.",
        f"The answer has exactly {len(right.splitlines())} lines.",
    ]
    assert sample.context.index(rules[3]) < 400
    broken: dict[str, Callable[[], str]] = {
        "first word": lambda: f"well {right}",
        "last word": lambda: f"{right} indeed",
        "number": lambda: right.replace(number, number + "1"),
        "lines": lambda: right.replace("\n", "\n\nand\n", 1),
    }
    for part, said in broken.items():
        assert [name for name, share in shares(sample, said()).items() if share < 1] == [part]


@pytest.mark.parametrize("index", range(4))
def test_three_turns_ask_for_different_facts_of_the_context(index: int) -> None:
    sample = made("turns", index=index)
    facts = dict(re.findall(r"The locker of (\S+) has the number (\d{7})\.", sample.context))
    assert sample.in_turn and len(facts) == 6 and len(sample.turns) == 3
    asked = [re.findall(r"the locker of (\S+)\?", question.ask)[0] for question in sample.turns]
    assert len(set(asked)) == 3 and [facts[key] for key in asked] == [question.answer for question in sample.turns]
    assert [question.opening for question in sample.turns] == [f"The locker of {key} has the number" for key in asked]
    first = shares(sample, sample.turns[0].answer, "1", "2")
    assert first == {"turn 1": 1, "turn 2": 0, "turn 3": 0}


@pytest.mark.parametrize("index", range(8))
def test_the_ledgers_state_is_replayed_from_the_stream(index: int) -> None:
    sample = made("ledger", index=index)
    state = {box.lower(): thing for box, thing in re.findall(r"(The \w+ box) holds the (\w+)\.", sample.context)}
    assert len(state) == 6 and sample.in_turn and len(sample.turns) == 4
    first, sizes = dict(state), []
    for question in sample.turns:
        stream, _, ask = question.ask.rpartition("\n\n")
        changes = re.findall(r"Now (the \w+ box) holds the (\w+)\.", stream)
        assert len(changes) == 3
        state |= dict(changes)
        box = re.findall(r"What does (the \w+ box) hold now\?", ask)[0]
        (part,) = question.parts
        assert question.answer == state[box] and question.opening == f"Now {box} holds the"
        assert (state[box] == first[box]) == part.name.startswith("kept")
        assert question.shares(f" {question.answer}. Then", str) == {part.name: 1}
        assert question.shares(f" {first[box] + 's'}", str) == {part.name: 0}
        sizes.append(pieces(stream))
    assert 0.3 * 2048 < sum(sizes) < 0.6 * 2048
