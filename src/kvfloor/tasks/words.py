"""Define the task "words": name the most frequent word of a long shuffled list with Zipf-distributed counts."""

from __future__ import annotations

from .sample import Question, Sample
from .task import Request, Task

SHORTEST = 16  # words below which the first two ranks can come up equally often


def make(request: Request) -> Sample:
    """Return a sample: a shuffled list of words, and the question for the most frequent one.

    The request has the random generator, the largest number of tokens, the lexicon, and the difficulty, which is the
    number of different words besides the most frequent one. Frequencies fall as 1/rank, so the most frequent word is
    about twice as frequent as the next one. Raises ValueError if the number of tokens or the lexicon is too small.
    """
    rng, things = request.rng, request.lexicon.things
    if len(things) < 2:
        raise ValueError(f"words needs at least 2 different words, this lexicon has {len(things)}")
    room = request.length - request.count("")
    names = rng.sample(things, min(len(things), request.difficulty + 1))
    while True:
        if room < SHORTEST:
            raise ValueError(f"length={request.length}: words needs room for {SHORTEST} words")
        text = [name for name, count in zip(names, zipf(room, len(names)), strict=True) for _ in range(count)]
        rng.shuffle(text)
        context = " ".join(text)
        tokens = request.count(context)
        if tokens <= request.length:
            return Sample(context, (Question("the most frequent of the words is", names[0]),))
        # words of several tokens: as many fewer as the surplus says
        room -= max(1, (tokens - request.length) * len(text) // tokens)


def zipf(total: int, kinds: int) -> list[int]:
    """Return how often each of `kinds` words occurs in a list of `total` words: counts that fall as 1/rank.

    The most frequent word is first. The counts are rounded so that they sum to `total` (method of largest remainders);
    the last ones may be 0.
    """
    mass = sum(1 / rank for rank in range(1, kinds + 1))
    shares = [total / (mass * rank) for rank in range(1, kinds + 1)]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(kinds), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


WORDS = Task(
    name="words",
    about="the most frequent word of a list whose counts follow Zipf's law",
    unit="other words",
    lowest=1,
    highest=256,
    default=lambda length: max(16, min(120, length // 8)),
    make=make,
)
