"""Write dataclass objects as JSON lines, one object with all its fields per line, and read them again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from kvfloor.files import read_regular, replace_file

R = TypeVar("R")


def line_of(record: Any) -> str:
    """Return a dataclass object as one line of JSON, with its line end."""
    return json.dumps({field.name: getattr(record, field.name) for field in fields(record)}, allow_nan=False) + "\n"


def write_records(path: Path, records: Iterable[Any]) -> None:
    """Write dataclass objects to `path`, one per line. If this fails, an existing file stays as it was."""
    replace_file(path, "".join(map(line_of, records)))


def read_records(path: Path, kind: type[R], most_bytes: int, file_name: str, what: str) -> list[R]:
    """Read a file of objects of the dataclass `kind`, one per line; lists in it become tuples.

    most_bytes  a larger file raises ValueError, and is not read
    file_name   name that an audit gives such a file, for errors
    what        description of one line, such as "a row of an audit", for errors
    Raises ValueError naming the file, and the line that is not such an object.
    """
    return _records(path, read_regular(path, most_bytes, "rows"), kind, file_name, what)


def read_growing(path: Path, kind: type[R], most_bytes: int, file_name: str, what: str) -> tuple[list[R], int]:
    """Read a file to which lines are appended one by one; return (its objects, size of its complete lines in bytes).

    A last line without a line end was cut off while it was written: it is neither read nor counted. For a missing file
    the result is ([], 0).

    kind        dataclass of the objects
    most_bytes  a larger file raises ValueError, and is not read
    file_name   name that an audit gives such a file, for errors
    what        description of one line, such as "a row of an audit", for errors
    Raises ValueError naming the file, and the line that is not such an object.
    """
    if not path.exists():
        return [], 0
    data = read_regular(path, most_bytes, "rows")
    whole = data[: data.rfind(b"\n") + 1]
    return _records(path, whole, kind, file_name, what), len(whole)


def _records(path: Path, data: bytes, kind: type[R], file_name: str, what: str) -> list[R]:
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}; give a {file_name} that an audit wrote") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record_from(json.loads(line), kind))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{str(path)!r} line {number} is not {what}: {error}") from error
    return records


def _record_from(plain: Any, kind: type[R]) -> R:
    """Build an object of the dataclass `kind` from the parsed JSON of one line, a dict of its fields.

    A field with a default may be missing, as in older files. Raises ValueError naming missing or unknown fields.
    """
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    needed = {field.name for field in fields(kind) if field.default is MISSING}  # type: ignore[arg-type]
    given = set(plain) if isinstance(plain, dict) else set()
    if not isinstance(plain, dict) or not needed <= given <= names:
        raise ValueError(f"missing fields {sorted(needed - given)}, unknown fields {sorted(given - names)}")
    return kind(**{name: _tuples(value) for name, value in plain.items()})


def _tuples(value: Any) -> Any:
    """Convert a list to a tuple, with the lists inside it; return any other value unchanged."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
