"""Keep the aligned columns of docstrings on the API pages; mkdocstrings loads this file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

sys.path.insert(0, str(Path(__file__).resolve().parent))
from columns import fenced


class Columns(griffe.Extension):
    """Rewrite each docstring before it is rendered."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(fenced(obj.docstring.value))
