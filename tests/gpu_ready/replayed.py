"""Record the operations of a call on a CPU and replay them as a CUDA graph does: same addresses, same host numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Record every operation with its arguments and its result; `replay` repeats them into the same results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self.calls:
                read = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
                now = func(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage()._cdata not in read:  # a view is there already
                        old.copy_(new)


def recorded(work: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
    """Record the operations of `work`, as `capture_cuda` does on a device."""
    recording = Recording()
    with recording:
        out = work()
    return recording, out
