"""Define a sample, which is one context with questions about it, and the rule that scores an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """Hold a question about a context, and its only right answer.

    ask     text to append to the context after one space
    answer  text that the model should generate
    """

    ask: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """Hold a context, and at least one question about it. The answers follow from the context alone."""

    context: str
    questions: tuple[Question, ...]

    def prompt(self, which: int = 0) -> str:
        """Return the context and its question number `which`, joined by a space: a prompt for greedy decoding."""
        return f"{self.context} {self.questions[which].ask}"


def score(answer: str, generated: str) -> bool:
    """Return True if the generated text equals the answer, word for word.

    White space at the ends is ignored, and a run of white space counts as one space.
    """
    return answer.split() == generated.split()
