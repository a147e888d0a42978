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
    """Return the number of layers that a `CompressedCache` compresses, in a model of this configuration.

    They are the layers with attention over all tokens.
    """
    return sum(role != "own" for role, _ in layer_roles(config))


def watched_cache(config: PreTrainedConfig) -> tuple[Cache, list[CompressedLayer]]:
    """Return a cache that keeps every token exactly, and the list of its layers whose attention inputs can be recorded.

    config: the configuration of the model that the cache is for. The listed layers are the full-attention ones. To
    record, set one of two attributes of a layer to a function. Every later forward then calls it with the layer's
    queries q, keys k and values v:
    record(q, k, v, scale, softcap, sink)   with the factor on q.k, the cap on logits (or None) and the sink logit of
                                            each query head (or None); returns nothing
    turn_back(q, k, v, positions)           with the tokens' positions; returns the queries and keys that attention then
                                            uses
    """
    opening = Opening(Exact(), layers_served(config), ranks=ranks_of(config))
    cache = Cache(layers=cache_layers(config, opening, Meter(), Passage.of(config), Presence()))
    return cache, [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


def cache_layers(
    config: PreTrainedConfig, opening: Opening, meter: Meter, passage: Passage, presence: Presence
) -> list[Any]:
    """Return one cache layer per layer of the model that has the configuration `config`.

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
