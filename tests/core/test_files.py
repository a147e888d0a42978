"""Reading a file: only a regular one of bounded size, whatever else bears the name, and at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kvfloor.files import read_regular

MOST = 1000


def test_a_regular_file_is_read_whole(tmp_path: Path) -> None:
    for size in (0, 1, MOST):
        (tmp_path / "file").write_bytes(bytes(size))
        assert read_regular(tmp_path / "file", MOST, "notes") == bytes(size)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert len(read_regular(str(tmp_path / "link"), MOST, "notes")) == MOST


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("fifo", "no regular file"),
        ("socket", "No such device"),
        ("folder", "Is a directory"),
        ("zero", "no regular file"),
        ("sparse", "42,949,672,960 bytes, and at most 1,000 are read"),
        ("one more", "1,001 bytes, and at most 1,000"),
        ("missing", "No such file"),
        ("null", "null"),
        ("long", "name too long"),
        ("loop", "symbolic links"),
        ("kernel's", "grows while it is read"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, kind: str, told: str) -> None:
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind in ("sparse", "one more"):
        path.touch()
        os.truncate(path, 40 * 2**30 if kind == "sparse" else MOST + 1)
    elif kind == "loop":
        path.symlink_to(path)
    named = {"zero": "/dev/zero", "null": "a\0b", "long": "x" * 9999, "kernel's": "/proc/self/stat"}
    with pytest.raises(ValueError, match=r"^cannot read the notes ") as refused:
        read_regular(named.get(kind, path), MOST, "notes")
    assert told in str(refused.value) and "\n" not in str(refused.value)
