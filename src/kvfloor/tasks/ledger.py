"""Define the task "ledger": answer questions about a state that a long stream of text goes on to change.

The context says what some boxes hold. After it, further text with changes streams in, in four stretches. After each
stretch comes a question what a box holds now. The questions alternate between a box that never changed and one that has
just changed. The four stretches make up half of the whole text.
"""

from __future__ import annotations

import random
from itertools import pairwise

from .checks import Matches, Part
from .fit import fitting, reserved
from .haystack import among_sentences
from .passages import essay
from .sample import Question, Sample
from .task import Request, Task

STRETCHES = 4
CHANGES = 3  # per stretch
MOST = 12
_LEAST = 200  # words of essay
HEAD = "Read the following text, and keep in mind what each box holds.\n\n"


def make(request: Request) -> Sample:
    """Return a sample: an essay that says what each box holds, then four turns, each of further text and a question.

    The text of each turn continues the essay; three of its sentences change what a box holds. The request has the
    random generator, the largest number of tokens, and the difficulty, which is the number of boxes. Raises ValueError
    if the number of tokens is too small.
    """
    rng = request.rng
    boxes = [f"the {trait} box" for trait in rng.sample(request.lexicon.traits, request.difficulty)]
    things = iter(rng.sample(request.lexicon.things, request.difficulty + STRETCHES * CHANGES))
    rest, moving = boxes[: STRETCHES // 2], boxes[STRETCHES // 2 :]
    state = {box: next(things) for box in boxes}
    stories = [[f"{box.capitalize()} holds the {thing}." for box, thing in state.items()]]
    asked: list[tuple[str, str, str]] = []
    for i in range(STRETCHES):
        changed = [rng.choice(moving) for _ in range(CHANGES)]
        lines = []
        for box in changed:
            state[box] = next(things)
            lines.append(f"Now {box} holds the {state[box]}.")
        stories.append(lines)
        box = rest[i // 2] if i % 2 == 0 else rng.choice(changed)
        asked.append((f"{'kept' if i % 2 == 0 else 'changed'} {i // 2 + 1}", box, state[box]))
    seed = rng.getrandbits(64)
    leads = tuple(question("", *one) for one in asked)

    def stretches(words: int) -> list[str]:
        again, sentences = random.Random(seed), essay(words)
        half, size = len(sentences) // 2, len(sentences) // 2 // STRETCHES
        cuts = [0, *(half + size * i for i in range(STRETCHES)), len(sentences)]
        return [
            " ".join(among_sentences(again, sentences[start:stop], lines))
            for (start, stop), lines in zip(pairwise(cuts), stories, strict=True)
        ]

    room = request.length - reserved(leads, request.count)
    words = fitting(
        lambda n: HEAD + "\n\n".join(stretches(n)), room, request.count, _LEAST, f"length={request.length}: the changes"
    )
    first, *later = stretches(words)
    questions = tuple(question(text, *one) for text, one in zip(later, asked, strict=True))
    return Sample(HEAD + first, questions, in_turn=True)


def question(text: str, name: str, box: str, thing: str) -> Question:
    """Return one turn of the conversation: the next stretch of text, then the question what a box holds now.

    text   the stretch of text
    name   name of this answer in reports, such as "kept 1" or "changed 2"
    box    the asked box, such as "the red box"
    thing  the right answer
    """
    return Question(
        ask=f"\n\n{text}\n\nWhat does {box} hold now?",
        answer=thing,
        opening=f"Now {box} holds the",
        parts=(Part(name, Matches(rf"^\W*{thing}\b")),),
        most=MOST,
    )


LEDGER = Task(
    name="ledger",
    about="a state asked for between stretches of a stream that changes it",
    unit="boxes",
    lowest=STRETCHES,
    highest=16,
    default=lambda length: 6,
    make=make,
    chat=True,
)
