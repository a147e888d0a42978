"""Identify by SHA-256 what an audit measured: the model's files, the texts and the prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kvfloor.audit.format import bytes_text
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.texts import GENERATED, SHIPPED, text_of
from kvfloor.files import open_regular
from kvfloor.models.gguf import is_gguf
from kvfloor.models.load import BUILTIN, builtin_path
from kvfloor.models.packaged import PACKAGED

MOST_HASHED = 2**32
"""Bytes of a folder's weights beyond which they are not read once more for their SHA-256."""

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # the names that transformers gives them
_PIECE = 2**22  # bytes read at a time


def model_hashes(name: str) -> dict[str, str]:
    """Return file name -> SHA-256 of a model's files of weights.

    name: "builtin", the name of a published model, a GGUF file or a folder. If the files of a folder have more than
    MOST_HASHED bytes together, each has a sentence with its size in place of the SHA-256.
    """
    if name in PACKAGED:
        return {PACKAGED[name].file: PACKAGED[name].sha256}
    if is_gguf(Path(name)):
        return {Path(name).name: _of_file(Path(name))}
    folder = builtin_path() if name == BUILTIN else Path(name)
    weights = [path for names in _WEIGHTS for path in sorted(folder.glob(names))]
    if sum(path.stat().st_size for path in weights) > MOST_HASHED:
        return {path.name: f"not computed: {bytes_text(path.stat().st_size)}" for path in weights}
    return {path.name: _of_file(path) for path in weights}


def text_hashes(names: Sequence[str], tokens: int) -> dict[str, str]:
    """Return name -> SHA-256 of each text: of a file's bytes, or of a shipped or generated text in UTF-8.

    tokens: number of tokens that the audit read of each text; a generated text is made as long as that.
    """
    packaged = (*SHIPPED, *GENERATED)
    return {
        Path(name).name: hashlib.sha256(text_of(name, tokens).encode()).hexdigest()
        if name in packaged
        else _of_file(Path(name))
        for name in names
    }


def hashes_of(question: AuditRequest) -> dict[str, str]:
    """Return file or text -> SHA-256 of what an audit measures: the model's weights, the texts, the user's prompts.

    question: the arguments of the audit.
    """
    longest = max(question.context_lengths) + question.scored
    texts = text_hashes(question.text_names, longest)
    return model_hashes(question.model) | texts | file_hash(question.prompts)


def file_hash(path: Path | None) -> dict[str, str]:
    """Return a dict with one entry, file name -> SHA-256; an empty dict for None."""
    return {} if path is None else {path.name: _of_file(path)}


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path, "file") as (stream, _):
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
