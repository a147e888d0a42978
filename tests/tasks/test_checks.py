"""Checks of answers: each accepts what it demands and rejects the nearest wrong answers."""

from __future__ import annotations

import json

import pytest

from kvfloor.tasks import AnswerCheck, BeginsWith, Contains, JsonField, Lines, Matches, Question, SameWords


def same(text: str) -> str:
    return text


CALL = '{"name": "book", "arguments": {"n": 7, "to": "Bern", "fast": true}}'
ARGUMENT = JsonField(("arguments", "n"), "7")


@pytest.mark.parametrize(
    ("check", "said", "share"),
    [
        (SameWords("48 = 21"), " 48 =  21\n", 1),
        (SameWords("48 = 21"), "48 = 21 and", 0),
        (SameWords("48 = 21"), "48 =", 0),
        (SameWords("Bern"), "bern", 0),
        (BeginsWith("48 21"), "48 21 and more", 1),
        (BeginsWith("48 21"), "48 2", 0),
        (BeginsWith("48 21"), "so 48 21", 0),
        (Contains(("Amber", "fox")), "the FOX is amber", 1),
        (Contains(("Amber", "fox")), "the fox", 0.5),
        (Contains(("amber", "fox", "hen", "owl")), "amber hen owls", 0.75),
        (Contains(("amber", "fox"), enough=1), "a fox", 1),
        (Contains(("amber", "fox")), "", 0),
        (Matches(r"^\W*fox\b"), '"Fox": it is', 1),
        (Matches(r"^\W*fox\b"), "a fox", 0),
        (Matches(r"^\W*fox\b"), "foxes", 0),
        (Lines(3), "one\n\ntwo\nthree\n", 1),
        (Lines(3), "one\ntwo", 0),
        (ARGUMENT, CALL, 1),
        (ARGUMENT, f"Here it is:\n```json\n{CALL}\n``` Anything else?", 1),
        (ARGUMENT, "{broken " + CALL, 1),
        (ARGUMENT, CALL.replace("7", '"7"'), 0),
        (ARGUMENT, CALL.replace("7", "7.0"), 0),
        (ARGUMENT, CALL.replace("7", "true"), 0),
        (ARGUMENT, CALL.replace('"n"', '"m"'), 0),
        (ARGUMENT, CALL[:-1], 0),
        (ARGUMENT, '{"arguments": {"n": 8}} ' + CALL, 0),
        (ARGUMENT, '{"arguments": 7}', 0),
        (ARGUMENT, "7", 0),
        (JsonField((), '{"a": 1, "b": [2]}'), '{"b": [2], "a": 1}', 1),
        (JsonField((), '{"a": 1}'), '{"a": 1, "b": 2}', 0),
    ],
)
def test_a_check_accepts_its_demand_and_nothing_near(check: AnswerCheck, said: str, share: float) -> None:
    assert check.share(said, same) == share


def test_a_hostile_answer_is_wrong_and_no_error() -> None:
    for said in ("{" * 20000, '{"a":' * 20000, '{"name": ' + "9" * 5000 + "}"):
        assert ARGUMENT.share(said, same) == 0


@pytest.mark.parametrize("check", [SameWords("x"), BeginsWith("x"), Contains(("x",))])
def test_a_reference_that_the_tokenizer_cannot_write_is_never_met(check: AnswerCheck) -> None:
    assert check.share("", lambda text: "") == 0
    assert check.share("anything", lambda text: "") == 0


def test_references_are_compared_as_the_tokenizer_writes_them() -> None:
    def spaced(text: str) -> str:
        return text.replace("-", " - ")

    assert Contains(("pale-fox",)).share("a pale - fox", spaced) == 1
    assert SameWords("pale-fox").share("pale - fox", spaced) == 1


def test_a_question_without_parts_demands_its_answer_word_for_word() -> None:
    question = Question("ask", "a b")
    assert question.shares("a b", same) == {"answer": 1}
    assert question.shares("a b c", same) == {"answer": 0}


def test_the_lead_keeps_white_space_that_a_question_brings() -> None:
    assert Question("ask", "a").lead == " ask"
    assert Question("\nask", "a", opening="It is").lead == "\nask It is"
    assert Question("", "a").lead == ""


def test_json_values_are_compared_as_json() -> None:
    assert JsonField((), json.dumps({"ü": "é"})).share('{"ü": "\\u00e9"}', same) == 1
