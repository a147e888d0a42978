"""Pack a cache state, or a whole cache, as bytes: a message, which is also the content of a saved file.

The name comes from lower-bound proofs, in which Alice, who saw the tokens, sends a message to Bob, who answers the
queries; the proofs count its bytes. Fields are the saved attributes of a state, as nested dicts of tensors and JSON
values. A path is the names of a field and of the dicts around it, joined by slashes.
A message is a safetensors file: a header, then the tensors, each named by its path. The header's metadata have one
entry, named "kvfloor". Its text begins with the digest, i.e. the SHA-256 of every other byte of the file, in 64 hex
digits. A JSON object follows, which holds the format (a number), the entries that the caller of `pack` gives, and under
"fields" all fields that are not tensors.
Nothing is unpickled. A message that is truncated, changed in any bit or of another format is refused before anything is
allocated from it. The digest detects damage, not forgery. Equal content makes equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from kvfloor.files import cannot_read, open_regular, read_exactly

FORMAT = 2
HEADER_LIMIT_BYTES = 1 << 24
_START = b'{"__metadata__":{"kvfloor":"'  # the start of the header, after its length in 8 bytes
_DIGEST = slice(8 + len(_START), 8 + len(_START) + 64)
_OLD = (b"KVFLOOR\x01", b'{\\"header_sha256\\"')  # the starts of a message and a saved cache of format 1
_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)


class CorruptState(ValueError):
    """Report that the bytes of a message are truncated or changed, or are not what this release writes."""


class NewerVersion(ValueError):
    """Report a message of a format that a later kvfloor writes."""


class OlderVersion(ValueError):
    """Report a message of a format that an earlier kvfloor wrote and this one does not read."""


def pack(header: dict[str, Any], fields: dict[str, Any]) -> bytes:
    """Return the bytes of a message that holds `header` and `fields` (nested dicts of tensors and JSON values).

    `header` is a JSON-ready dict of the caller's entries, such as {"method": ..., "spec": ...}. Raises TypeError for a
    tensor whose dtype messages do not support, and ValueError if everything except the tensors takes more than
    HEADER_LIMIT_BYTES.
    """
    tensors: dict[str, Tensor] = {}
    plain = _split(fields, "", tensors)
    text = json.dumps({"format": FORMAT, **header, "fields": plain}, separators=(",", ":"))
    data = safetensors.torch.save(tensors, {"kvfloor": "0" * 64 + text})
    size = int.from_bytes(data[:8], "little")
    if size > HEADER_LIMIT_BYTES:
        raise ValueError(f"the state's header takes {size} bytes, more than {HEADER_LIMIT_BYTES}")
    assert data.startswith(_START, 8)
    return b"".join([data[: _DIGEST.start], _digest(data), data[_DIGEST.stop :]])


def unpack(data: bytes | bytearray | memoryview) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (header, fields), the two dicts from which `pack` made the message `data`.

    Raises CorruptState if the message is not intact, and OlderVersion or NewerVersion for another format.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"a message is bytes, got {type(data).__name__}")
    data = bytes(data)
    end = _header_end(data, len(data))
    if _digest(data) != data[_DIGEST]:
        raise CorruptState("the digest does not match: the message was truncated or changed")
    try:
        header = json.loads(json.loads(data[8:end])["__metadata__"]["kvfloor"][64:])
        version = int(header.pop("format"))
        if version <= FORMAT:
            fields = header.pop("fields")
            for path, tensor in sorted(safetensors.torch.load(data).items()):  # safetensors returns them in any order
                _place(fields, path, tensor)
            return header, fields
        writer = header.get("kvfloor", "a later release")
    except CorruptState:
        raise
    except _FORGED as cause:
        raise CorruptState(f"the header is not one that this release writes: {cause}") from None
    raise NewerVersion(
        f"the message is of format {version}, written by kvfloor {writer}; this release reads up to format {FORMAT}: "
        f"upgrade kvfloor"
    )


def read(path: str | Path, most_bytes: int, what: str) -> bytes:
    """Read a file that holds a message, and return its bytes.

    The rest of the file is read only if its first bytes can begin a message. what: the kind of file, for errors. Raises
    CorruptState or OlderVersion if the file does not begin like a message of this format, and ValueError for a file
    that cannot be read or has more than `most_bytes` bytes.
    """
    with open_regular(path, what) as (stream, size):
        start = read_exactly(stream, min(size, _DIGEST.stop), path, what)
        _header_end(start, size)
        if size > most_bytes:
            raise cannot_read(path, what, f"it has {size} bytes, more than the {most_bytes} allowed")
        return start + read_exactly(stream, size - len(start), path, what)


def payload_bytes(data: bytes) -> int:
    """Return how many bytes the tensors of the message `data` take, i.e. its size without the safetensors header."""
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the elements of a tensor as bytes, in row-major order."""
    dense = tensor.detach().cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # an axis of one element may have come with any stride
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


# Errors that parsing raises where the digest matches but the content is forged.
_FORGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


def _header_end(start: bytes, size: int) -> int:
    """Return the offset in bytes at which a message's safetensors header ends and its tensors begin.

    start: the first bytes of the message; size: the number of all its bytes. Raises CorruptState if no message begins
    with these bytes or the header is longer than allowed, and OlderVersion for a message of format 1.
    """
    if size < _DIGEST.stop:
        raise CorruptState(f"a message has at least {_DIGEST.stop} bytes, this one {size}: truncated, or no message")
    if start.startswith(_OLD[0]) or (start.startswith(_START, 8) and start.startswith(_OLD[1], _DIGEST.start)):
        raise OlderVersion(
            f"the message is of format 1, of an earlier kvfloor; this release reads format {FORMAT}: make it again"
        )
    if not start.startswith(_START, 8):
        raise CorruptState("these bytes do not start as a kvfloor message does")
    end = 8 + int.from_bytes(start[:8], "little")
    if end > min(size, 8 + HEADER_LIMIT_BYTES) or end < _DIGEST.stop:
        raise CorruptState(f"the header claims {end - 8} bytes, more than the message holds or than is allowed")
    return end


def _digest(data: bytes) -> bytes:
    """Return the SHA-256 of all bytes of the message `data` except the digest itself, as 64 hex digits."""
    rest = memoryview(data)
    digest = hashlib.sha256(rest[: _DIGEST.start])
    digest.update(rest[_DIGEST.stop :])
    return digest.hexdigest().encode()


def _split(fields: dict[str, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the nested `fields` without their tensors, and put each tensor into `tensors`, keyed by its path.

    `path` is the prefix of these paths, for the dicts around `fields`. Each tensor becomes dense, in storage of its
    own. Raises TypeError for a dtype that messages do not support.
    """
    plain: dict[str, Any] = {}
    for name, value in fields.items():
        full = path + name
        assert "/" not in name, f"{full} has a slash in a name"
        if isinstance(value, dict):
            inside = _split(value, f"{full}/", tensors)
            if inside or not value:  # the paths of its tensors restore a part of tensors alone
                plain[name] = inside
        elif isinstance(value, Tensor):
            if value.dtype not in _DTYPES:
                held = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
                raise TypeError(f"{full} is a {value.dtype} tensor; a message holds {held}")
            tensors[full] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            plain[name] = value
    return plain


def _place(fields: dict[str, Any], path: str, tensor: Tensor) -> None:
    """Put a tensor into nested fields at its path, the inverse of `_split`.

    Raises CorruptState if the path is used already, if a name before the path's last one belongs to no dict, for a
    dtype that messages do not support, and for a bool tensor with bytes other than 0 and 1.
    """
    if tensor.dtype not in _DTYPES:
        raise CorruptState(f"field {path} is a {tensor.dtype} tensor")
    if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        raise CorruptState(f"field {path} has truth values that are neither 0 nor 1")
    *parents, name = path.split("/")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise CorruptState(f"field {path} lies in {parent}, which is no part")
    if name in fields:
        raise CorruptState(f"field {path} is there twice")
    fields[name] = tensor.clone()  # a clone is aligned as torch's kernels need
