"""Define a sample, which is one context with questions about it, and the rule that scores an answer."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import Form, Part, SameWords


@dataclass(frozen=True)
class Question:
    """Hold a question about a context, with a right answer and the checks that score a generated one.

    ask      text to append to the context, after one space unless it begins with white space
    answer   a right answer, without `opening`
    opening  words that are appended to the question, for the generated answer to continue, such as "The key is"
    parts    named checks of the generated text; without any, it must equal `answer` word for word
    most     largest number of tokens to generate; None: a few more than `answer` has
    """

    ask: str
    answer: str
    opening: str = ""
    parts: tuple[Part, ...] = ()
    most: int | None = None

    @property
    def scored_parts(self) -> tuple[Part, ...]:
        """Return the checks by which an answer is scored: `parts`, or if there are none, one that demands `answer`."""
        return self.parts or (Part("answer", SameWords(self.answer)),)

    @property
    def lead(self) -> str:
        """Return the text between the context and the generated answer: the question and the answer's opening."""
        return apart(self.ask) + apart(self.opening)

    def shares(self, said: str, form: Form) -> dict[str, float]:
        """Return {name of part: share of its demands that the generated text `said` meets, from 0 to 1}.

        form: returns a text as the model's tokenizer would encode and decode it. The right words are put into this form
        before they are compared with `said`.
        """
        return {part.name: part.check.share(said, form) for part in self.scored_parts}


@dataclass(frozen=True)
class Sample:
    """Hold a context, and at least one question about it.

    in_turn  True if the questions are asked one after the other in one conversation, and may contain further text, from
             which answers follow too; False if each is asked in a conversation of its own and its answer follows from
             the context alone
    """

    context: str
    questions: tuple[Question, ...]
    in_turn: bool = False

    @property
    def turns(self) -> tuple[Question, ...]:
        """Return the questions of one conversation: all of them if `in_turn` is True, else the first alone."""
        return self.questions if self.in_turn else self.questions[:1]

    def prompt(self, which: int = 0) -> str:
        """Return the context with its question number `which` (from 0) appended, as a prompt for greedy decoding."""
        return self.context + self.questions[which].lead


def apart(text: str) -> str:
    """Return `text` with a space before it, so that it can follow another text.

    A text that is empty or begins with white space is returned unchanged.
    """
    return text if not text or text[0].isspace() else f" {text}"


def score(answer: str, generated: str) -> bool:
    """Return True if the generated text equals the answer, word for word.

    White space at the ends is ignored, and a run of white space counts as one space.
    """
    return answer.split() == generated.split()
