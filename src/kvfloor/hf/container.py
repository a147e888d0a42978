"""The file of a saved cache: safetensors whose every byte is under a SHA-256.

The metadata hold one JSON text under "kvfloor": what the caller gives, one digest per tensor, and as "header_sha256"
the digest of the whole safetensors header with this digest itself read as zeros. The digests guard against damage, not
against a forger. Equal content makes equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from kvfloor.core.message import CorruptState, raw_bytes
from kvfloor.version import __version__

FORMAT = 1
_ZEROS = b"0" * 64
_DIGEST = re.compile(rb'\{\\"header_sha256\\":\\"([0-9a-f]{64})\\"')  # where the text starts: only there


class NewerVersion(ValueError):
    """The file is of a format that a later kvfloor writes."""


def pack(header: dict[str, Any], tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file with this header, one digest per tensor in it, and a digest of the header itself."""
    digests = {name: _digest(tensor) for name, tensor in tensors.items()}
    whole = {"header_sha256": _ZEROS.decode()} | header | {"tensors": digests}
    data = safetensors.torch.save(tensors, {"kvfloor": json.dumps(whole, separators=(",", ":"))})
    end = 8 + int.from_bytes(data[:8], "little")
    place = _DIGEST.search(data, 0, end)
    assert place is not None
    digest = hashlib.sha256(data[:end]).hexdigest().encode()
    return b"".join([data[: place.start(1)], digest, data[place.end(1) :]])


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `pack` made; CorruptState if a byte is not as written, or NewerVersion."""
    end = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or end > len(data):
        raise CorruptState(f"the file has {len(data)} bytes, fewer than its header says: it is truncated, or no cache")
    place = _DIGEST.search(data, 0, end)
    if place is None:
        raise CorruptState("the file has no kvfloor header: it is no saved cache, or its header was changed")
    if hashlib.sha256(data[: place.start(1)] + _ZEROS + data[place.end(1) : end]).hexdigest().encode() != place[1]:
        raise CorruptState("the header's digest does not match: the file was changed")
    try:
        header = json.loads(json.loads(data[8:end])["__metadata__"]["kvfloor"])
        version, digests = int(header["format"]), header.pop("tensors")
        del header["header_sha256"]
    except (LookupError, TypeError, ValueError) as cause:
        raise CorruptState(f"the header is not one that kvfloor writes: {cause}") from None
    if version > FORMAT:
        raise NewerVersion(
            f"the cache is of format {version}, written by kvfloor {header.get('kvfloor')}; this is kvfloor "
            f"{__version__}, which reads up to format {FORMAT}: upgrade kvfloor"
        )
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, TypeError, ValueError) as cause:
        raise CorruptState(f"the tensors cannot be read, the file was truncated or changed: {cause}") from None
    if {name: _digest(tensor) for name, tensor in tensors.items()} != digests:
        raise CorruptState("a tensor's digest does not match: the file was changed")
    return header, {name: tensor.clone() for name, tensor in tensors.items()}  # clones are aligned as torch likes it


def _digest(tensor: Tensor) -> str:
    about = f"{tensor.dtype} {tuple(tensor.shape)}\n".encode()
    return hashlib.sha256(about + raw_bytes(tensor)).hexdigest()
