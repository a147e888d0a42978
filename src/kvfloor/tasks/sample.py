"""Define the sample of a task: one context, the questions about it, and the rule that scores an answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """Hold a question and its answer.

    ask     comes after the context, joined by one space
    answer  the only text that is right
    """

    ask: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """Hold a context and at least one question whose answer follows from the context alone."""

    context: str
    questions: tuple[Question, ...]

    def prompt(self, which: int = 0) -> str:
        """Return context and question `which`, ready for greedy decoding."""
        return f"{self.context} {self.questions[which].ask}"


def score(answer: str, generated: str) -> bool:
    """Score an answer by exact match, after runs of white space are made one space and the ends are stripped."""
    return answer.split() == generated.split()
