"""What all generators share: seeds, lengths, depths, several questions, and refusals."""

from __future__ import annotations

import random

import pytest

from kvfloor.tasks import FULL, TASKS, Question, Sample
from kvfloor.tasks.mixture import mix, mixable
from kvfloor.tasks.tokenizer import count_tokens

NAMES = tuple(TASKS)
WITH_DEPTH = [name for name in NAMES if TASKS[name].depth_moves]


def evidence(name: str, sample: Sample) -> int:
    """Character at which the sentence that answers the first question starts."""
    question = sample.questions[0]
    if name == "vartrack":
        return sample.context.index(f"= {question.answer.split()[-1]}.")
    if name == "copy":
        return sample.context.index("begin passage")
    tail = question.ask.split("? ")[-1]
    return sample.context.index(f"{tail} {question.answer}.")


def test_every_task_is_described_under_its_name() -> None:
    assert all(task.name == name and task.about and task.unit for name, task in TASKS.items())


@pytest.mark.parametrize("name", NAMES)
def test_seed_and_index_decide_the_sample(name: str) -> None:
    task = TASKS[name]
    first = task.generate(1, 2, 300, questions=2)
    assert task.generate(1, 2, 300, questions=2) == first
    assert task.generate(1, 3, 300, questions=2) != first
    assert task.generate(2, 2, 300, questions=2) != first


@pytest.mark.parametrize("name", NAMES)
def test_the_global_generator_is_neither_read_nor_moved(name: str) -> None:
    random.seed(5)
    before = random.getstate()
    first = TASKS[name].generate(1, 2, 200)
    assert random.getstate() == before
    random.seed(6)
    assert TASKS[name].generate(1, 2, 200) == first


@pytest.mark.parametrize("length", [128, 1000, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_length_is_met_and_never_passed(name: str, length: int) -> None:
    for index in range(3):
        tokens = count_tokens(TASKS[name].generate(0, index, length).context)
        assert length - 8 <= tokens <= length


@pytest.mark.parametrize("name", NAMES)
def test_length_is_met_for_another_tokenizer(name: str) -> None:
    """A count that is not additive: four characters a token, whatever the words."""
    sample = TASKS[name].generate(0, 0, 900, count=lambda text: 1 + len(text) // 4)
    assert 900 - 24 <= 1 + len(sample.context) // 4 <= 900


@pytest.mark.parametrize("name", WITH_DEPTH)
def test_depth_moves_the_evidence(name: str) -> None:
    task = TASKS[name]
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        sample = task.generate(7, 1, 3000, depth=depth)
        share = evidence(name, sample) / len(sample.context)
        # a passage or a 64-digit key that starts at the end still takes its own room; a chain's rest follows
        assert abs(share - depth) < (0.15 if name == "vartrack" else 0.08), (depth, share)


@pytest.mark.parametrize("name", WITH_DEPTH)
def test_without_depth_the_evidence_is_spread(name: str) -> None:
    shares = [
        evidence(name, sample) / len(sample.context) for sample in (TASKS[name].generate(7, i, 600) for i in range(24))
    ]
    assert min(shares) < 0.3
    assert max(shares) > (0.35 if name == "vartrack" else 0.6)


@pytest.mark.parametrize("name", NAMES)
def test_difficulty_is_kept(name: str) -> None:
    task = TASKS[name]
    easy = task.generate(0, 0, 900, difficulty=max(4, task.lowest))
    hard = task.generate(0, 0, 900, difficulty=8)
    assert easy != hard
    sizes = {
        "recall": lambda s: sum(word.rstrip(".").isdigit() for word in s.context.split()),
        "kv": lambda s: s.context.count("="),
        "passkey": lambda s: len(s.questions[0].answer),
        "passkey64": lambda s: len(s.questions[0].answer),
        "needles": lambda s: s.context.count("code"),
        "vartrack": lambda s: s.questions[0].answer.count("="),
        "words": lambda s: len(set(s.context.split())) - 1,
        "copy": lambda s: len(s.questions[0].answer.split()),
        "registers": lambda s: len({word for word in s.context.split() if word.startswith("r")}),
    }
    size = sizes[name](hard)
    lowest = {"passkey": 7, "copy": 5}.get(name, 8)
    assert lowest <= size <= 8 or (name == "vartrack" and size == 8)


@pytest.mark.parametrize("name", ["recall", "kv", "needles", "vartrack"])
def test_questions_differ(name: str) -> None:
    sample = TASKS[name].generate(0, 0, 600, questions=4)
    assert len({question.ask for question in sample.questions}) == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_question_is_not_part_of_the_context(name: str) -> None:
    sample = TASKS[name].generate(0, 0, 300)
    assert sample.prompt() == f"{sample.context} {sample.questions[0].ask}"
    assert isinstance(sample.questions[0], Question)
    assert sample.context.split()[-1] != sample.questions[0].ask.split()[-1]


def test_kv_keys_share_their_halves() -> None:
    """The first half of a key alone must not find the pair, or the task would be one-token recall."""
    context = TASKS["kv"].generate(0, 0, 2048).context
    halves = [word[:2] for word, sign in zip(context.split(), context.split()[1:], strict=False) if sign == "="]
    assert len(set(halves)) < len(halves) * 0.8


def test_needle_keys_share_their_words() -> None:
    context = TASKS["needles"].generate(0, 0, 2048).context
    words = context.split()
    traits = [words[i + 3] for i, word in enumerate(words) if word == "code"]
    things = [words[i + 4] for i, word in enumerate(words) if word == "code"]
    assert len(set(traits)) < len(traits)
    assert len(set(things)) < len(things)


def test_registers_include_old_values_and_stale_ones() -> None:
    """A window over the last tenth must miss some current value, and every register must be overwritten."""
    lines = TASKS["registers"].generate(0, 0, 2048).context.split(". ")
    names = [line.split(" = ")[0] for line in lines]
    recent = set(names[-len(names) // 10 :])
    assert recent < set(names)
    assert all(names.count(name) >= 2 for name in set(names))


@pytest.mark.parametrize(
    ("name", "wishes", "message"),
    [
        ("recall", {"length": 0}, "length=0"),
        ("recall", {"length": 40, "difficulty": 64}, "ask for a longer context"),
        ("kv", {"difficulty": 0}, "difficulty=0"),
        ("kv", {"questions": 0}, "questions=0"),
        ("kv", {"depth": 1.5}, "depth=1.5"),
        ("words", {"depth": 0.5}, "spreads its evidence"),
        ("registers", {"depth": 0.5}, "spreads its evidence"),
        ("registers", {"length": 40, "difficulty": 16}, "16 registers need"),
        ("registers", {"difficulty": 17}, "difficulty=17"),
        ("words", {"length": 10}, "room for 16 words"),
    ],
)
def test_impossible_wishes_are_refused(name: str, wishes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[name].generate(0, 0, **({"length": 300} | wishes))  # pyright: ignore[reportArgumentType]


def test_a_smaller_lexicon_is_kept_to() -> None:
    small = FULL.shrink(8)
    context = TASKS["words"].generate(0, 0, 200, lexicon=small).context
    assert set(context.split()) <= set(small.things)
    with pytest.raises(ValueError, match="symbols=0"):
        FULL.shrink(0)
    with pytest.raises(ValueError, match="only 8 exist"):
        small.numbers(random.Random(0), 2, 9)


def test_mixtures_ask_every_task_and_share_no_names() -> None:
    names = mixable()
    assert set(names) == set(NAMES) - {"words", "registers"}
    context, asked = mix(names, 0, 0, 2048, 2, count_tokens, FULL)
    assert 2048 - 8 <= count_tokens(context) <= 2048
    assert {name for name, _ in asked} == set(names)
    assert mix(names, 0, 0, 2048, 2, count_tokens, FULL) == (context, asked)
    for name, question in asked:
        if name == "recall":
            assert context.split().count(question.ask) == 1
    with pytest.raises(ValueError, match="fills its whole context"):
        mix(("words",), 0, 0, 512, 1, count_tokens, FULL)
