"""Check a generated answer: each check returns the share of its demands that the answer meets, from 0 to 1.

A part is a check with a name. A question has one part or more, and an answer is right if each part's check returns 1.
In the methods `share`, `said` is the generated text, and `form` returns a text as the model's tokenizer would encode
and decode it. The right words are put into this form before they are compared, because a tokenizer may change letters
and spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Form = Callable[[str], str]
"""Function from a text to the text that the tokenizer makes of it when it encodes and decodes it."""


class AnswerCheck(Protocol):
    """Define the interface of a check: the method `share`, which scores a generated answer."""

    def share(self, said: str, form: Form) -> float:
        """Return the share of the check's demands that the generated text `said` meets, from 0 to 1."""
        ...


@dataclass(frozen=True)
class Part:
    """Hold a check and the name that a report lists it by, such as "first word"."""

    name: str
    check: AnswerCheck


@dataclass(frozen=True)
class SameWords:
    """Demand that the answer equals `words` word for word; white space around and between words is not compared."""

    words: str

    def share(self, said: str, form: Form) -> float:
        wanted = form(self.words).split()
        return float(bool(wanted) and said.split() == wanted)


@dataclass(frozen=True)
class BeginsWith:
    """Demand that the first words of the answer are `words`, whatever follows them."""

    words: str

    def share(self, said: str, form: Form) -> float:
        wanted = form(self.words).split()
        return float(bool(wanted) and said.split()[: len(wanted)] == wanted)


@dataclass(frozen=True)
class Contains:
    """Demand that the answer contains each of the texts `references`, ignoring case, as the benchmark RULER does.

    The share is the number of references found, divided by `enough` and at most 1. If `enough` is None, all are
    demanded.
    """

    references: tuple[str, ...]
    enough: int | None = None

    def share(self, said: str, form: Form) -> float:
        text = said.lower()
        wanted = [form(reference).strip().lower() for reference in self.references]
        found = sum(bool(reference) and reference in text for reference in wanted)
        return min(1.0, found / (self.enough or len(self.references)))


@dataclass(frozen=True)
class Matches:
    """Demand that the regular expression `pattern` matches somewhere in the answer, ignoring case."""

    pattern: str

    def share(self, said: str, form: Form) -> float:
        del form
        return float(re.search(self.pattern, said.strip(), re.IGNORECASE) is not None)


@dataclass(frozen=True)
class Lines:
    """Demand that the answer has exactly `count` lines; empty lines are not counted."""

    count: int

    def share(self, said: str, form: Form) -> float:
        del form
        return float(sum(bool(line.strip()) for line in said.splitlines()) == self.count)


@dataclass(frozen=True)
class JsonField:
    """Demand that the first JSON object in the answer has a certain value at a certain place.

    path   the place: keys from the object down to the value, e.g. ("arguments", "city")
    value  the value as JSON text; the type must agree too, so that the string "7" is not the number 7
    """

    path: tuple[str, ...]
    value: str

    def share(self, said: str, form: Form) -> float:
        del form
        found: Any = next(json_objects(said), None)
        for key in self.path:
            if not isinstance(found, dict) or key not in found:
                return 0.0
            found = found[key]
        return float(_canonical(found) == _canonical(json.loads(self.value)))


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text as dicts, from left to right.

    Text between them is skipped. An object inside another one is yielded as a part of it only.
    """
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield found
        at = text.find("{", end)


def _canonical(value: Any) -> str:
    """Write a value as JSON with sorted keys, so that two values give the same text only if equal and of one type."""
    return json.dumps(value, sort_keys=True)
