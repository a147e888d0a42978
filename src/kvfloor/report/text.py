"""Make text from models, tasks and methods safe to print, so that it cannot steer a terminal or reorder a line."""

import unicodedata

_STEERING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that are invisible or act on their surroundings: controls, bidi marks, surrogates, ..."""


def visible(text: str) -> str:
    """Return `text` with every control, bidi mark, surrogate and line break written as its `\\u` code.

    >>> visible("a\\x1b[31mb")
    'a\\\\u001b[31mb'
    """
    return "".join(_code(char) if unicodedata.category(char) in _STEERING else char for char in text)


def _code(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
