"""Keys and values that a layer lends to later ones within a forward, where transformers keeps them on the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LentKeys(dict[int, Any]):
    """Hold the `shared_layers` of a cache until the last layer that reads them (Gemma 3n, until transformers 5.3).

    A plain dict would hold a whole prompt's keys and values, evicted ones too, until the next forward.
    """

    def __init__(self, readers: Sequence[int]) -> None:
        """readers: for each layer, how many later ones read its keys."""
        super().__init__()
        self._readers = tuple(readers)
        self._left: dict[int, int] = {}

    def __setitem__(self, layer: int, pair: Any) -> None:
        self._left[layer] = self._readers[layer]
        super().__setitem__(layer, pair)

    def __getitem__(self, layer: int) -> Any:
        pair = super().__getitem__(layer)
        self._left[layer] -= 1
        if self._left[layer] <= 0:
            del self[layer]
        return pair

    def __reduce__(self) -> Any:
        """Copies and pickles get none: nothing is lent outside a forward."""
        return type(self), (self._readers,)
