"""The tokenizer: reads the tasks' text without loss, puts BOS first, and knows every letter and digit."""

from __future__ import annotations

import pytest

from kvfloor.tasks import TASKS
from kvfloor.tasks.tokenizer import BOS, EOS, PAD, UNK, build_tokenizer, count_tokens, encode, vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("name", TASKS)
def test_contexts_and_answers_survive_a_round_trip(name: str, tokenizer) -> None:
    for index in range(3):
        sample = TASKS[name].generate(11, index, 500, questions=3)
        for text in (sample.context, *(q.ask for q in sample.questions), *(q.answer for q in sample.questions)):
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("name", TASKS)
def test_a_question_can_be_tokenised_apart_from_its_context(name: str, tokenizer) -> None:
    sample = TASKS[name].generate(11, 0, 300)
    question = sample.questions[0]
    whole = tokenizer(f"{sample.prompt()} {question.answer}").input_ids
    parts = tokenizer(sample.context).input_ids
    parts += tokenizer(question.ask, add_special_tokens=False).input_ids
    parts += tokenizer(question.answer, add_special_tokens=False).input_ids
    assert whole == parts


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("4821", [BOS, "48", "##21"]),
        ("48213", [BOS, "48", "##21", "##3"]),
        ("7", [BOS, "7"]),
        ("the fox.", [BOS, "the", "fox", "."]),
        ("r3 = 07.", [BOS, "r3", "=", "07", "."]),
        ("Xu", [BOS, "x", "##u"]),
        ("", [BOS]),
    ],
)
def test_tokens(text: str, tokens: list[str], tokenizer) -> None:
    assert tokenizer(text).tokens() == tokens
    assert count_tokens(text) == len(tokens)
    assert encode(text) == tokenizer.convert_tokens_to_ids(tokens)
    assert encode(text, bos=False) == encode(text)[1:]


def test_specials_and_size(tokenizer) -> None:
    assert len(tokenizer) == len(vocabulary()) <= 2000
    assert tokenizer.bos_token == BOS and tokenizer.eos_token == EOS
    assert tokenizer.pad_token == PAD and tokenizer.unk_token == UNK
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_an_unknown_sign_is_unknown(tokenizer) -> None:
    assert tokenizer.unk_token_id in tokenizer("価").input_ids
