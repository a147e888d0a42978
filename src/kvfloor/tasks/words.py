"""Frequent words: a long list of words, three of which come up more often than the others; the first is asked."""

from __future__ import annotations

from .sample import Question, Sample
from .task import Request, Task

SHARES = (0.16, 0.11, 0.075)
SHORTEST = 24  # words below which three clear ranks do not fit
MARGIN = 0.6  # the fourth word comes up at most this often, relative to the third


def make(request: Request) -> Sample:
    """Three words at SHARES of the list, the others at counts that fall as 1/rank below the margin; shuffled."""
    rng, things = request.rng, request.lexicon.things
    if len(things) < 4:
        raise ValueError(f"words needs at least 4 different words, this lexicon has {len(things)}")
    room = request.length - request.count("")
    ask = "the most frequent of the words is"
    names = rng.sample(things, min(len(things), request.difficulty + 3))
    while True:
        if room < SHORTEST:
            raise ValueError(f"length={request.length}: words needs room for {SHORTEST} words")
        counts = [round(share * room) for share in SHARES]
        most = max(1, int(counts[2] * MARGIN))
        others = spread(room - sum(counts), len(names) - 3, most)
        text = [w for w, n in zip(names, counts + others, strict=True) for _ in range(n)]
        rng.shuffle(text)
        context = " ".join(text)
        tokens = request.count(context)
        if tokens <= request.length:
            return Sample(context, (Question(ask, names[0]),))
        # words of several tokens: as many fewer as the surplus says
        room -= max(1, (tokens - request.length) * len(text) // tokens)


def spread(total: int, kinds: int, most: int) -> list[int]:
    """`total` split over `kinds` words as 1/rank, none above `most`; what does not fit is left out."""
    weights = [1 / (rank + 1) for rank in range(kinds)]
    counts = [0] * kinds
    left = min(total, most * kinds)
    while left > 0:
        live = [i for i in range(kinds) if counts[i] < most]
        mass = sum(weights[i] for i in live)
        for i in live:
            more = min(most - counts[i], left, max(1, int(left * weights[i] / mass)))
            counts[i] += more
            left -= more
            if left == 0:
                break
    return counts


WORDS = Task(
    name="words",
    about="the most frequent word of a list, with two close rivals",
    unit="other words",
    lowest=1,
    highest=256,
    default=lambda length: max(16, min(120, length // 8)),
    make=make,
)
