"""Where the built-in model lies, and how any local model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BUILTIN = "builtin"


def builtin_path() -> Path:
    """Folder of the shipped weights, tokenizer and `training.json`."""
    return Path(__file__).parent / "builtin"


def load(name_or_path: str | Path = BUILTIN) -> tuple[Any, Any]:
    """(model, tokenizer) in float32 and evaluation mode; "builtin" or the folder of a transformers model.

    Nothing is downloaded. Raises ValueError where the folder holds no model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = builtin_path() if str(name_or_path) == BUILTIN else Path(name_or_path)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"no model at {str(name_or_path)!r}: give {BUILTIN!r} or a local folder with a config.json "
            "(models are never downloaded)"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer
