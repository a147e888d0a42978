"""Read a user's own samples from JSON lines: prompts with their answers, or contexts with questions and answers."""

from __future__ import annotations

import json
from pathlib import Path

from kvfloor.audit.plan import Item
from kvfloor.files import read_regular
from kvfloor.tasks import BeginsWith, Part, Question

MOST_PROMPT_BYTES = 2**28
FORMS = ({"prompt", "answer"}, {"context", "question", "answer"})


def read_prompts(path: Path, n: int) -> tuple[Item, ...]:
    """Read a user's samples from JSON lines: {"prompt", "answer"}, or {"context", "question", "answer"}.

    A generated answer counts as right if it begins with the text of "answer". Lines may end in LF or CRLF, and blank
    ones are skipped. All samples are returned. Raises ValueError naming the file and the broken line, for fewer than
    `n` samples, and for a file of more than 256 MiB.
    """
    data = read_regular(path, MOST_PROMPT_BYTES, "prompts file")
    before, zero, _ = data.partition(b"\0")
    if zero:
        line = before.count(b"\n") + 1
        raise ValueError(f"{path} line {line} has zero bytes, as UTF-16 and UTF-32 do: save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise ValueError(f"the prompts file {str(path)!r} is not UTF-8: {cause}; convert it first") from None
    # JSON strings may hold U+2028 and its like as they are, at which str.splitlines would break a line
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) == 1 and "\r" in text:
        raise ValueError(f"the lines of {str(path)!r} end in CR alone: save it with LF or CRLF")
    items = tuple(_item(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if len(items) < n:
        raise ValueError(f"{path} has {len(items)} samples; an audit row needs at least {n}: add prompts")
    return items


def _item(line: str, where: str) -> Item:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as cause:
        raise ValueError(f"{where} is not JSON: {cause.msg} at column {cause.colno}") from None
    except (ValueError, RecursionError) as cause:  # a number of thousands of digits, brackets thousands deep
        raise ValueError(f"{where} is not JSON that can be read: {cause}") from None
    fits = isinstance(record, dict) and any(
        form <= record.keys() and all(isinstance(record[key], str) and record[key].strip() for key in form)
        for form in FORMS
    )
    if not fits:
        raise ValueError(f'{where} must have non-empty texts "prompt" and "answer", or "context", "question", "answer"')
    if any(0xD800 <= ord(c) < 0xE000 for value in record.values() if isinstance(value, str) for c in value):
        raise ValueError(f"{where} has half of a surrogate pair, which is no text: write the character itself")
    answer = record["answer"]
    ask = "" if "prompt" in record else record["question"]
    # a user's file does not define where an answer ends: more may follow it
    question = Question(ask, answer, parts=(Part("answer", BeginsWith(answer)),))
    return Item(record["prompt"] if "prompt" in record else record["context"], (question,))
