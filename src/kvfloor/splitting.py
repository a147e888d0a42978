"""Split texts such as "h2o(recent=64)@512, window@256" at separators outside parentheses, brackets and quotes.

This text lists two methods, each with its budget after "@"; `recent=64` is an argument of the first. A comma or "@"
within parentheses or quotes belongs to a method's argument, so it does not split the text.
"""

from __future__ import annotations

import re

_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)  # a quoted argument, such as a file's path
_SHOWN = 40  # characters of a refused text


def outline(text: str) -> str:
    """Return `text` with "_" for every character of a quoted string, and every character within brackets of any kind.

    For example "h2o(recent=64)@512" becomes "h2o(_________)@512". The length is unchanged, so a separator found in the
    result has the same index in the text. A quote that is never closed and a closing bracket that was never opened are
    plain characters.
    """
    depth, kept = 0, []
    for c in _QUOTED.sub(lambda quoted: "_" * len(quoted[0]), text):
        depth = max(0, depth - (c in ")]}"))
        kept.append("_" if depth else c)
        depth += c in "([{"
    return "".join(kept)


def split_once(text: str, mark: str) -> tuple[str, str, str]:
    """Split `text` once, at the first separator `mark` outside parentheses and quotes: return (before, mark, after).

    Before and after are returned without surrounding spaces. Without such a separator, (text, "", "") is returned.
    """
    at = outline(text).find(mark)
    return (text, "", "") if at < 0 else (text[:at].strip(), mark, text[at + len(mark) :].strip())


def split_list(text: str) -> list[str]:
    """Return the parts of a comma-separated list, without surrounding spaces; empty parts are left out.

    A comma within parentheses or quotes does not split.
    """
    return split_words(text, ",")


def split_words(text: str, pattern: str) -> list[str]:
    """Return the parts between matches of the regular expression `pattern` outside parentheses and quotes.

    Surrounding spaces are stripped, and empty parts are left out.
    """
    parts, start = [], 0
    for found in re.finditer(pattern, outline(text)):
        parts.append(text[start : found.start()])
        start = found.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def shortened(text: str) -> str:
    """Return `text` in quotes, for an error message; a text of more than 40 characters is cut, and its length added."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}... ({len(text):,} characters)"
