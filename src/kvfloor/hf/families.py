"""Decide which layers of a model are compressed, and which model families are refused, with the reason.

A compressed layer is one whose keys and values kvfloor compresses, by evicting tokens for example. A family is refused
if its models use their cache or their attention in a way that a compressed cache cannot follow. `config` is the
configuration of the whole model, as in `model.config`; of a model with several parts, such as images and text, the text
decoder's layers count.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

# full    attention over all tokens: compressed
# hybrid  such attention beside a linear or convolution state in one layer: compressed, the other state kept
# own     sliding, chunked, linear, convolution, or no keys at all: transformers' own layer
Role = Literal["full", "hybrid", "own"]

# The layer types that the cache of every release supports.
_SINCE_THE_FIRST = ("full_attention", "sliding_attention", "chunked_attention")

_BIAS = "it adds a bias by position to its logits, for every pair of tokens"
_IMAGES = "its layers that look at images keep those in the same cache, and they are no stream of tokens"
_MASK_OF_ITS_OWN = "it makes an additive mask of its own for every pair of tokens, which a bounded state cannot follow"
REFUSED: dict[str, str] = {  # families that use the attention registry but cannot be served, by model_type
    "blt": "it keeps several caches, for its bytes and for the patches between them, in one model",
    "cpmant": _BIAS,
    "diffllama": "it asks for every key twice, each time with one half of the values",
    "doge": _MASK_OF_ITS_OWN,
    "git": _MASK_OF_ITS_OWN,
    "inkling2_text": _BIAS,
    "inkling_text": _BIAS,
    "jetmoe": "it repeats its keys for its experts only after the cache has returned them",
    "mllama": _IMAGES,
    "mllama_text_model": _IMAGES,
}


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Return the type of each decoder layer, such as "full_attention" or "sliding_attention".

    A layer that has no keys of its own and attends to those of an earlier layer has the type "dummy".
    """
    decoder = config.get_text_config(decoder=True)
    try:
        from transformers.cache_utils import get_layer_types_and_kwargs
    except ImportError:  # until transformers 5.3
        declared = getattr(decoder, "layer_types", None) or ["full_attention"] * decoder.num_hidden_layers
        shared = getattr(decoder, "num_kv_shared_layers", 0)
        return [*declared[: len(declared) - shared], *["dummy"] * shared]
    return get_layer_types_and_kwargs(decoder)[0]


def layer_roles(config: PreTrainedConfig) -> list[tuple[Role, Any]]:
    """Return a pair (role, layer) per cache layer; `layer` is the empty layer that transformers' own cache has there.

    The role is "full" for attention over all tokens, which is compressed. It is "hybrid" for such attention beside a
    linear or convolution state in the same layer, and "own" for a layer that is left to transformers' own class.
    Raises ValueError naming the family and the reason where a compressed cache cannot serve it.
    """
    reason = refusal(config)
    if reason is not None:
        raise ValueError(f"{config.model_type} models cannot have a compressed cache: {reason}")
    roles: list[tuple[Role, Any]] = []
    for kind, layer in zip(layer_types(config), DynamicCache(config=config).layers, strict=False):
        if kind not in _SINCE_THE_FIRST and type(layer) is DynamicLayer:
            raise ValueError(
                f"transformers {transformers.__version__} has no cache layer of the type {kind!r} that "
                f"{config.model_type} models need: install a newer release"
            )
        plain = kind == "full_attention" and type(layer) is DynamicLayer
        roles.append(("full" if plain else "hybrid" if kind == "hybrid" else "own", layer))
    if all(role == "own" for role, _ in roles):
        raise ValueError(f"{type(config).__name__} has no full-attention layer: there is nothing to compress")
    return roles


def key_readers(config: PreTrainedConfig) -> list[int]:
    """Return, for each layer, the number of later layers that attend to this layer's keys (Gemma 3n, Gemma 4).

    Those later layers have no keys of their own. In most models the number is 0 for every layer.
    """
    decoder = config.get_text_config(decoder=True)
    types = layer_types(config)
    declared = getattr(decoder, "layer_types", None) or types
    readers = [0] * len(types)
    for layer in range(len(types)):
        if types[layer] == "dummy" and declared[layer] in _SINCE_THE_FIRST:
            readers[max(i for i in range(layer) if types[i] == declared[layer])] += 1
    return readers


def refusal(config: PreTrainedConfig) -> str | None:
    """Return the reason why a compressed cache cannot serve models of this configuration; None if it can.

    The reason is about the family as a whole. `layer_roles` checks the layers one by one.
    """
    if _picks_tokens(config.get_text_config(decoder=True)):
        return (
            "its attention is sparse (DSA): an indexer with keys of its own in the cache picks the tokens that each "
            "query may read, and it would pick among those that have left"
        )
    if any("sparse" in kind for kind in _declared(config)):
        return (
            "some of its layers are sparse: they make a mask of the blocks that each query may read, and only where "
            "transformers' own attention is selected"
        )
    return REFUSED.get(config.model_type)


def _declared(config: PreTrainedConfig) -> list[str]:
    declared = getattr(config.get_text_config(decoder=True), "layer_types", None)
    return list(declared) if isinstance(declared, (list, tuple)) else []


def _picks_tokens(decoder: PreTrainedConfig) -> bool:
    try:
        return bool(getattr(decoder, "index_topk", None))
    except RuntimeError:  # transformers raises one where a field varies from layer to layer
        return True


def ignores_the_interface(model: nn.Module) -> bool:
    """Return True if no submodule of this model takes its attention function from transformers' registry of them.

    kvfloor registers its own attention function there. A model that takes none from there would never call it.
    """
    return not any(hasattr(sys.modules[type(part).__module__], "ALL_ATTENTION_FUNCTIONS") for part in model.modules())


def own_cache_class(model: nn.Module | type[nn.Module]) -> str | None:
    """Return the name of the cache class defined in the Python file of this model's class; None if there is none.

    Such a model fills only that class, so a compressed cache cannot take its place.
    """
    module = sys.modules[(model if isinstance(model, type) else type(model)).__module__]
    made_there = [name for name, thing in vars(module).items() if name.endswith("Cache") and isinstance(thing, type)]
    return next((name for name in made_there if vars(module)[name].__module__ == module.__name__), None)
