"""Find the sizes of a model's weights and of its cache from the configuration alone, on torch's meta device.

The meta device computes the shapes of tensors, and neither stores nor computes any number. So a forward of the model
shows the keys, values and linear-attention states of every layer, as the model itself makes them, without weights and
in little time. A compressed layer is a cache layer whose keys and values kvfloor compresses. In shapes, B is the batch,
H and Hkv the numbers of query heads and kv heads, n the number of tokens. All sizes are of the whole model, not of one
process's part of a sharded model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvfloor.core.exact import Exact
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.families import layer_roles, layer_types
from kvfloor.hf.layer import CompressedLayer
from kvfloor.hf.layer_shape import LayerShape
from kvfloor.hf.prepare import prepare

_TOKENS = 2  # of the forward; more would change no shape but the number of tokens


@dataclass(frozen=True)
class ModelShape:
    """Hold the sizes of a model of one dtype and of its cache for one batch.

    parameters   number of entries in the weights; tied weights count once
    compressed   the layers that a compressed cache compresses: those with attention over all tokens
    windows      the layers with a sliding window, which transformers' own classes keep
    own_bytes    function of the number of tokens fed: the bytes that transformers' own classes then keep for the batch
                 (sliding windows, convolution and linear states)
    """

    parameters: int
    compressed: tuple[LayerShape, ...]
    windows: tuple[LayerShape, ...]
    own_bytes: Callable[[int], int]


def model_shape(config: PreTrainedConfig, dtype: torch.dtype, batch: int = 1) -> ModelShape:
    """Return the sizes of the causal language model of this configuration, with weights and cache of `dtype`.

    batch: the number of requests that share the cache. Raises ValueError for a configuration that no model can be built
    from, for a family that a compressed cache cannot serve, and for a model that keeps no keys. Raises it also if the
    model cannot run on the meta device because its forward reads numbers from tensors.
    """
    model = _built(config, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _refuse_encoder(model)
    prepare(model)
    with suppress(Exception):  # some configurations insist on a number
        model.config.pad_token_id = None  # else a forward without a mask searches its tokens for pads
    found: dict[int, LayerShape] = {}
    try:
        cache = CompressedCache(model.config, Exact())
        for layer in cache.compressed:
            layer.answer = _recorder(layer, found)  # type: ignore[method-assign]
        with torch.no_grad():
            tokens = torch.zeros(batch, _TOKENS, dtype=torch.int64, device="meta")
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
    except ValueError:
        raise
    except Exception as cause:  # a model's own code may raise any exception
        raise ValueError(
            f"the sizes of a {config.model_type} model's cache cannot be found without its weights: "
            f"{type(cause).__name__}: {str(cause)[:200]}"
        ) from cause
    if len(found) != len(cache.compressed):
        raise ValueError(
            f"{type(model).__name__} gave the keys of {len(found)} of {len(cache.compressed)} layers to its cache, so "
            "the cache's sizes are not known"
        )
    kinds = layer_types(model.config)
    windows = [
        _windowed(i, layer) for i, layer in enumerate(cache.layers) if kinds[i] == "sliding_attention" and _keyed(layer)
    ]
    return ModelShape(parameters, tuple(found.values()), tuple(windows), _own_bytes(model.config, cache))


def _built(config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except Exception as cause:  # a configuration's sizes may contradict each other in any way
        line = str(cause).strip().split("\n")[0]
        raise ValueError(
            f"no causal language model can be built from this {config.model_type} configuration: "
            f"{type(cause).__name__}: {line}"
        ) from cause
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the one without a loop over the experts that were chosen
    return model


def _refuse_encoder(model: Any) -> None:
    """Raise ValueError for a model that attends to later tokens: it has no cache."""
    looks_ahead = any(getattr(part, "is_causal", None) is False for part in model.modules())
    if looks_ahead and getattr(model.config, "is_decoder", None) is False:
        raise ValueError(
            f"this {model.config.model_type} configuration is an encoder's, which attends to later tokens and keeps no "
            "cache: a decoder's has is_decoder true"
        )


def _recorder(layer: CompressedLayer, found: dict[int, LayerShape]) -> Callable[..., Tensor]:
    """Return a substitute for `layer.answer`, the method by which a compressed layer computes attention.

    The substitute records the layer's shapes in `found`, by the layer's index, and returns an output of the right shape
    whose numbers are not computed. A call without new keys since the last call is not recorded: its queries belong to a
    later layer of the model that shares this layer's keys.
    """

    def answer(query: Tensor, key: Tensor, value: Tensor, *others: Any, **more: Any) -> Tensor:
        del others, more
        batch, heads, n, d = query.shape
        if heads % key.shape[1]:
            raise ValueError(f"{heads} query heads cannot share {key.shape[1]} kv heads evenly: mend the configuration")
        if layer.staged_bytes:
            sizes = (key.shape[1], d, value.shape[-1], heads // key.shape[1], value is key)
            found[layer.index] = LayerShape(layer.index, *sizes)
            layer.unstage()
        return query.new_empty(batch, n, heads, value.shape[-1])

    return answer


def _keyed(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), Tensor)


def _windowed(index: int, layer: Any) -> LayerShape:
    heads, d, dv = layer.keys.shape[1], layer.keys.shape[-1], layer.values.shape[-1]
    return LayerShape(index, heads, d, dv, window=layer.sliding_window)


def _own_bytes(config: PreTrainedConfig, cache: CompressedCache) -> Callable[[int], int]:
    """Return a function of the number of tokens fed: the bytes that transformers' own layers then hold.

    config: the model's configuration. cache: a cache that a forward of this model has filled; the bytes are for its
    batch size. Linear and convolution states are counted as they are in `cache`: their size does not depend on the
    number of tokens. For a layer with keys, the function feeds all tokens to an empty layer of this configuration on
    the meta device: all but the last one in one step, as a prompt, and the last one in a second step. Until this second
    step, a sliding window's tensors would be views of the whole prompt's keys and values, and count as many bytes as
    these.
    """
    fixed = 0
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer):
            fixed += _storage([getattr(layer, name) for name in layer.beside])
        else:
            fixed += _storage([x for name, x in vars(layer).items() if name not in ("keys", "values")])
    others: list[tuple[int, Any]] = [
        (i, layer) for i, layer in enumerate(cache.layers) if not isinstance(layer, CompressedLayer)
    ]
    keyed = [(i, layer.keys, layer.values) for i, layer in others if _keyed(layer)]

    def after(tokens: int) -> int:
        total, fresh = fixed, layer_roles(config)
        for i, keys, values in keyed:
            layer = fresh[i][1]
            for n in (tokens - 1, 1) if tokens > 1 else (1,):
                layer.update(*(x.new_empty(*x.shape[:2], n, x.shape[-1]) for x in (keys, values)))
            total += _storage([layer.keys, layer.values])
        return total

    return after


def _storage(values: list[Any]) -> int:
    """Return the bytes of the storages of these tensors, and of the tensors in these dicts, each storage once.

    Other values count as 0 bytes.
    """
    flat = [x for value in values for x in (value.values() if isinstance(value, dict) else [value])]
    storages = [x.untyped_storage() for x in flat if isinstance(x, Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
