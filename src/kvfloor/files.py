"""Writing a file whole or not at all, and reading one of bounded size."""

import os
import secrets
import stat
from pathlib import Path


def open_folder(folder: Path) -> Path:
    """Create `folder` where it is missing and prove that files can be written and renamed in it.

    An audit calls this first, so that an unwritable `--out` fails in the first second and not in the last.
    Raises ValueError with one line naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _cannot_write(folder, error) from error
    probe = folder / f".kvfloor-{secrets.token_hex(8)}"
    replace_file(probe, "")
    probe.unlink()
    return folder


def replace_file(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write bytes, or text as UTF-8, so that `path` holds either all of it or what it held before.

    The content goes to a temporary file in the same folder, made with the permissions `mode` less the umask, is
    flushed to the disk, and takes the name by rename; the folder's own entry is flushed after it. On any failure
    the temporary file is removed.
    Raises ValueError with one line naming the path and the reason (no folder, no permission, no space left).
    """
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_write(path, error) from error
        raise
    _flush_folder(path.parent)


def read_regular(path: str | Path, most_bytes: int, what: str) -> bytes:
    """Return the bytes of the regular file `path`; `what` names it in errors, such as "prompts file".

    A pipe, a device or a folder is refused without waiting for it, a file of more than `most_bytes` before it is read.
    Raises ValueError with one line naming the path and the reason.
    """
    reason, data = "", b""
    try:
        with open(path, "rb", opener=_without_waiting) as stream:
            about = os.fstat(stream.fileno())
            if not stat.S_ISREG(about.st_mode):
                reason = "it is no regular file"
            elif about.st_size > most_bytes:
                reason = f"it has {about.st_size:,} bytes, and at most {most_bytes:,} are read"
            else:
                data = stream.read(about.st_size + 1)
                reason = "it grows while it is read" if len(data) > about.st_size else ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    if reason:
        raise ValueError(f"cannot read the {what} {str(path)!r}: {reason}")
    return data


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe opens at once, whether or not it has a writer


def _flush_folder(folder: Path) -> None:
    """Flush a rename to the disk where the file system can; the file itself is already whole."""
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


def _cannot_write(path: Path, error: Exception) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ValueError(f"cannot write {str(path)!r}: {reason}; choose a folder you can write to that has space left")
