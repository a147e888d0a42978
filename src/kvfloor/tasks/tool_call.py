"""Define the task "tool_call": write a JSON call whose exact arguments stand far apart in a long text.

The tool is described at the start. The text tells of several deliveries, and the question names one of them. An
argument is right if it has the demanded value and JSON type.
"""

from __future__ import annotations

import json

from .checks import JsonField, Part
from .haystack import in_essay
from .lexicon import PEOPLE
from .sample import Question, Sample
from .task import Request, Task

TOOL = "book_delivery"
MOST = 128  # tokens; the right call has about 60

_HEAD = (
    "You can call one tool. It is described by this JSON object:\n"
    '{"name": "book_delivery", "parameters": {"order_number": "integer", "street": "string", "crates": "integer", '
    '"goods": "string", "express": "boolean"}}\n\n'
    "Read the following text, in which several deliveries are mentioned.\n\n"
)


def make(request: Request) -> Sample:
    """Return a sample: the tool's description, a text with facts on several deliveries, and the request for a call.

    The request has the random generator, the largest number of tokens, and the difficulty, which is the number of
    deliveries. Raises ValueError if the number of tokens is too small.
    """
    rng = request.rng
    people = rng.sample(PEOPLE, request.difficulty)
    goods = rng.sample(request.lexicon.things, request.difficulty)
    wanted: dict[str, dict] = {}
    facts = []
    for person, thing in zip(people, goods, strict=True):
        road = f"{rng.randint(1, 99)} {rng.choice(request.lexicon.things).capitalize()} Road"
        call = {
            "order_number": rng.randint(10**6, 10**7 - 1),
            "street": road,
            "crates": rng.randint(2, 99),
            "goods": thing,
            "express": rng.random() < 0.5,
        }
        wanted[person] = call
        facts += [
            f"The delivery for the {person} has the order number {call['order_number']}.",
            f"The delivery for the {person} goes to the street {road}.",
            f"The delivery for the {person} consists of {call['crates']} crates of the goods called {thing}.",
            f"The delivery for the {person} {'is' if call['express'] else 'is not'} an express delivery.",
        ]
    rng.shuffle(facts)
    answer = json.dumps({"name": TOOL, "arguments": wanted[people[0]]})
    question = Question(
        ask=(
            f"\n\nCall the tool to book the delivery for the {people[0]}. Take all arguments from the text. "
            'Answer with one JSON object of the form {"name": ..., "arguments": {...}} and nothing else.'
        ),
        answer=answer,
        parts=(
            Part("call", JsonField(("name",), json.dumps(TOOL))),
            *(
                Part(name, JsonField(("arguments", name), json.dumps(value)))
                for name, value in wanted[people[0]].items()
            ),
        ),
        most=MOST,
    )
    return Sample(in_essay(request, _HEAD, facts, (question,)), (question,))


TOOL_CALL = Task(
    name="tool_call",
    about="a JSON call whose five exact arguments stand far apart in a long text",
    unit="deliveries",
    lowest=1,
    highest=10,
    default=lambda length: 3,
    make=make,
    chat=True,
)
