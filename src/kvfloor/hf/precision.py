"""Convert keys and values to the one dtype that a layer keeps, whatever mixture torch.autocast makes.

Rotary keys come in float32 there and values in bfloat16. A state is opened in autocast's own dtype, in which
transformers' attention would compute; outside autocast in the dtype that holds the keys and the values without loss.
Later tokens are converted to the state's dtype: under autocast any of them, otherwise only where nothing is lost.
Answers come in autocast's dtype where it is on, otherwise in the query's.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def lowered(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast computes in now on the device of `x`; None if it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def settled(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Leave autocast, which would round what a state computes in a wider dtype on purpose."""
    return torch.autocast(x.device.type, enabled=False)


def one_dtype(
    held: torch.dtype | None, lower: torch.dtype | None, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value in the dtype `held`; if that is None, in the dtype to open a state in.

    `lower` is autocast's dtype, None if it is off. Keys that are their values stay one tensor. Raises ValueError
    outside autocast where the held dtype would round.
    """
    given = torch.promote_types(key.dtype, value.dtype)
    dtype = held or lower or given
    if query.dtype == key.dtype == value.dtype == dtype:
        return query, key, value
    if lower is None and torch.promote_types(dtype, given) != dtype:
        raise ValueError(
            f"this cache holds {dtype} and would round keys and values that come in {given}: go on under "
            f"torch.autocast, if it was filled there, or with the model's dtype as it was, or start a new cache"
        )
    keys = key.to(dtype)
    return query.to(dtype), keys, keys if value is key else value.to(dtype)
