"""Files: read only if regular and small enough, replaced whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kvfloor import files
from kvfloor.files import open_folder, read_regular, replace_file

# ---- reading ---------------------------------------------------------------------------------------------------


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail instead of hanging."""

    def late(*arguments: object) -> None:
        raise TimeoutError(f"still running after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_file_is_read_whole_up_to_what_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4)
    assert read_regular(path, 1024, "file") == path.read_bytes()
    assert read_regular(str(path), 1 << 60, "file") == path.read_bytes()
    with pytest.raises(ValueError, match=r"cannot read the file .* has 1,024 bytes, more than the 1,023 allowed"):
        read_regular(path, 1023, "file")
    (tmp_path / "link").symlink_to(path)
    assert read_regular(tmp_path / "link", 1024, "file") == path.read_bytes()


def test_a_pipe_that_takes_the_name_after_it_was_asked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("regular")
    regular = os.stat(tmp_path / "file")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    with within(5), pytest.raises(ValueError, match="not a regular file"):
        read_regular(tmp_path / "pipe", 1 << 40, "file")


@pytest.mark.parametrize("path", [None, 7, b"x", ["x"]])
def test_what_is_no_path_is_a_type_error(path: Any) -> None:
    with pytest.raises(TypeError, match="the path of the file must be text or a Path, got"):
        read_regular(path, 10, "file")
    with pytest.raises(TypeError, match="path of the file to write must be text or a Path, got"):
        replace_file(path, "")


# ---- writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 64, 200, 252, 255])
def test_every_name_the_system_allows_can_be_written(tmp_path: Path, length: int) -> None:
    path = tmp_path / ("n" * length)
    for content in ("old", "new"):
        replace_file(path, content)
        assert path.read_text() == content and os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueError, match=r"cannot write"):
        replace_file(tmp_path / ("n" * 256), "x")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("path", [".", "..", "/", "folder", "folder/", "folder/..", "pipe", "link to folder"])
def test_a_folder_or_a_pipe_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("link to folder").symlink_to("folder")
    before = sorted(os.listdir())
    with pytest.raises(ValueError, match=r"cannot write .*: it is a .*; name a file"):
        replace_file(path, "x")
    assert sorted(os.listdir()) == before and not os.listdir("folder")


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValueError, match="is empty"):
        replace_file("", "x")


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    (tmp_path / "middle").symlink_to(target)
    link.symlink_to("middle")
    for content in ("made", "replaced"):
        replace_file(link, content)
        assert link.is_symlink() and target.read_text() == content and not target.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "middle", "there"] and os.listdir(tmp_path / "there") == ["file"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="symbolic links"):
        replace_file(tmp_path / "loop", "x")
    assert (tmp_path / "loop").is_symlink()


def _full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["open", "fdopen", "fsync", "replace"])
@pytest.mark.parametrize("failure, raised", [(_full, ValueError), (_interrupted, KeyboardInterrupt)])
def test_a_failure_at_any_step_leaves_the_old_file_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    failure: Callable[..., None],
    raised: type[BaseException],
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(os, step, failure)
        with pytest.raises(raised):
            replace_file(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_disk_that_fills_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot write"):
            replace_file(path, bytes(3 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def interrupted_at(line: int, call: Callable[[], object]) -> bool:
    """Raise KeyboardInterrupt before the given line, counted from 1, that `call` runs in files.py.

    Returns False if the call ends before that line.
    """
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != files.__file__:
            return None
        count += event == "line"
        if event == "line" and count == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_moment_leaves_one_whole_file(tmp_path: Path) -> None:
    path, found, line = tmp_path / "file", [], 0
    while not found or found[-1][0]:
        line += 1
        path.write_bytes(b"old")
        stopped = interrupted_at(line, lambda: replace_file(path, b"new"))
        found.append((stopped, path.read_bytes()))
        assert os.listdir(tmp_path) == ["file"]
    contents = [content for _, content in found]
    changed = contents.index(b"new")
    assert set(contents[:changed]) == {b"old"} and set(contents[changed:]) == {b"new"}
    assert 10 < changed < len(contents) - 1


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    for call in (lambda: replace_file(tmp_path / "file", "x"), lambda: open_folder(tmp_path)):
        with pytest.raises(ValueError, match=r"cannot write .*Permission denied; choose a folder"):
            call()


MOST = 1000


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("fifo", "not a regular file"),
        ("link", "not a regular file"),
        ("stdin", "not a regular file"),
        ("socket", "not a regular file"),
        ("folder", "not a regular file"),
        ("zero", "not a regular file"),
        ("sparse", "42,949,672,960 bytes, more than the 1,000 allowed"),
        ("one more", "1,001 bytes, more than the 1,000 allowed"),
        ("missing", "No such file"),
        ("empty", "is empty"),
        ("null", "null"),
        ("long", "name too long"),
        ("loop", "symbolic links"),
        ("kernel's", "more than the 0 bytes"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, kind: str, told: str) -> None:
    path = tmp_path / "file"
    if kind in ("fifo", "link"):
        os.mkfifo(path)
        (tmp_path / "link").symlink_to(path)
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
    named = {"zero": "/dev/zero", "stdin": "/dev/stdin", "kernel's": "/proc/self/stat", "link": tmp_path / "link"}
    named |= {"empty": "", "null": "a\0b", "long": "x" * 9999}
    with within(5), pytest.raises(ValueError, match="the notes ") as refused:
        read_regular(named.get(kind, path), MOST, "notes")
    assert kind == "empty" or str(refused.value).startswith("cannot read the notes ")
    assert told in str(refused.value) and "\n" not in str(refused.value)


# ---- digests and locks --------------------------------------------------------------------------------------------


def test_a_digest_tells_small_files_byte_by_byte_and_large_ones_by_size_and_sample(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"one")
    assert files.sampled_digest(small) == hashlib.sha256(b"one").hexdigest()
    content = bytearray(2**24 + 5000)
    large.write_bytes(content)
    digests = {files.sampled_digest(large)}
    for place in (0, len(content) - 1):
        large.write_bytes(content[:place] + b"x" + content[place + 1 :])
        digests.add(files.sampled_digest(large))
    large.write_bytes(content + b"\0")
    digests.add(files.sampled_digest(large))
    assert len(digests) == 4


def test_a_folder_is_locked_for_one_at_a_time(tmp_path: Path) -> None:
    first, second = files.FolderLock(tmp_path), files.FolderLock(tmp_path)
    first.take()
    with pytest.raises(ValueError, match="is in use by another process"):
        second.take()
    first.release()
    second.take()
    second.release()
