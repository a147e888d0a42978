"""Read the public-domain texts of the package as haystacks: words, sentences and facts."""

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
    """Return the text `name` of the package: "speech", "novel" or "facts"."""
    return files("kvfloor.tasks").joinpath("texts", f"{name}.txt").read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def essay_words() -> tuple[str, ...]:
    """Return the words of the speech and the novel, in order, split at white space."""
    return tuple(f"{shipped('speech')} {shipped('novel')}".split())


def essay(words: int) -> list[str]:
    """Return the sentences of the first `words` words of the essays, which repeat when they are too short."""
    source = essay_words()
    text = " ".join((source * (words // len(source) + 1))[:words])
    return _SENTENCE_END.split(text) if text else []


@lru_cache(maxsize=1)
def plain_words() -> tuple[str, ...]:
    """Return the different lower-case words of at least four letters in the texts, sorted."""
    return tuple(sorted({word for name in ("speech", "novel", "facts") for word in _WORD.findall(shipped(name))}))


@lru_cache(maxsize=1)
def facts() -> tuple[tuple[str, str, str, str], ...]:
    """Return the facts as (country, section, label, fact), without the longest.

    A country's name stands alone between empty lines, or first in the file; a section's name is above its facts.
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
    """Return the facts that can be asked for: short ones whose country and label name no other fact."""
    names = [(country, label) for country, _, label, _ in facts()]
    return tuple(
        one
        for one in facts()
        if len(one[3]) <= MOST_ANSWER and names.count((one[0], one[2])) == 1 and "(" not in one[3]
    )
