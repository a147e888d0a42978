"""The message: a state as bytes. What Alice sends Bob in the lower bounds' proofs, and what is saved.

Layout: 8 bytes magic and version, 8 bytes header length (little-endian), a JSON header (method, spec, one entry
per field), the tensors' raw bytes, and a SHA-256 over everything before it. Nothing is unpickled; a message
that is truncated, flipped or of another version raises `CorruptState` before anything is allocated from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MAGIC = b"KVFLOOR\x01"
HEADER_LIMIT_BYTES = 1 << 20
_DIGEST_BYTES = 32
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
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
}


class CorruptState(ValueError):
    """The bytes are not an intact message of this version."""


def pack(method: str, spec: dict[str, Any], fields: dict[str, Any]) -> bytes:
    """Bytes of a state: `fields` as `Memory.export` gives them."""
    entries, tensors = flatten(fields)
    chunks = [raw_bytes(tensor) for tensor in tensors.values()]
    header = json.dumps({"method": method, "spec": spec, "entries": entries}, separators=(",", ":")).encode()
    if len(header) > HEADER_LIMIT_BYTES:
        raise ValueError(f"the state's header takes {len(header)} bytes, more than {HEADER_LIMIT_BYTES}")
    body = b"".join([MAGIC, len(header).to_bytes(8, "little"), header, *chunks])
    return body + hashlib.sha256(body).digest()


def unpack(data: bytes) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Method text, spec and fields of a message; CorruptState if it is not intact."""
    prefix = len(MAGIC) + 8
    if len(data) < prefix + _DIGEST_BYTES:
        raise CorruptState(f"a message has at least {prefix + _DIGEST_BYTES} bytes, this one {len(data)}: truncated")
    if data[: len(MAGIC) - 1] != MAGIC[:-1]:
        raise CorruptState("these bytes do not start as a kvfloor message does")
    if data[len(MAGIC) - 1] != MAGIC[-1]:
        raise CorruptState(f"message version {data[len(MAGIC) - 1]}; this release reads version {MAGIC[-1]}")
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise CorruptState("the digest does not match: the message was truncated or changed")
    size = int.from_bytes(body[len(MAGIC) : prefix], "little")
    if size > HEADER_LIMIT_BYTES or prefix + size > len(body):
        raise CorruptState(f"the header claims {size} bytes, more than the message holds or than is allowed")
    try:
        header = json.loads(body[prefix : prefix + size])
        entries = header["entries"]
        fields = gather(entries, _sent(entries, memoryview(body)[prefix + size :]))
        return header["method"], header["spec"], fields
    except CorruptState:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:
        raise CorruptState(f"the header is not one that this release writes: {cause}") from None


def payload_bytes(data: bytes) -> int:
    """Bytes of a message that are tensors: what is left without magic, header and digest."""
    prefix = len(MAGIC) + 8
    return len(data) - prefix - int.from_bytes(data[len(MAGIC) : prefix], "little") - _DIGEST_BYTES


def flatten(fields: dict[str, Any]) -> tuple[list[list[Any]], dict[str, Tensor]]:
    """`fields` as `Memory.export` gives them, as JSON-ready entries and, by path, dense tensors on the CPU.

    An entry is [path, "part"], [path, "value", value] or [path, dtype, shape]; the tensors are in the entries' order.
    Raises TypeError for a dtype that no message holds.
    """
    entries: list[list[Any]] = []
    tensors: dict[str, Tensor] = {}
    _flatten(fields, "", entries, tensors)
    return entries, tensors


def gather(entries: list[list[Any]], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `flatten`; CorruptState if a tensor is missing."""
    fields: dict[str, Any] = {}
    for full, kind, *rest in entries:
        *parents, name = full.split("/")
        into = fields
        for parent in parents:
            into = into[parent]
        if kind == "part":
            into[name] = {}
        elif kind == "value":
            into[name] = rest[0]
        elif full not in tensors:
            raise CorruptState(f"field {full} is missing")
        else:
            into[name] = tensors[full]
    return fields


def raw_bytes(tensor: Tensor) -> bytes:
    """The elements' bytes in row-major order."""
    dense = tensor.detach().cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # an axis of one element may have come with any stride
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _flatten(fields: dict[str, Any], path: str, entries: list[list[Any]], tensors: dict[str, Tensor]) -> None:
    for name, value in fields.items():
        full = f"{path}/{name}" if path else name
        if isinstance(value, dict):
            entries.append([full, "part"])
            _flatten(value, full, entries, tensors)
        elif isinstance(value, Tensor):
            if value.dtype not in _DTYPES.values():
                raise TypeError(f"{full} is a {value.dtype} tensor; a message holds {', '.join(_DTYPES)}")
            entries.append([full, str(value.dtype).removeprefix("torch."), list(value.shape)])
            tensors[full] = value.detach().cpu().contiguous()
        else:
            entries.append([full, "value", value])


def _sent(entries: list[list[Any]], payload: memoryview) -> dict[str, Tensor]:
    """The tensors that the entries name, cut from the payload; CorruptState if it is too short or too long."""
    tensors: dict[str, Tensor] = {}
    offset = 0
    for full, kind, *rest in entries:
        if kind in ("part", "value"):
            continue
        dtype, shape = _DTYPES[kind], [int(size) for size in rest[0]]
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or offset + size > len(payload):
            raise CorruptState(f"field {full} reaches past the end of the message")
        raw = bytearray(payload[offset : offset + size])
        tensors[full] = (
            torch.frombuffer(raw, dtype=dtype).reshape(shape).clone() if size else torch.zeros(shape, dtype=dtype)
        )
        offset += size
    if offset != len(payload):
        raise CorruptState(f"{len(payload) - offset} bytes are left over after the last field")
    return tensors
