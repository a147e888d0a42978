"""Define the task "instructions": follow four instructions that were given before a long text.

Each instruction is checked by itself, so a report shows which of them are still followed after compression.
"""

from __future__ import annotations

from .checks import Lines, Matches, Part
from .haystack import in_essay
from .sample import Question, Sample
from .task import Request, Task

MOST = 96


def make(request: Request) -> Sample:
    """Return a sample: four instructions for an answer, then an essay, and a question whose answer must follow them.

    The request has the random generator and the largest number of tokens. Raises ValueError if the number is too small.
    """
    rng = request.rng
    first, last, named = rng.sample(request.lexicon.things, 3)
    number, lines = rng.randint(1000, 9999), rng.randint(3, 5)
    rules = (
        f"The first word of the answer is {first}.",
        f"The last word of the answer is {last}.",
        f"The answer mentions the number {number}.",
        f"The answer has exactly {lines} lines.",
    )
    numbered = "\n".join(f"{i}. {rule}" for i, rule in enumerate(rules, 1))
    head = f"There are four rules for your answer:\n{numbered}\n\nRead the following text.\n\n"
    question = Question(
        ask="\n\nWhat is this text about? Answer briefly, and follow all four rules.",
        answer="\n".join([f"{first} {number}", *[named] * (lines - 2), last]),
        parts=(
            Part("first word", Matches(rf"^\W*{first}\b")),
            Part("last word", Matches(rf"\b{last}\W*$")),
            Part("number", Matches(rf"(?<!\d){number}(?!\d)")),
            Part("lines", Lines(lines)),
        ),
        most=MOST,
    )
    return Sample(in_essay(request, head, [], (question,)), (question,))


INSTRUCTIONS = Task(
    name="instructions",
    about="four instructions given before a long text, each checked by itself",
    unit="instructions",
    lowest=4,
    highest=4,
    default=lambda length: 4,
    make=make,
    chat=True,
)
