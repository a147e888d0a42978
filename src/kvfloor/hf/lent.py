"""Hold the keys and values that a layer shares with later layers, for the duration of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LentKeys(dict[int, Any]):
    """Map a layer to its (keys, values), and drop the entry once every later layer that shares them has read it.

    It takes the place of the dict `shared_layers`, an attribute of the cache in which a model leaves keys and values
    for later layers (Gemma 3n, until transformers 5.3). A plain dict would hold a whole prompt's keys and values,
    evicted ones too, until the next forward.
    """

    def __init__(self, readers: Sequence[int]) -> None:
        """Build an empty map. readers: for each layer of the model, the number of later layers that read its keys."""
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
        """Leave the entries out of a copy or pickle: outside a forward there are none."""
        return type(self), (self._readers,)
