"""Convert queries, keys and values to the one dtype that a layer stores, also under torch.autocast.

Under autocast, rotary keys come in float32 and values in bfloat16. A layer then stores autocast's own dtype, in which
transformers' attention would compute. Without autocast it stores the dtype that holds both keys and values without
loss. Later tokens are converted to the stored dtype. Under autocast this may round them; without it, keys or values
that would be rounded raise ValueError. Attention outputs have autocast's dtype if it is on, otherwise the query's.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def lowered(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which torch.autocast computes on the device of `x` now; None if it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def settled(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that turns torch.autocast off on the device of `x`.

    A layer's attention deliberately computes in a wider dtype, which autocast would narrow.
    """
    return torch.autocast(x.device.type, enabled=False)


def one_dtype(
    held: torch.dtype | None, lower: torch.dtype | None, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value in one dtype: the one that a layer already stores, or the one that it will store.

    held: the stored dtype, None if the layer is empty. lower: autocast's dtype, None if it is off. If key and value
    are the same tensor, so are those returned. Outside autocast, raises ValueError if keys or values would be rounded.
    """
    if query.dtype == key.dtype == value.dtype == (held or lower or key.dtype):
        return query, key, value
    given = torch.promote_types(key.dtype, value.dtype)
    dtype = held or lower or given
    if lower is None and torch.promote_types(dtype, given) != dtype:
        raise ValueError(
            f"this cache holds {dtype} and would round keys and values that come in {given}: go on under "
            f"torch.autocast, if it was filled there, or with the model's dtype as it was, or start a new cache"
        )
    keys = key.to(dtype)
    return query.to(dtype), keys, keys if value is key else value.to(dtype)
