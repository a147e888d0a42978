"""Define the sizes of one attention layer of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Hold the sizes of one layer that attends to all tokens, or to those of a sliding window.

    layer   index in the model
    heads   kv heads; g: query heads per kv head
    d, dv   widths of a key and of a value
    tied    True if each token's value is its key, given as one tensor (latent attention)
    window  tokens of the sliding window; None: all
    """

    layer: int
    heads: int
    d: int
    dv: int
    g: int = 1
    tied: bool = False
    window: int | None = None
