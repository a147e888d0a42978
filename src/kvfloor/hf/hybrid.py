"""Define the cache layer for model layers with attention beside a linear state (Falcon-H1, Zamba, Zaya).

A linear state is the state, of fixed size, of linear attention or of a state-space model such as Mamba.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from kvfloor.hf.layer import CompressedLayer


class HybridLayer(CompressedLayer, LinearAttentionAndFullAttentionLayer):
    """Compress the attention's keys and values, and keep the layer's linear or convolution state as transformers does.

    transformers distinguishes cache layers by their class, so this class derives from both: kvfloor's layer
    (`CompressedLayer`) and transformers' linear layer. Each Python method here calls the method of the same name of one
    base class, or of both.
    """

    def __init__(self, states: int, *args: Any) -> None:
        """Build the empty cache layer of one model layer.

        states   number of convolution and recurrent states that the model keeps in this layer
        args     the arguments of a `CompressedLayer`, in this order: settings of the cache, index of the layer in the
                 model, index among the compressed layers, byte counts, record of how far a forward has got, list of
                 pads, and number of later layers that attend to this layer's keys
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
