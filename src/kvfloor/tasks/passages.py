"""Read the public-domain texts that the package ships: a speech, a novel, and facts of the World Factbook.

Tasks hide their own sentences in the speech and the novel, and take single words and facts from the texts.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"“(])")
_WORD = re.compile(r"(?<![\w'’-])[a-z]{4,}(?![\w'’-])")
_TITLE = re.compile(r"[A-Z][A-Za-z -]*")
MOST_FACT = 300  # characters; longer facts are left out
MOST_ANSWER = 40  # characters of a fact that is short enough to ask for


@lru_cache(maxsize=4)
def shipped(name: str) -> str:
    """Return the shipped text called `name`: "speech", "novel" or "facts"."""
    return files("kvfloor.tasks").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def essay_words() -> tuple[str, ...]:
    """Return the words of the speech and the novel, in order, split at white space."""
    return tuple(f"{shipped('speech')} {shipped('novel')}".split())


def essay(words: int) -> list[str]:
    """Return the first `words` words of the speech and the novel, split into sentences; the last may be cut short.

    After their end the two texts repeat.
    """
    source = essay_words()
    text = " ".join((source * (words // len(source) + 1))[:words])
    return _SENTENCE_END.split(text) if text else []


@lru_cache(maxsize=1)
def plain_words() -> tuple[str, ...]:
    """Return the different lower-case words of at least four letters in the texts, sorted."""
    return tuple(sorted({word for name in ("speech", "novel", "facts") for word in _WORD.findall(shipped(name))}))


@lru_cache(maxsize=1)
def facts() -> tuple[tuple[str, str, str, str], ...]:
    """Return the facts as tuples (country, section, label, fact).

    An example is ("Switzerland", "Geography", "Climate", "temperate, but varies with altitude; ..."). Facts of more
    than 300 characters are left out.
    """
    found, country, section = [], "", ""
    for block in shipped("facts").split("\n\n"):
        lines = [line for line in block.split("\n") if line.strip()]
        for i, line in enumerate(lines):
            if _TITLE.fullmatch(line):
                country, section = (line, "") if len(lines) == 1 else (country, line if i == 0 else section)
            elif ": " in line:
                label, _, fact = line.partition(": ")
                found.append((country, section, label, fact))
    return tuple(one for one in found if len(one[3]) <= MOST_FACT)


@lru_cache(maxsize=1)
def asked_facts() -> tuple[tuple[str, str, str, str], ...]:
    """Return the facts that a question can ask for, as tuples (country, section, label, fact).

    These are the facts of at most 40 characters without parentheses that are the only ones with their country and
    label.
    """
    names = [(country, label) for country, _, label, _ in facts()]
    return tuple(
        one
        for one in facts()
        if len(one[3]) <= MOST_ANSWER and names.count((one[0], one[2])) == 1 and "(" not in one[3]
    )
