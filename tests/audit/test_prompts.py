"""Odd files of a user's prompts: read as meant, or refused with one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvfloor.audit.prompts import read_prompts
from tests.cli.running import kvfloor

LINES = [json.dumps({"prompt": f"p{i}", "answer": "ä"}, ensure_ascii=False) for i in range(3)]
GOOD = "\n".join(LINES)
WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")


@pytest.mark.parametrize(
    "data",
    [
        GOOD.encode(),
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.replace("\n", "\r\n").encode() + b"\r\n",
        GOOD.replace("\n", "\n\n \t\n").encode() + b"\n\n",
        ("\n" + GOOD).encode(),
    ],
    ids=["plain", "BOM", "CRLF", "blank lines", "blank first line"],
)
def test_marks_line_ends_and_blank_lines_change_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(data)
    assert [(item.context, item.answer) for item in read_prompts(path, 3)] == [(f"p{i}", "ä") for i in range(3)]


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1e"])
def test_separators_inside_a_text_do_not_end_its_line(tmp_path: Path, odd: str) -> None:
    path = tmp_path / "mine.jsonl"
    text = f"one{odd}two"
    # JSON forbids only the controls below U+0020 as they are
    line = json.dumps({"context": text, "question": "q", "answer": "a"}, ensure_ascii=ord(odd) < 0x20)
    path.write_text(line + "\n" + line, encoding="utf-8")
    assert [item.context for item in read_prompts(path, 2)] == [text, text]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        *((GOOD.encode(code), "has zero bytes, as UTF-16 and UTF-32 do: save it as UTF-8") for code in WIDE),
        (GOOD.encode("latin-1"), "is not UTF-8.*convert it first"),
        (GOOD.replace("\n", "\r").encode(), "end in CR alone: save it with LF or CRLF"),
        (b'{"prompt": "x", "answer": ""}', "line 1 must have non-empty texts"),
        (b'{"prompt": "x", "answer": " \\n"}', "line 1 must have non-empty texts"),
        (b'\n\n{"context": "c", "question": "", "answer": "y"}', "line 3 must have non-empty texts"),
        (b'{"prompt": "x", "answer": 7}', "line 1 must have non-empty texts"),
        (b'{"prompt": "x\\ud800", "answer": "y"}', "line 1 has half of a surrogate pair"),
        (b"", "has 0 samples"),
        (b"\xef\xbb\xbf\r\n\r\n", "has 0 samples"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_2(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=told) as caught:
        read_prompts(path, 1)
    assert "\n" not in str(caught.value) and "mine.jsonl" in str(caught.value)
    run = kvfloor("audit", "--prompts", str(path), "--out", str(tmp_path / "out"))
    assert run.returncode == 2 and run.stdout == "" and len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
