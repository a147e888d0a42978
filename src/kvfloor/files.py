"""Replace files so that a failure leaves the old file, and read only regular files no larger than a stated size."""

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

_PIECE_BYTES = 1 << 24
_SAMPLES = 1024  # pieces of a large file that its digest covers, each of _SAMPLE_BYTES
_SAMPLE_BYTES = 1 << 12
_IRREGULAR = "it is a folder, a pipe or a device, not a regular file"


def cache_folder() -> Path:
    """Return the folder for converted models and compiled kernels.

    It is `kvfloor` in the folder of the environment's XDG_CACHE_HOME, or in `~/.cache` where that is not set.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvfloor"


def open_folder(folder: Path) -> Path:
    """Create `folder` if it is missing, write and remove a test file in it, and return it.

    A command calls this first for its `--out`, so that an unwritable folder fails at once, not at the end of a long
    run. Raises ValueError with one line naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _cannot_write(folder, error) from error
    probe = folder / f".kvfloor-{secrets.token_hex(8)}"
    replace_file(probe, "")
    probe.unlink()
    return folder


def read_regular(path: str | Path, most_bytes: int, what: str) -> bytes:
    """Return the content of a regular file of at most `most_bytes` bytes.

    what: the kind of file, for errors, such as "prompts file". Raises ValueError, before anything is read, for a path
    that is no regular file (a folder, a pipe, a device) and for a file that is larger. Never waits for a pipe's writer.
    """
    with open_regular(path, what) as (stream, size):
        if size > most_bytes:
            raise cannot_read(path, what, f"it has {size:,} bytes, more than the {most_bytes:,} allowed")
        data = read_exactly(stream, size, path, what)
        if stream.read(1):
            raise cannot_read(path, what, f"it has more than the {size:,} bytes that it had when it was opened")
        return data


@contextmanager
def open_regular(path: str | Path, what: str) -> Iterator[tuple[FileIO, int]]:
    """Open a regular file for reading, and yield (stream, size in bytes). Raises ValueError for anything else.

    what: the kind of file, for errors, such as "prompts file". Opening a device may act on it, and opening a pipe waits
    for its writer, so the path is checked first. Another file may take the path in between, so the opened file is
    checked again.
    """
    path = named(path, what)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
        descriptor = os.open(path, flags) if regular else -1
    except (OSError, ValueError) as error:
        raise cannot_read(path, what, getattr(error, "strerror", None) or str(error)) from error
    if not regular:
        raise cannot_read(path, what, _IRREGULAR)
    with FileIO(descriptor, "rb") as stream:
        opened = os.fstat(descriptor)
        if not stat.S_ISREG(opened.st_mode):
            raise cannot_read(path, what, _IRREGULAR)
        yield stream, opened.st_size


def read_exactly(stream: FileIO, size: int, path: str | Path, what: str) -> bytes:
    """Return the next `size` bytes of the open file `stream`. Raises ValueError if fewer are left.

    path, what: the file's path and the kind of file, for the error.
    """
    data = bytearray()
    try:
        while len(data) < size and (piece := stream.read(min(size - len(data), _PIECE_BYTES))):
            data += piece
    except OSError as error:
        raise cannot_read(path, what, error.strerror or str(error)) from error
    if len(data) < size:
        raise cannot_read(path, what, f"it ended after {len(data)} of {size} bytes: is it being written?")
    return bytes(data)


def sampled_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file in hex digits; above 16 MiB, the SHA-256 of its size and a sample of its bytes.

    The sample is 1024 evenly spaced pieces of 4 KiB, from the file's first bytes to its last. So two models of many
    gigabytes are told apart without reading all of them. Raises ValueError for a path that is no regular file.
    """
    with open_regular(path, "file") as (stream, size):
        if size <= _PIECE_BYTES:
            return hashlib.sha256(read_exactly(stream, size, path, "file")).hexdigest()
        whole = hashlib.sha256(f"{size} bytes".encode())
        for piece in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * piece // (_SAMPLES - 1))
            whole.update(read_exactly(stream, _SAMPLE_BYTES, path, "file"))
        return whole.hexdigest()


def append_to(path: str | Path, data: bytes) -> None:
    """Append `data` to a file, made if it is missing, and flush it to the disk.

    On any failure the file is cut back to the bytes that it had before. Raises ValueError with one line naming the path
    and the reason, such as a full disk.
    """
    target = _replaceable(path)
    try:
        with open(target, "ab", buffering=0) as stream:
            before = os.fstat(stream.fileno()).st_size
            try:
                _write_all(stream, data)
                os.fsync(stream.fileno())
            except BaseException:
                os.ftruncate(stream.fileno(), before)
                raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def cut_to(path: str | Path, size: int) -> None:
    """Cut a file down to its first `size` bytes, if it has more. A missing file stays missing.

    Raises ValueError with one line naming the path and the reason.
    """
    try:
        if os.path.exists(path) and os.path.getsize(path) > size:
            os.truncate(path, size)
    except OSError as error:
        raise _cannot_write(path, error) from error


class FolderLock:
    """Keep other processes of this program from using a folder, from `take` to `release` or the end of the process.

    Every process that uses the folder must take this lock first. The lock is on the hidden file `.kvfloor.lock`, which
    is not removed. Where the system or the file system has no locks, `take` does nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor: int | None = None

    def take(self) -> None:
        """Lock the folder. Raises ValueError if another process has locked it, or if the folder is not writable."""
        try:
            import fcntl
        except ImportError:  # a system without this kind of lock
            return
        try:
            self._descriptor = os.open(self.folder / ".kvfloor.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"{str(self.folder)!r} is in use by another process: wait for it, or choose another folder with --out"
            ) from None
        except OSError:
            self.release()

    def release(self) -> None:
        """Unlock the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _write_all(stream: FileIO, data: bytes) -> None:
    """Write all of `data` to the open file `stream`, in as many calls as the system takes."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) or 0 :]


def replace_file(path: str | Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write `content` (bytes, or text as UTF-8) to `path`. If this fails, an existing file stays as it was.

    The content is written to a temporary file in the same folder, with the permissions `mode` less the umask, and
    flushed to the disk. The temporary file is then renamed to `path`, and the folder's entry is flushed too. On any
    failure the temporary file is removed, and `path` holds what it held before. If `path` is a symbolic link, the file
    that it leads to is replaced and the link stays.
    Raises ValueError with one line naming the path and the reason (no folder, no permission, no space left), and for a
    path that is a folder, a pipe or a device.
    """
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    target = _replaceable(path)
    temporary = target.with_name(f".kvfloor-{secrets.token_hex(8)}.tmp")  # short, however long the target's name
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):  # keep the first failure as the one raised
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, ValueError)):
            raise _cannot_write(path, error) from error
        raise
    _flush_folder(target.parent)


def _replaceable(path: str | Path) -> Path:
    """Return the path of the file to replace: `path`, or the file that it leads to if it is a symbolic link.

    Raises ValueError for a folder, a pipe or a device, which must not be replaced by a file.
    """
    path = named(path, "file to write")
    try:
        target = Path(os.path.realpath(path)) if os.path.islink(path) else path
        if os.path.islink(target):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        folder, taken = target.name in ("", "..") or os.path.isdir(target), os.path.lexists(target)
        regular = os.path.isfile(target)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    if folder or (taken and not regular):
        is_now = "a folder; name a file in it" if folder else "a pipe or a device; name a file"
        raise ValueError(f"cannot write {str(path)!r}: it is {is_now}")
    return target


def _flush_folder(folder: Path) -> None:
    """Flush the folder's list of files to the disk, so that a rename survives a crash.

    Nothing is done where the file system cannot do this.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def named(path: str | Path, what: str) -> Path:
    """Return `path` as a Path. Raises TypeError if it is neither text nor a Path, ValueError if it is empty.

    what: the kind of file, for errors, such as "prompts file".
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"the path of the {what} must be text or a Path, got {path!r}")
    if not str(path):
        raise ValueError(f"the path of the {what} is empty: name a file")
    return Path(path)


def cannot_read(path: str | Path, what: str, reason: str) -> ValueError:
    """Return a ValueError with the kind of file (`what`), its path and the reason why it cannot be read."""
    return ValueError(f"cannot read the {what} {str(path)!r}: {reason}")


def _cannot_write(path: str | Path, error: Exception) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ValueError(f"cannot write {str(path)!r}: {reason}; choose a folder you can write to that has space left")
