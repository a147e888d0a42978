"""Locate the small model that the package ships, and load it or any model in a local folder."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

BUILTIN = "builtin"
MOST_TEXT_BYTES = 2**28  # of a configuration or a tokenizer
_TEXTS = (".json", ".txt", ".model", ".jinja")


def builtin_path() -> Path:
    """Return the folder of the built-in model: weights, tokenizer, and `training.json`, the record of its training."""
    return Path(__file__).parent / "builtin"


def load(name_or_path: str | Path = BUILTIN) -> tuple[Any, Any]:
    """Return (model, tokenizer), the model in float32 and evaluation mode.

    name_or_path: "builtin", or the local folder of a transformers model. Nothing is downloaded. Raises ValueError where
    the folder holds no model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = builtin_path() if str(name_or_path) == BUILTIN else Path(name_or_path)
    _check_folder(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as cause:  # a damaged file may raise any exception in its reader
        raise ValueError(f"the model in {str(folder)!r} cannot be loaded: {type(cause).__name__}: {cause}") from cause
    return model.eval(), tokenizer


def _check_folder(folder: Path) -> None:
    """Raise ValueError unless the folder holds a config.json, regular files and folders only, and no huge text file."""
    try:
        if not (folder / "config.json").exists():
            raise ValueError(
                f"no model at {str(folder)!r}: give {BUILTIN!r} or a local folder with a config.json "
                "(models are never downloaded)"
            )
        for path in sorted(folder.iterdir()):
            about = path.stat()
            if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
                raise ValueError(f"{str(path)!r} is no regular file: a model's folder holds files and folders only")
            if path.suffix in _TEXTS and about.st_size > MOST_TEXT_BYTES:
                raise ValueError(f"{str(path)!r} has {about.st_size:,} bytes; at most {MOST_TEXT_BYTES:,} are read")
    except OSError as cause:
        raise ValueError(f"no model at {str(folder)!r}: {cause.strerror}") from None
