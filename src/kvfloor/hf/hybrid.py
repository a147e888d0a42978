"""Put a compressed layer beside a linear or convolution state in one model layer (Falcon-H1, Zamba, Zaya)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from kvfloor.hf.layer import CompressedLayer


class HybridLayer(CompressedLayer, LinearAttentionAndFullAttentionLayer):
    """Give the attention's keys and values to the compressed half, everything else to transformers' linear half.

    transformers distinguishes layers by their class, so that this class must derive from both. Each method is passed
    to exactly one half, or to both.
    """

    def __init__(self, states: int, *args: Any) -> None:
        """Build both halves; `states` counts the convolution and recurrent states that the model keeps in this layer.

        The other arguments are those of `CompressedLayer`.
        """
        CompressedLayer.__init__(self, *args)
        LinearAttentionLayer.__init__(self, number_of_states=states)
        self.beside = tuple(vars(LinearAttentionLayer(number_of_states=states)))

    def lazy_initialization(self, *keys_and_values: Tensor, **linear: Any) -> None:
        if linear:
            LinearAttentionLayer.lazy_initialization(self, **linear)
        else:
            CompressedLayer.lazy_initialization(self, *keys_and_values)

    def reset(self) -> None:
        CompressedLayer.reset(self)
        LinearAttentionLayer.__init__(self, number_of_states=self.number_of_states)

    def batch_select_indices(self, indices: Tensor) -> None:
        CompressedLayer.batch_select_indices(self, indices)
        LinearAttentionLayer.reorder_cache(self, indices)  # pyright: ignore[reportArgumentType]: int64 is what it takes
