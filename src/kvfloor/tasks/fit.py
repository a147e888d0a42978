"""Find how many units of haystack (words, sentences, documents) fit into a number of tokens.

A haystack is text in which a task's facts are hidden. In this file `count` returns the number of tokens of a text,
special tokens such as BOS included.
"""

from __future__ import annotations

from collections.abc import Callable

from .sample import Question
from .weave import Count

FIRST = 32  # units of the first trial
TRIES = 24
SLACK = 0.003  # share of the room that may stay empty, so that a long text is counted a few times only


def reserved(questions: tuple[Question, ...], count: Count) -> int:
    """Return the number of tokens that must stay free after the context, for the questions and the generated answers.

    All are asked in one conversation. A question counts with its answer's opening (first words that the model is
    given), an answer with the largest number of tokens to generate (`Question.most`).
    """
    empty = count("")
    return sum(count(one.lead) - empty + (one.most or 0) for one in questions) + empty * (len(questions) - 1)


def fill(build: Callable[[int], str], length: int, count: Count, least: int, what: str) -> str:
    """Return nearly the longest of the texts `build(n)` that has at most `length` tokens.

    build  returns a text with n units of haystack, for any n >= `least`; its tokens grow about in proportion to n
    count  returns the number of tokens of a text
    what   first words of the error, such as "length=100: the facts"
    Raises ValueError if not even the text with `least` units fits.
    """
    return build(fitting(build, length, count, least, what))


def fitting(build: Callable[[int], str], length: int, count: Count, least: int, what: str) -> int:
    """Return nearly the largest n for which the text `build(n)` has at most `length` tokens.

    build  returns a text with n units of haystack, for any n >= `least`; its tokens grow about in proportion to n
    count  returns the number of tokens of a text
    what   first words of the error, such as "length=100: the facts"
    Raises ValueError if not even the text with `least` units fits.
    """
    low, tokens = least, count(build(least))
    if tokens > length:
        raise ValueError(f"{what} need at least {tokens - length} tokens more than this length has: give a longer one")
    high: int | None = None
    n = max(FIRST, 2 * least)
    for i in range(TRIES):
        if high is not None and high - low <= 1:
            break
        found = count(build(n))
        rate = (found - tokens) / (n - low)
        if found <= length:
            low, tokens = n, found
        else:
            high = n
        if rate <= 0:
            rate = max(1.0, tokens / low)
        if found <= length and length - tokens < max(rate, SLACK * length):
            break
        n = low + max(1, int((length - tokens) / rate))
        if high is not None:  # every third time in the middle, as tokens may grow unevenly
            n = (low + high) // 2 if i % 3 == 2 else min(n, high - 1)
    return low
