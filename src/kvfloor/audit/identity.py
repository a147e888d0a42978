"""Record what an audit's rows depend on, so that an audit never uses rows that were measured for a different one.

A row is the result of one setting (method with its budget) on one text or task. The identity of an audit is a dict of
all that its rows depend on; two audits with equal identities may share rows. A digest is a SHA-256 in hex digits.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvfloor
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.audit.texts import text_of
from kvfloor.files import sampled_digest
from kvfloor.models.load import DTYPE

VERSIONS = ("kvfloor", "torch", "transformers")


def versions() -> dict[str, str]:
    """Return name -> version of kvfloor, torch, transformers and python."""
    return {name: version(name) for name in VERSIONS} | {"python": platform.python_version()}


def identity(question: AuditRequest, settings: Sequence[BudgetedMethod], folder: Path) -> dict[str, Any]:
    """Return the identity of an audit, as plain JSON types: names, numbers and digests.

    question  the arguments of the audit
    settings  the methods with their budgets
    folder    the model's files
    Number and kind of processors are left out. They change the measured times, and the other figures by rounding alone.
    """
    need = max(question.context_lengths) + question.scored
    return {
        "model": {path.name: sampled_digest(path) for path in _files(folder)},
        "dtype": DTYPE,
        "settings": {one.text: {"baseline": one.baseline, "files": _of_method(one.method)} for one in settings},
        "texts": {Path(name).stem: _digest(text_of(name, need).encode()) for name in question.text_names},
        "tasks": {name: _of_task(name) for name in question.task_names},
        "prompts": None if question.prompts is None else [question.prompts.stem, sampled_digest(question.prompts)],
        "contexts": list(question.context_lengths),
        "continuation": question.scored if question.text_names else None,
        "protocols": list(question.protocols),
        "facts": question.sheets,
        "chat": question.chat,
        "n": question.n,
        "seed": question.seed,
        "versions": {name: found for name, found in versions().items() if name in VERSIONS},
        "code": _of_package(),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the entries in which one identity differs from the other; an empty list if they are equal."""
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]


def _files(folder: Path) -> list[Path]:
    """Return the files of a model's folder, sorted, without hidden ones and `.md` files."""
    return [
        path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "." and path.suffix != ".md"
    ]


def _of_task(name: str) -> str | None:
    """Return the digest of the user's Python file that defines a task `module:TASK`; None for a built-in task."""
    module = sys.modules.get(name.partition(":")[0]) if ":" in name else None
    source = getattr(module, "__file__", None)
    return None if source is None else sampled_digest(Path(source))


def _of_method(part: Any) -> list[str]:
    """Return the digests of the user's files that a method depends on: code from outside kvfloor, and data.

    part: the method. Data are files whose path is an argument of the method or of one of its parts.
    """
    return [sampled_digest(path) for path in sorted(set(_sources(part)))]


def _sources(part: Any) -> Iterator[Path]:
    module = type(part).__module__
    source = getattr(sys.modules.get(module), "__file__", None)
    if source is not None and not module.startswith("kvfloor."):
        yield Path(source)
    for field in fields(part):
        value = getattr(part, field.name)
        for one in value if isinstance(value, tuple) else (value,):
            if is_dataclass(one) and not isinstance(one, type):
                yield from _sources(one)
        if isinstance(value, str) and Path(value).is_file():
            yield Path(value)


def _of_package() -> str:
    """Return one digest of all of kvfloor's own files: code, texts and the built-in model."""
    root = Path(kvfloor.__file__).parent
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.parent.name != "__pycache__":
            whole.update(f"{path.relative_to(root)} {sampled_digest(path)}\n".encode())
    return whole.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
