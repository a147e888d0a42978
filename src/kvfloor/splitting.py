"""Split texts that hold methods; a mark within parentheses or quotes belongs to an argument."""

from __future__ import annotations

import re

_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)  # a quoted argument, such as a file's path
_SHOWN = 40  # characters of a refused text


def outline(text: str) -> str:
    """Return `text` with "_" in place of every character within parentheses, brackets or quotes.

    Positions stay, so that a mark found in the outline stands at the same place in the text. A quote that is never
    closed and a parenthesis that was never opened are plain characters.
    """
    depth, kept = 0, []
    for c in _QUOTED.sub(lambda quoted: "_" * len(quoted[0]), text):
        depth = max(0, depth - (c in ")]}"))
        kept.append("_" if depth else c)
        depth += c in "([{"
    return "".join(kept)


def split_once(text: str, mark: str) -> tuple[str, str, str]:
    """Split at the first `mark` of the outline: (before, mark or "", after), without surrounding spaces."""
    at = outline(text).find(mark)
    return (text, "", "") if at < 0 else (text[:at].strip(), mark, text[at + len(mark) :].strip())


def split_list(text: str) -> list[str]:
    """Split a comma-separated list into its parts, without surrounding spaces; empty parts are left out."""
    return split_words(text, ",")


def split_words(text: str, pattern: str) -> list[str]:
    """Split wherever the regular expression `pattern` matches the outline; empty parts are left out."""
    parts, start = [], 0
    for found in re.finditer(pattern, outline(text)):
        parts.append(text[start : found.start()])
        start = found.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def shortened(text: str) -> str:
    """Quote the text, cut where it is long."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}... ({len(text):,} characters)"
