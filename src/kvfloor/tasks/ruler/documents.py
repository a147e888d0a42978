"""Define RULER's task qa (question answering): answer a question from one of many numbered documents.

The template is that of https://github.com/NVIDIA/RULER. RULER's questions are from SQuAD and HotpotQA. Here they ask
for facts on two countries from the World Factbook, and each document has one fact. The other documents are distractors;
one of them is the other country's fact with the same label. If there are too few distractors for a context, they
repeat.
"""

from __future__ import annotations

import random

from ..checks import Contains, Part
from ..fit import fill, reserved
from ..passages import asked_facts, facts
from ..sample import Question, Sample
from ..task import Request, Task

MOST = 32
_ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)


def make(request: Request) -> Sample:
    """Return a sample: the documents in random order, and the question that one of them answers.

    The request has the random generator and the largest number of tokens. Raises ValueError if the number is too small.
    """
    rng = request.rng
    asked = rng.choice(asked_facts())
    country, _, label, fact = asked
    others = [one for one in facts() if one != asked]
    rng.shuffle(others)
    others.sort(key=lambda one: one[2] != label)  # the other country's fact first
    rest = rng.getrandbits(64)

    def build(distractors: int) -> str:
        chosen = (others * (distractors // len(others) + 1))[:distractors]
        documents = [document(one) for one in (asked, *chosen)]
        random.Random(rest).shuffle(documents)
        numbered = (f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        return f"{_ORDER}The following are given documents.\n\n" + "\n\n".join(numbered)

    question = Question(
        ask=f'\n\n{_ORDER}Question: What is given as "{label}" for {country}?',
        answer=fact,
        opening="Answer:",
        parts=(Part("answer", Contains((fact,))),),
        most=MOST,
    )
    room = request.length - reserved((question,), request.count)
    return Sample(fill(build, room, request.count, 1, f"length={request.length}: qa's documents"), (question,))


def document(fact: tuple[str, str, str, str]) -> str:
    """Return the document of one fact (country, section, label, text): "country: section", and below "label: text"."""
    country, section, label, text = fact
    return f"{country}: {section}\n{label}: {text}"


DOCUMENTS = Task(
    "ruler_qa", "RULER: a question that one of many documents answers", "test", 1, 1, lambda length: 1, make, chat=True
)
