"""Define the task "turns": answer three questions about one context, one after the other in one conversation.

Each question asks for another fact of the context, and the cache is compressed before the first question. So the cache
may have kept the fact for the first question, and lost those for the later ones.
"""

from __future__ import annotations

from itertools import islice

from .checks import Contains, Part
from .haystack import in_essay
from .ruler.keys import different, number
from .sample import Question, Sample
from .task import Request, Task

TURNS = 3
MOST = 16


def make(request: Request) -> Sample:
    """Return a sample: an essay with several facts among its sentences, and questions for three of them.

    The request has the random generator, the largest number of tokens, and the difficulty, which is the number of
    facts. Raises ValueError if the number of tokens is too small.
    """
    rng = request.rng
    keys = list(islice(different(rng, "words"), request.difficulty))
    codes = {key: number(rng) for key in keys}
    facts = [f"The locker of {key} has the number {code}." for key, code in codes.items()]
    questions = tuple(
        Question(
            ask=f"\n\nWhich number has the locker of {key}?",
            answer=codes[key],
            opening=f"The locker of {key} has the number",
            parts=(Part(f"turn {i}", Contains((codes[key],))),),
            most=MOST,
        )
        for i, key in enumerate(rng.sample(keys, TURNS), 1)
    )
    head = "Read the following text. Questions about it will follow.\n\n"
    return Sample(in_essay(request, head, facts, questions), questions, in_turn=True)


TURNS_TASK = Task(
    name="turns",
    about="three questions in turn about one context",
    unit="facts",
    lowest=TURNS,
    highest=32,
    default=lambda length: 6,
    make=make,
    chat=True,
)
