"""RULER's tasks against its definitions: texts written out by hand, counts, depths, kinds of keys, lengths."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from kvfloor.tasks import GROUPS, Contains, Sample, lookup
from kvfloor.tasks.haystack import DEPTHS, among_sentences
from kvfloor.tasks.passages import asked_facts, essay, essay_words

NAMES = [task.name for task in GROUPS["ruler"]]
LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
RESERVED = {"niah": 128, "ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50, "ruler_qa": 32}


def pieces(text: str) -> int:
    """A stand-in for a tokenizer: words, numbers digit by digit, punctuation, and one special token."""
    return 1 + len(re.findall(r"[A-Za-z]{1,5}|\S", text))


def made(name: str, length: int = 2048, index: int = 0, count=pieces) -> Sample:
    return lookup(name).generate(7, index, length, count=count)


def references(sample: Sample) -> tuple[str, ...]:
    (part,) = sample.questions[0].parts
    assert isinstance(part.check, Contains) and part.check.enough is None
    return part.check.references


def test_all_published_tasks_are_there() -> None:
    published = "single_1 single_2 single_3 multikey_1 multikey_2 multikey_3 multivalue multiquery".split()
    assert [*(f"niah_{one}" for one in published), "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa"] == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1024, 4096, 9000])
def test_context_question_and_generated_tokens_fill_the_length_and_never_exceed_it(name: str, length: int) -> None:
    for index in range(3):
        sample = made(name, length, index)
        (question,) = sample.turns
        assert question.most == RESERVED[name.split("_")[0] if name.startswith("niah") else name]
        generated = question.most or 0
        total = pieces(sample.context) + pieces(question.lead) - 1 + generated
        assert 0.94 * length < total <= length
        assert pieces(sample.context + question.lead) + generated <= length


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_sample_and_others_another(name: str) -> None:
    first = made(name)
    assert made(name) == first
    assert made(name, index=1).questions != first.questions
    assert lookup(name).generate(8, 0, 2048, count=pieces).questions != first.questions
    letters = made(name, 8192, count=lambda text: 1 + len(text) // 3)
    words = made(name, 8192, count=lambda text: len(text.split()))
    assert letters.questions == words.questions and letters.context != words.context


@pytest.mark.parametrize("name", NAMES)
def test_a_length_that_is_too_short_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"length=150: .* give a longer one"):
        made(name, 150)


def test_single_1_written_out() -> None:
    sample = made("niah_single_1", 600)
    key, value = re.findall(r"for (\S+) is: (\d{7})\.\n", sample.context)[0]
    lines = sample.context.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert Counter(lines[1:]) == {LINE: len(lines) - 2, f"One of the special magic numbers for {key} is: {value}.": 1}
    assert sample.questions[0].ask == f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    assert sample.questions[0].opening == f"The special magic number for {key} mentioned in the provided text is"
    assert references(sample) == (value,) and re.fullmatch(r"[a-z]+-[a-z]+", key)


def test_multiquery_written_out() -> None:
    sample = made("niah_multiquery")
    a, b, c, d = re.findall(r"for (\S+), (\S+), (\S+), and (\S+) mentioned", sample.questions[0].ask)[0]
    assert sample.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    ending = f"the special magic numbers for {a}, {b}, {c}, and {d} mentioned in the provided text"
    assert sample.questions[0].ask == f"\nWhat are all {ending}?"
    assert sample.questions[0].opening == f"T{ending[1:]} are"
    values = {key: value for _, key, value in NEEDLE.findall(sample.context)}
    assert references(sample) == tuple(values[key] for key in (a, b, c, d))


@pytest.mark.parametrize(
    ("name", "needles", "keys", "answers", "key", "value"),
    [
        ("niah_single_1", 1, 1, 1, r"[a-z]+-[a-z]+", r"[1-9]\d{6}"),
        ("niah_single_2", 1, 1, 1, r"[a-z]+-[a-z]+", r"[1-9]\d{6}"),
        ("niah_single_3", 1, 1, 1, r"[a-z]+-[a-z]+", UUID),
        ("niah_multikey_1", 4, 4, 1, r"[a-z]+-[a-z]+", r"[1-9]\d{6}"),
        ("niah_multikey_2", None, None, 1, r"[a-z]+-[a-z]+", r"[1-9]\d{6}"),
        ("niah_multikey_3", None, None, 1, UUID, UUID),
        ("niah_multivalue", 4, 1, 4, r"[a-z]+-[a-z]+", r"[1-9]\d{6}"),
        ("niah_multiquery", 4, 4, 4, r"[a-z]+-[a-z]+", r"[1-9]\d{6}"),
    ],
)
def test_needles_have_the_published_numbers_and_kinds(
    name: str, needles: int | None, keys: int | None, answers: int, key: str, value: str
) -> None:
    for index in range(4):
        sample = made(name, index=index)
        found = NEEDLE.findall(sample.context)
        kinds = {kind for kind, _, _ in found}
        assert kinds == {"uuids" if value == UUID else "numbers"}
        assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for _, k, v in found)
        asked = [k for k in {k for _, k, _ in found} if k in sample.questions[0].ask]
        assert sorted(references(sample)) == sorted(v for _, k, v in found if k in asked)
        assert len(references(sample)) == answers
        if needles is None:  # the haystack itself is needles, one to a line, and no key stands twice
            assert len(found) == len(sample.context.split("\n")) - 1 == len({k for _, k, _ in found})
        else:
            assert len(found) == needles and len({k for _, k, _ in found}) == keys


def test_depths_are_forty_equal_steps() -> None:
    assert len(DEPTHS) == 40 and DEPTHS[:4] == (0, 3, 5, 8) and DEPTHS[-1] == 100
    assert {b - a for a, b in pairwise(DEPTHS)} == {2, 3}


def test_needles_in_essays_stand_at_the_forty_depths_evenly() -> None:
    sentences = [str(i) for i in range(200)]
    seen = Counter()
    for seed in range(400):
        text = among_sentences(random.Random(seed), sentences, ["a", "b"])
        assert [one for one in text if one.isdigit()] == sentences
        first, second = text.index("a"), text.index("b") - 1
        assert first < second
        seen.update([first, second])
    assert set(seen) <= {int(200 * depth / 100) for depth in DEPTHS}
    assert len(seen) == 40 and max(seen.values()) < 3 * min(seen.values())


def test_essays_begin_alike_and_repeat_when_too_short() -> None:
    source = essay_words()
    assert " ".join(essay(50)).split() == list(source[:50])
    assert " ".join(essay(2 * len(source) + 7)).split() == [*source, *source, *source[:7]]
    assert made("niah_single_2", 60_000).context.count("Fellow-Citizens of the Senate") == 3


@pytest.mark.parametrize("index", range(4))
def test_the_chain_of_variables_is_followed_by_hand(index: int) -> None:
    sample = made("ruler_vt", index=index)
    example, _, text = sample.context.rpartition("Memorize and track the chain(s)")
    for part, letters in ((example, 3), (text, 5)):
        lines = re.findall(r"^VAR .*$", part, re.MULTILINE)
        assert len(lines) == 5 and part.count(LINE) >= 5
        assert re.fullmatch(rf"VAR [A-Z]{{{letters}}} = \d{{5}}", lines[0])
        names = [re.fullmatch(rf"VAR ([A-Z]{{{letters}}}) = .*", line)[1] for line in lines]  # type: ignore[index]
        assert len(set(names)) == 5
        assert [line.split(" = ")[1] for line in lines[1:]] == [f"VAR {name}" for name in names[:-1]]
        value = lines[0].split()[-1]
        ask = f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        opening = (
            "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
            f"value {value}, they are:"
        )
        if letters == 3:
            assert part.endswith(f"{ask} {opening} {' '.join(names)}\n\n") and pieces(part) <= 560
        else:
            assert (sample.questions[0].ask, sample.questions[0].opening) == (ask, opening)
            assert references(sample) == tuple(names)


@pytest.mark.parametrize(
    ("length", "often", "seldom", "shown", "counts"), [(2048, 6, 1, 20, (3, 1)), (6000, 30, 3, 40, (10, 3))]
)
def test_common_words_stand_as_often_as_published(
    length: int, often: int, seldom: int, shown: int, counts: tuple[int, int]
) -> None:
    sample = made("ruler_cwe", length)
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    ask = "\nQuestion: What are the 10 most common words in the above list?"
    opening = " Answer: The top 10 words that appear most often in the list are: "
    _, example, text = sample.context.split(head)
    listed, _, answered = example.partition(ask + opening)
    first = Counter(re.findall(r"\d+\. (\S+)", listed))
    assert sorted(first.values()) == sorted([counts[0]] * 10 + [counts[1]] * (shown - 10))
    assert set(re.findall(r"\d+\. (\S+)", answered)) == {word for word, n in first.items() if n == counts[0]}
    found = Counter(re.findall(r"\d+\. (\S+)", text))
    assert {word for word, n in found.items() if n == often} == set(references(sample))
    assert len(references(sample)) == 10
    assert {n for word, n in found.items() if word not in references(sample)} == {seldom}
    assert [int(i) for i in re.findall(r"(\d+)\. ", text)] == list(range(1, sum(found.values()) + 1))
    assert (sample.questions[0].ask, " " + sample.questions[0].opening + " ") == (ask, opening)


def test_long_lists_of_words_go_on_after_the_texts_are_used_up() -> None:
    sample = made("ruler_cwe", 131_072)
    text = sample.context.rpartition("most often.\n")[2]
    counts = Counter(re.findall(r"\d+\. (\S+)", text))
    assert len(counts) > 4200 and sorted(set(counts.values())) == [3, 30]


@pytest.mark.parametrize("length", [1024, 5000])
def test_coded_words_follow_zetas_law(length: int) -> None:
    sample = made("ruler_fwe", length)
    head = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    assert sample.context.startswith(head)
    counts = Counter(sample.context.removeprefix(head).split())
    ranked = [word for word, _ in counts.most_common()]
    assert ranked[0] == "..." and set(ranked[1:4]) == set(references(sample))
    assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])
    assert len(ranked) <= (length - 50) // 50
    total = counts["..."] * 1.6449341
    for rank, (_, n) in enumerate(counts.most_common(), 1):
        assert abs(n - total / 1.6449341 / rank**2) <= 1 + 1 / rank
    assert counts[ranked[3]] > counts[ranked[4]]


@pytest.mark.parametrize("index", range(6))
def test_one_document_answers_and_the_other_countrys_misleads(index: int) -> None:
    sample = made("ruler_qa", index=index)
    label, country = re.findall(r'Question: What is given as "(.*)" for (\w+)\?$', sample.questions[0].ask)[0]
    documents = re.split(r"\n\nDocument \d+:\n", sample.context)[1:]
    fitting = [one for one in documents if one.startswith(f"{country}: ") and f"\n{label}: " in one]
    assert len(fitting) == 1 and fitting[0].endswith(f"\n{label}: {sample.questions[0].answer}")
    numbers = re.findall(r"\n\nDocument (\d+):\n", sample.context)
    assert numbers == [str(i) for i in range(1, len(documents) + 1)] and len(documents) > 10
    order = (
        "Answer the question based on the given documents. "
        "Only give me the answer and do not output any other words.\n\n"
    )
    assert sample.context.startswith(order + "The following are given documents.\n\nDocument 1:\n")
    assert sample.questions[0].ask.startswith("\n\n" + order)
    other = {"Kenya": "Switzerland", "Switzerland": "Kenya"}[country]
    if any((one[0], one[2]) == (other, label) for one in asked_facts()):
        assert any(one.startswith(f"{other}: ") and f"\n{label}: " in one for one in documents)


def test_a_long_context_asks_one_document_among_repeats() -> None:
    sample = made("ruler_qa", 60_000)
    documents = re.split(r"\n\nDocument \d+:\n", sample.context)[1:]
    times = Counter(documents)
    label, country = re.findall(r'given as "(.*)" for (\w+)\?$', sample.questions[0].ask)[0]
    assert max(times.values()) > 1
    assert [n for one, n in times.items() if one.startswith(f"{country}: ") and f"\n{label}: " in one] == [1]
