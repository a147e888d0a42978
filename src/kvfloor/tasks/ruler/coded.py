"""Define RULER's task fwe (frequent words): name the three most frequent coded words of a text.

A coded word is six random letters. The frequency of the word of rank k is in proportion to 1/k^2. Rank 1 is the noise
word "...", which the question says to ignore; ranks 2 to 4 are asked. The number of different words is about the
length in tokens divided by 50. Templates and parameters are those of https://github.com/NVIDIA/RULER.
"""

from __future__ import annotations

import math
import random
import string

from ..checks import Contains, Part
from ..fit import fill, reserved
from ..sample import Question, Sample
from ..task import Request, Task

MOST = 50
LETTERS = 6
NOISE_WORD = "..."
ASKED = 3
_LEAST = 64  # words: so many that the third asked word stands more often than the next
_ZETA_2 = math.pi**2 / 6


def make(request: Request) -> Sample:
    """Return a sample: the shuffled coded words, and the question for the three most frequent ones.

    The request has the random generator and the largest number of tokens. Raises ValueError if the number is too small.
    """
    rng = request.rng
    found: dict[str, None] = {NOISE_WORD: None}
    while len(found) < max(ASKED + 2, (request.length - MOST) // 50):
        found["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
    words = list(found)
    names = tuple(words[1 : 1 + ASKED])
    rest = rng.getrandbits(64)
    head = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )

    def build(total: int) -> str:
        text = [word for word, times in zip(words, counts(total, len(words)), strict=True) for _ in range(times)]
        random.Random(rest).shuffle(text)
        return head + " ".join(text)

    asked = Question(
        ask=(
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?"
        ),
        answer=" ".join(names),
        opening="Answer: According to the coded text above, the three most frequently appeared words are:",
        parts=(Part("references", Contains(names)),),
        most=MOST,
    )
    room = request.length - reserved((asked,), request.count)
    return Sample(fill(build, room, request.count, _LEAST, f"length={request.length}: fwe's words"), (asked,))


def counts(total: int, kinds: int) -> list[int]:
    """Return how often each of `kinds` words occurs in a text of about `total` words, the most frequent word first.

    The word of rank k = 1, 2, ... occurs total / (zeta(2) k^2) times, rounded down.
    """
    return [int(total / (_ZETA_2 * rank * rank)) for rank in range(1, kinds + 1)]


CODED_WORDS = Task(
    "ruler_fwe", "RULER: the three most frequent coded words of a text", "test", 1, 1, lambda length: 1, make, chat=True
)
