"""Work with a device without waiting for it: send small tensors there, and turn masks to indices of a fixed shape.

Counts of tokens live on the host, i.e. on the CPU, and keys and values on the device of the cache. The host waits for a
device where it reads a number from there, where a shape depends on numbers there, and in a copy that is not marked as
`non_blocking`. On a CPU nothing here waits or copies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SENT_EVERY = 16
"""Decoded tokens from one report of a device to the host, on whether all were finite, to the next (`FiniteWatch`)."""


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """Return the host's tensor x on `device`, without waiting for the device; x itself if it is there already."""
    return x.to(device, non_blocking=True)


def sent_index(mask: Tensor, device: torch.device | str) -> Tensor:
    """Return, on `device`, the indices of the True entries of the host's mask, counted as if it had one axis."""
    return sent(mask.flatten().nonzero().squeeze(1), device)


def first_marked(mask: Tensor, most: int) -> Tensor:
    """Return the indices (r, most), ascending, of the first `most` <= s True entries in each row of mask (r, s).

    Where a row has fewer True entries, the rest of its indices is s. The shape does not depend on the mask's entries.
    """
    width = mask.shape[1]
    from_the_end = torch.where(mask, torch.arange(width, 0, -1, device=mask.device), 0)
    return width - from_the_end.topk(most, dim=1).values


class FiniteWatch:
    """Record on a device whether tensors had NaN or infinite entries, and tell the host without letting it wait.

    `total` on the device is 0, or NaN for good once an entry was not finite. Every SENT_EVERY calls of `add` it is sent
    to `told`, which lies on the host: 0 until a report of a NaN has arrived there.
    """

    def __init__(self, device: torch.device) -> None:
        pinned = device.type == "cuda" and torch.cuda.is_available()  # only then does a copy to the host not wait
        self.total = torch.zeros((), device=device)
        self.told = torch.zeros((), pin_memory=pinned)
        self.added = 0

    def add(self, *tensors: Tensor) -> None:
        """Take tensors of one dtype into account, on their device."""
        entries = torch.cat([x.reshape(-1) for x in tensors])
        self.total.add_(entries.mul_(0).sum())  # 0 times a NaN or an infinity is NaN
        self.added += 1
        if self.added % SENT_EVERY == 0:
            self.told.copy_(self.total, non_blocking=True)

    def told_finite(self) -> bool:
        """Return False if the reports that have arrived say that an entry was not finite; do not wait for others."""
        return math.isfinite(self.told.item())

    def finite(self) -> bool:
        """Return True if all entries so far were finite; wait for the device."""
        return math.isfinite(self.total.item())
