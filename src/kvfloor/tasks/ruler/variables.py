"""Define RULER's task vt (variable tracking): name all variables that get a given value by a chain of assignments.

A chain is five assignments "VAR ABCDE = 12345", "VAR FGHIJ = VAR ABCDE", ..., hidden between repeats of a paragraph
(noise lines). A worked example with names of three letters and its answer comes first. Templates and parameters are
those of https://github.com/NVIDIA/RULER. In arguments, `rng` is the sample's random generator.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from ..checks import Contains, Part
from ..fit import fill, reserved
from ..haystack import between_lines
from ..sample import Question, Sample
from ..task import Request, Task
from .niah import NOISE

HOPS = 4
MOST = 30
EXAMPLE_TOKENS = 500
_LEAST = 5  # lines: as many as the chain has assignments


def make(request: Request) -> Sample:
    """Return a sample: the worked example, then noise lines with the chain's assignments in order, and the question.

    The request has the random generator and the largest number of tokens. Raises ValueError if the number is too small.
    """
    rng, count = request.rng, request.count
    shown, shown_names, shown_value = chain(rng, 3)
    room = min(EXAMPLE_TOKENS, request.length // 2)
    example = fill(lined(rng, shown), room, count, _LEAST, f"length={request.length}: vt's example")
    first = question(shown_names, shown_value)
    worked = f"{example}{first.lead} {first.answer}\n\n"
    assignments, names, value = chain(rng, 5)
    asked = question(names, value)
    text = lined(rng, assignments)
    left = request.length - reserved((asked,), count)
    context = fill(lambda n: worked + text(n), left, count, _LEAST, f"length={request.length}: vt's lines")
    return Sample(context, (asked,))


def chain(rng: random.Random, letters: int) -> tuple[list[str], list[str], str]:
    """Draw a chain and return (assignments in order, the five variables' names, the value of five digits).

    letters: number of letters in a name. The names are different.
    """
    found: dict[str, None] = {}
    while len(found) <= HOPS:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    names, value = list(found), str(rng.randint(10**4, 10**5 - 1))
    sources = [value, *(f"VAR {name}" for name in names[:-1])]
    return [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=True)], names, value


def lined(rng: random.Random, assignments: list[str]) -> Callable[[int], str]:
    """Return a function that takes a number n and returns a text of n noise lines with the assignments between them.

    The text begins with the task's instruction. The assignments keep their order; their random places are the same in
    every call with the same n.
    """
    rest = rng.getrandbits(64)
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    return lambda n: head + "\n".join(between_lines(random.Random(rest), [NOISE] * n, assignments))


def question(names: list[str], value: str) -> Question:
    """Return the question for all variables that have the value `value`; the right answer is `names`."""
    return Question(
        ask=f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        answer=" ".join(names),
        opening=(
            f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
            f"assigned the value {value}, they are:"
        ),
        parts=(Part("references", Contains(tuple(names))),),
        most=MOST,
    )


VARIABLES = Task(
    "ruler_vt", "RULER: all names in a chain of assignments", "test", 1, 1, lambda length: 1, make, chat=True
)
