"""Build the layers of a cache from a model's configuration: compressed ones, and transformers' own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from kvfloor.hf.families import key_readers, layer_roles
from kvfloor.hf.layer import CompressedLayer, Meter
from kvfloor.hf.opener import Opening


def layers_served(config: PreTrainedConfig) -> int:
    """Count the layers of a model that a kvfloor state serves."""
    return sum(role != "own" for role, _ in layer_roles(config))


def cache_layers(config: PreTrainedConfig, opening: Opening, meter: Meter) -> list[Any]:
    """Return one cache layer per layer of the model; those without full attention keep transformers' own class."""
    layers: list[Any] = []
    for i, ((role, theirs), readers) in enumerate(zip(layer_roles(config), key_readers(config), strict=False)):
        place = sum(isinstance(layer, CompressedLayer) for layer in layers)
        arguments = (opening, i, place, meter, readers)
        if role == "hybrid":
            from kvfloor.hf.hybrid import HybridLayer  # its base is younger than the oldest release served

            layers.append(HybridLayer(theirs.number_of_states, *arguments))
        else:
            layers.append(CompressedLayer(*arguments) if role == "full" else theirs)
    return layers
