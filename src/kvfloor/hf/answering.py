"""Define what kvfloor's attention function needs of a cache layer, and mark the keys that such a layer returns.

The model passes a forward's keys and values to the layer's `update`, and what `update` returns to the attention
function. The function recognises the layer by a mark on the keys, and lets the layer compute the attention.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvfloor.hf.masks import LazyMask
    from kvfloor.hf.opener import Opening

_TAG = "kv_layer"  # the attribute by which a key tensor names its layer


class AnsweringLayer(Protocol):
    """Compute the attention of one layer of a model, from a memory of its own.

    index      index of the layer in the model
    place      index of the layer among those of its kind; what holds for a whole forward is checked in layer 0 of them
    opening    settings of the cache that the layer belongs to
    served_by  the attention module that called the layer last; None before the first call
    room       number of positions in the model's learned position table; None without one
    """

    index: int
    place: int
    opening: Opening
    served_by: weakref.ref[torch.nn.Module] | None
    room: int | None

    def expect(self, batch: int) -> None:
        """Raise ValueError unless the layer is empty or holds `batch` batch items."""

    def refuse_rule(self, mask: LazyMask) -> None:
        """Raise ValueError if the mask has another rule than the layer follows."""

    def unstage(self) -> None:
        """Undo an `update` that was not followed by `answer`."""

    def answer(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        scale: float,
        softcap: float | None,
        sink: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the attention output (B, n, H, dv) of the queries (B, H, n, d) of a forward."""
        ...


def marked(keys: Tensor, layer: AnsweringLayer) -> Tensor:
    """Return a view of `keys`, a tensor object of its own, that leads to the layer; see `layer_of`."""
    view = keys.view_as(keys)
    setattr(view, _TAG, weakref.ref(layer))
    return view


def layer_of(keys: Tensor) -> AnsweringLayer | None:
    """Return the layer whose `update` returned this key tensor; None if it came from another kind of cache."""
    reference = getattr(keys, _TAG, None)
    return None if reference is None else reference()
