"""Build the layers of a compressed cache from a model's configuration."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from kvfloor.core.exact import Exact
from kvfloor.hf.families import key_readers, layer_roles
from kvfloor.hf.layer import CompressedLayer, Meter
from kvfloor.hf.opener import Opening
from kvfloor.hf.passage import Passage
from kvfloor.hf.presence import Presence
from kvfloor.hf.ranks import ranks_of


def layers_served(config: PreTrainedConfig) -> int:
    """Count the layers of a model that a compressed cache compresses: those with attention over all tokens."""
    return sum(role != "own" for role, _ in layer_roles(config))


def watched_cache(config: PreTrainedConfig) -> tuple[Cache, list[CompressedLayer]]:
    """Return a cache that keeps every token exactly, and the list of its layers whose attention inputs can be recorded.

    These are the full-attention layers. To record, set one of two attributes of a layer to a function, which every
    later forward then calls with its queries, keys and values:
    record     is also given the scale and the softcap of logits, and returns nothing
    turn_back  is also given the tokens' positions, and returns the queries and keys to go on with
    """
    opening = Opening(Exact(), layers_served(config), ranks=ranks_of(config))
    cache = Cache(layers=cache_layers(config, opening, Meter(), Passage.of(config), Presence()))
    return cache, [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


def cache_layers(
    config: PreTrainedConfig, opening: Opening, meter: Meter, passage: Passage, presence: Presence
) -> list[Any]:
    """Return one cache layer per layer of the model.

    A layer with full attention gets kvfloor's class (`CompressedLayer`), or its variant with a linear state
    (`HybridLayer`) if it also has the state of a convolution or of linear attention. Every other layer gets
    transformers' own class. All layers of one cache share its settings (opening), byte counts (meter), record of how
    far a forward has got (passage) and list of pads (presence).
    """
    layers: list[Any] = []
    for i, ((role, theirs), readers) in enumerate(zip(layer_roles(config), key_readers(config), strict=False)):
        place = sum(isinstance(layer, CompressedLayer) for layer in layers)
        arguments = (opening, i, place, meter, passage, presence, readers)
        if role == "hybrid":
            from kvfloor.hf.hybrid import HybridLayer  # its base is younger than the oldest release served

            layers.append(HybridLayer(theirs.number_of_states, *arguments))
        else:
            layers.append(CompressedLayer(*arguments) if role == "full" else theirs)
    return layers
