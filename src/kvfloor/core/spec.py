"""Define the spec of a state: the sizes and constants that it is opened for, all independent of the stream.

A method is a way to compress a KV cache, and a state is its memory of several streams of tokens. A row is one of these
streams, that of one (batch item, kv head).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.attend import compute_dtype
from kvfloor.core.device import sent
from kvfloor.core.rotation import Rotation

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Spec:
    """Hold the sizes and constants that a state is opened for; none depends on the stream, so none counts as memory.

    rows      number of independent streams (batch x kv head)
    d, dv     width of a key and of a value
    scale     the factor on q.k (the papers use 1, models d**-0.5)
    softcap   c, for logits c*tanh(logit/c); None: no cap
    dtype     of keys, values and queries
    device    where they are
    seed      seeds all random draws, together with the row ids
    row_ids   one identity per row, which seeds the row's random draws; 0, 1, 2, ... unless given
    places    each row's (layer, kv head) in a model, for methods whose trained parameters differ from head to head;
              None outside a model
    tied      True: a token's value is its key; both are given as one tensor, and stored once
    rotation  None, or the rotation (RoPE) that the state applies to keys and queries, which are then given unrotated.
              They are rotated by the token's rank among the tokens that its row holds, the oldest at 0
    applied   None, or the rotation (RoPE) by which keys and queries are already rotated when given, each by its token's
              position in the stream plus any constant. The state does not apply it: eviction policies that predict
              later queries read it. None also if it is unknown. `applied` and `rotation` exclude each other
    Raises ValueError naming the field that is out of its domain.
    """

    rows: int
    d: int
    dv: int
    scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    seed: int = 0
    row_ids: Sequence[int] | None = None
    places: Sequence[tuple[int, int]] | None = None
    tied: bool = False
    rotation: Rotation | None = None
    applied: Rotation | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "d", "dv"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Spec.{name} must be a positive integer, got {value!r}")
        if not (isinstance(self.scale, (int, float)) and math.isfinite(self.scale)):
            raise ValueError(f"Spec.scale must be a finite number, got {self.scale!r}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"Spec.softcap must be None or a positive number, got {self.softcap!r}")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"Spec.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.tied and self.d != self.dv:
            raise ValueError(f"Spec.tied says that values are the keys, so dv must be d = {self.d}, got {self.dv}")
        for name in ("rotation", "applied"):
            rotation = getattr(self, name)
            if not isinstance(rotation, Rotation | None):
                raise ValueError(f"Spec.{name} must be None or a Rotation, got {rotation!r}")
            if rotation is not None and rotation.stop > self.d:
                raise ValueError(f"Spec.{name} turns entries up to {rotation.stop} of keys that have d = {self.d}")
        if self.rotation is not None and self.applied is not None:
            raise ValueError(
                "Spec.rotation says that keys are given unrotated, Spec.applied that they are rotated: give one of them"
            )
        if not isinstance(self.seed, int):
            raise ValueError(f"Spec.seed must be an integer, got {self.seed!r}")
        ids = tuple(range(self.rows)) if self.row_ids is None else tuple(int(i) for i in self.row_ids)
        if len(ids) != self.rows:
            raise ValueError(f"Spec.row_ids must have one id per row: {self.rows} rows, {len(ids)} ids")
        object.__setattr__(self, "row_ids", ids)
        if self.places is not None:
            places = tuple((int(layer), int(head)) for layer, head in self.places)
            if len(places) != self.rows:
                raise ValueError(f"Spec.places must name one place per row: {self.rows} rows, {len(places)} places")
            object.__setattr__(self, "places", places)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype of logits, log-masses and attention outputs: float32, or float64 for a float64 spec."""
        return compute_dtype(self.dtype)

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token's key and value as they are given; of the key alone if it is the value too."""
        return (self.d + (0 if self.tied else self.dv)) * self.dtype.itemsize

    @cached_property
    def device_type(self) -> str:
        """Return the type of the spec's device without its index, such as "cpu" or "cuda"."""
        return torch.device(self.device).type

    def ids(self) -> Tensor:
        """Return the row ids as an int64 tensor (rows,) on the spec's device."""
        return sent(torch.tensor(self.row_ids, dtype=torch.int64), self.device)

    def select(self, index: Tensor) -> Spec:
        """Return the spec for the rows at `index` (r,), repeats allowed; these rows keep their row ids and places."""
        assert self.row_ids is not None
        chosen = [self.row_ids[i] for i in index.tolist()]
        places = None if self.places is None else [self.places[i] for i in index.tolist()]
        return replace(self, rows=len(chosen), row_ids=chosen, places=places)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict of the dtype and the fields that differ from their defaults, without the device."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        plain.pop("device", None)
        plain["dtype"] = str(self.dtype).removeprefix("torch.")
        plain |= {name: plain[name].as_dict() for name in ("rotation", "applied") if name in plain}
        if plain.get("row_ids") == tuple(range(self.rows)):
            del plain["row_ids"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any], device: str | torch.device = "cpu") -> Spec:
        turns: dict[str, Any] = {x: Rotation.from_dict(plain[x]) for x in ("rotation", "applied") if plain.get(x)}
        return cls(**(plain | {"dtype": DTYPES[plain["dtype"]], "device": device} | turns))
