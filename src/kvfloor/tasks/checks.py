"""Check a generated answer: each check returns the share of its demands that the answer meets, from 0 to 1.

A part is a check with a name. A question has one part or more, and an answer is right if it meets every part in full.
References are compared in the form that the tokenizer would decode them to (`Form`), because a tokenizer may change
letters and spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Form = Callable[[str], str]
"""Return a text as the tokenizer would decode it."""


class AnswerCheck(Protocol):
    """Compare a generated answer with what is demanded."""

    def share(self, said: str, form: Form) -> float:
        """Return the share of the demands that `said` meets, from 0 to 1."""
        ...


@dataclass(frozen=True)
class Part:
    """Hold a check under the name by which a report lists it."""

    name: str
    check: AnswerCheck


@dataclass(frozen=True)
class SameWords:
    """Demand that the answer equals `words`, after runs of white space are made one space."""

    words: str

    def share(self, said: str, form: Form) -> float:
        wanted = form(self.words).split()
        return float(bool(wanted) and said.split() == wanted)


@dataclass(frozen=True)
class BeginsWith:
    """Demand that the answer begins with `words`, whatever follows them."""

    words: str

    def share(self, said: str, form: Form) -> float:
        wanted = form(self.words).split()
        return float(bool(wanted) and said.split()[: len(wanted)] == wanted)


@dataclass(frozen=True)
class Contains:
    """Demand that the answer contains each reference, upper or lower case: RULER's score, a share of the references.

    enough  number of references that are enough for the full share; None: all
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
    """Demand that the regular expression `pattern` is found in the answer, upper or lower case."""

    pattern: str

    def share(self, said: str, form: Form) -> float:
        del form
        return float(re.search(self.pattern, said.strip(), re.IGNORECASE) is not None)


@dataclass(frozen=True)
class Lines:
    """Demand exactly `count` lines, empty ones aside."""

    count: int

    def share(self, said: str, form: Form) -> float:
        del form
        return float(sum(bool(line.strip()) for line in said.splitlines()) == self.count)


@dataclass(frozen=True)
class JsonField:
    """Demand a value in the first JSON object of the answer.

    path   keys from the object down to the value, e.g. ("arguments", "city")
    value  the demanded value as JSON text; it must agree in type too, so that "7" is not 7
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
    """Yield the JSON objects in a text, from left to right, whatever stands between them."""
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
    """Write a JSON value such that equal values, in type too, give equal texts."""
    return json.dumps(value, sort_keys=True)
