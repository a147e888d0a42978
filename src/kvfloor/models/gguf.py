"""Convert a GGUF file, llama.cpp's format of a model, into a transformers folder in the user's cache, once.

A converted folder is named after the file's name and SHA-256, so that the same file is never converted twice. It is
written under another name and renamed when it is complete, so no folder in the cache is half written.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvfloor.files import cache_folder, open_folder, open_regular

MAGIC = b"GGUF"
_PIECE = 2**22  # bytes read at a time


def is_gguf(path: Path) -> bool:
    """Return True if the path ends in `.gguf`."""
    return path.suffix.lower() == ".gguf"


def folder_of(file_name: str, digest: str) -> Path:
    """Return the path of the folder for a converted GGUF file; it may not exist yet.

    file_name: the file's name, with or without `.gguf`; digest: its SHA-256 in hex digits.
    """
    return cache_folder() / f"{Path(file_name).stem}-{digest[:16]}"


def converted(path: Path, track: Callable[[str], None], expected: str | None = None) -> Path:
    """Convert the GGUF file at `path` unless that was done before; return the folder of the model and its tokenizer.

    The folder is in transformers' format, with float32 weights. `track` is called with a line of text before each long
    step. Raises ValueError if
    - the file is not GGUF, or its SHA-256 is not `expected` (None: any)
    - transformers cannot read its architecture, or one of the packages gguf and accelerate is missing
    - the user's cache folder cannot be written.
    """
    track(f"reading {path.name}")
    with open_regular(path, "GGUF file") as (stream, _):
        digest = hashlib.sha256(begin := stream.read(len(MAGIC)))
        while piece := stream.read(_PIECE):
            digest.update(piece)
    found = digest.hexdigest()
    if expected not in (None, found):
        raise ValueError(
            f"{path.name} has the SHA-256 {found}, not {expected}: another file than this version of kvfloor knows; "
            "nothing was kept"
        )
    if begin != MAGIC:
        raise ValueError(f"{str(path)!r} is no GGUF file: it does not begin with {MAGIC.decode()}")
    target = folder_of(path.name, found)
    if not target.exists():
        track(f"converting {path.name}: once, into {target}")
        _convert(path, target)
    return target


def _convert(path: Path, target: Path) -> None:
    """Write the model and tokenizer of the GGUF file `path` to the new folder `target`, completely or not at all.

    Raises ValueError if the file cannot be read or the folder cannot be written.
    """
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise ValueError("reading a GGUF file needs the packages gguf and accelerate: pip install 'kvfloor[gguf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    open_folder(target.parent)
    staged = target.with_name(f".{secrets.token_hex(8)}")
    try:
        at = {"gguf_file": path.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype="float32", **at)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **at)
        _forget_quantization(model)
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        if not target.exists():
            staged.rename(target)
    except Exception as cause:  # a damaged file may raise any exception in its reader
        raise ValueError(f"cannot convert {str(path)!r} to {str(target)!r}: {type(cause).__name__}: {cause}") from cause
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _forget_quantization(model: Any) -> None:
    """Remove the settings that mark `model` as quantised, as its weights were dequantised when they were read."""
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
