"""Define RULER's eight needle tasks (niah): recall facts (needles) that are hidden in a longer text (the haystack).

A needle is the sentence "One of the special magic numbers for KEY is: VALUE.". The haystack is a repeated paragraph
("noise"), the text of essays ("essay"), or further needles ("needle"). In an essay, each needle stands at a depth of
its own, drawn at random from 40 equally spaced ones from 0 to 100 %; in the other haystacks, between random lines. The
parameters are those of https://github.com/NVIDIA/RULER, `scripts/synthetic.yaml`. Two things differ: the essays are the
public-domain texts of this package, and no key is drawn twice, so that a question has one answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice

from ..checks import Contains, Part
from ..fit import fill, reserved
from ..haystack import among_sentences, between_lines
from ..passages import essay
from ..sample import Question, Sample
from ..task import Request, Task
from .keys import KINDS, different

MOST = 128
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_LEAST = {"noise": 8, "essay": 40, "needle": 8}


@dataclass(frozen=True)
class Needles:
    """Make the samples of one needle task: called with a `Request` (the settings of a sample), return the `Sample`.

    haystack      "noise", "essay" or "needle"
    key, value    kinds of keys and values: "words", "numbers" or "uuids"
    keys          number of keys that have needles; raised to `asked` if smaller. The haystack "needle" consists of
                  further needles, with other keys
    values        number of needles per key, each with a value of its own
    asked         number of keys whose values the question asks for
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, request: Request) -> Sample:
        rng = request.rng
        fresh = different(rng, self.key)
        keys = list(islice(fresh, max(self.keys, self.asked)))
        values = {key: [KINDS[self.value](rng) for _ in range(self.values)] for key in keys}
        needles = [NEEDLE.format(kind=self.value, key=key, value=one) for key in keys for one in values[key]]
        rng.shuffle(needles)
        asked = rng.sample(keys, self.asked)
        question, head = self._question(asked, tuple(one for key in asked for one in values[key]))
        rest = rng.getrandbits(64)

        def build(units: int) -> str:
            again = random.Random(rest)
            if self.haystack == "essay":
                return head + " ".join(among_sentences(again, essay(units), needles))
            lines = [NOISE] * units
            if self.haystack == "needle":
                others = different(again, self.key)
                free = (key for key in others if key not in values)
                lines = [
                    NEEDLE.format(kind=self.value, key=key, value=KINDS[self.value](again))
                    for key in islice(free, units)
                ]
            return head + "\n".join(between_lines(again, lines, needles))

        room = request.length - reserved((question,), request.count)
        context = fill(build, room, request.count, _LEAST[self.haystack], f"length={request.length}: needles")
        return Sample(context, (question,))

    def _question(self, asked: list[str], answers: tuple[str, ...]) -> tuple[Question, str]:
        """Return (question, introduction), the introduction being the text before the haystack.

        The question asks for the values of the keys `asked`, which are `answers`.
        """
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        one = len(answers) == 1
        kind = self.value[:-1] if one else self.value
        hidden = f"A special magic {kind} is" if one else f"Some special magic {kind} are"
        head = (
            f"{hidden} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n"
        )
        verb = "is" if one else "are"
        asks = "What is" if one else "What are all"
        return Question(
            ask=f"\n{asks} the special magic {kind} for {query} mentioned in the provided text?",
            answer=", ".join(answers),
            opening=f"The special magic {kind} for {query} mentioned in the provided text {verb}",
            parts=(Part("references", Contains(answers)),),
            most=MOST,
        ), head


def niah(name: str, about: str, make: Needles) -> Task:
    """Return the `Task` of one of RULER's needle tests, called `name`, whose samples `make` makes.

    about: one line that describes the task in lists of tasks.
    """
    return Task(name, about, "test", 1, 1, lambda length: 1, make, chat=True)


NEEDLES = (
    niah("niah_single_1", "RULER: a number among repeats of one paragraph", Needles("noise")),
    niah("niah_single_2", "RULER: a number in essays", Needles("essay")),
    niah("niah_single_3", "RULER: a UUID in essays", Needles("essay", value="uuids")),
    niah("niah_multikey_1", "RULER: four keys in essays, one asked", Needles("essay", keys=4)),
    niah("niah_multikey_2", "RULER: a context full of keys, one asked", Needles("needle")),
    niah(
        "niah_multikey_3",
        "RULER: a context full of UUIDs as keys and values, one asked",
        Needles("needle", key="uuids", value="uuids"),
    ),
    niah("niah_multivalue", "RULER: one key with four values in essays, all asked", Needles("essay", values=4)),
    niah("niah_multiquery", "RULER: four keys in essays, all asked", Needles("essay", asked=4)),
)
