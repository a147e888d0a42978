"""Place a task's facts among filler sentences, in a context of the requested length.

In arguments, `rng` is the sample's random generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .filler import sentence
from .sample import Question

Count = Callable[[str], int]

GIVE_UP = 8  # sentences in a row that did not fit before the rest of the room is left empty


@dataclass(frozen=True)
class Plot:
    """Hold a task's facts and questions before the facts are placed in a context.

    threads    lists of sentences with facts; the sentences of one list (a thread) keep their order in the context,
               those of different threads mix freely
    questions  pairs (question, index of the thread that answers it)
    """

    threads: Sequence[Sequence[str]]
    questions: Sequence[tuple[Question, int]]


def weave(
    rng: random.Random, threads: Sequence[Sequence[str]], length: int, count: Count, pinned: dict[int, float]
) -> str:
    """Return a context of nearly `length` tokens, never more: all facts at random places among filler sentences.

    threads  lists of sentences with facts; the sentences of one list (a thread) keep their order
    count    returns the number of tokens of a text
    pinned   {i: depth} puts the first sentence of thread i at that share of the context (0 first, 1 last); the rest of
             the thread follows at random places after it
    Raises ValueError if the facts alone are longer than `length`.
    """
    facts: list[tuple[float, str]] = []
    for i, thread in enumerate(threads):
        first = pinned.get(i)
        places = sorted(rng.random() for _ in thread)
        if first is not None:
            places = [first] + [first + (1 - first) * p for p in places[1:]]
        facts += list(zip(places, thread, strict=True))
    facts.sort(key=lambda fact: fact[0])
    empty = count("")
    sizes = [count(text) - empty for _, text in facts]
    filler = fill(rng, length - empty - sum(sizes), count, empty)
    while True:
        text = interleave(facts, sizes, filler)
        surplus = count(text) - length
        if surplus <= 0:
            return text
        if not filler:
            raise ValueError(
                f"the facts alone take {length + surplus} tokens, but length={length}: "
                "ask for a longer context or a smaller difficulty"
            )
        # a tokenizer whose counts do not add up exactly: give back a little filler and look again
        while filler and surplus > 0:
            surplus -= filler.pop()[1]


def fill(rng: random.Random, room: int, count: Count, empty: int) -> list[tuple[str, int]]:
    """Draw filler sentences of nearly `room` tokens in all, never more; return (sentence, its number of tokens) pairs.

    count  returns the number of tokens of a text, with special tokens such as BOS
    empty  number of tokens that `count` returns for an empty text, subtracted from each sentence's count
    """
    chosen: list[tuple[str, int]] = []
    misses = 0
    while room > 0 and misses < GIVE_UP:
        text = sentence(rng)
        size = count(text) - empty
        if size <= room:
            chosen.append((text, size))
            room -= size
            misses = 0
        else:
            misses += 1
    return chosen


def interleave(facts: list[tuple[float, str]], sizes: list[int], filler: list[tuple[str, int]]) -> str:
    """Return facts and filler as one text, each fact as near to its place as whole filler sentences allow.

    facts   (place, sentence), sorted by place; a place is the share of the text's tokens before the fact, 0 to 1
    sizes   number of tokens of each fact
    filler  (sentence, number of tokens)
    """
    total = sum(sizes) + sum(size for _, size in filler)
    ahead = list(accumulate(sizes, initial=0))
    out: list[str] = []
    done = next_fact = 0
    for text, size in filler:
        # the share counts the facts themselves, so that a pinned depth is a depth in the finished context
        while next_fact < len(facts) and facts[next_fact][0] * total <= done + ahead[next_fact] + size / 2:
            out.append(facts[next_fact][1])
            next_fact += 1
        out.append(text)
        done += size
    out += [text for _, text in facts[next_fact:]]
    return " ".join(out)
