"""`prepare(model)`: the attention function that answers from a compressed layer, and exactly from any other cache.

Nothing is patched: transformers' own registries get one attention and one mask function, and the model selects
them by name. `restore(model)` selects what was selected before.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, eager_mask, sdpa_mask

from kvfloor.hf.layer import CompressedLayer

NAME = "kvfloor"
_before: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()


class LazyMask:
    """What the mask function returns: the rule and the padding, made into a mask only for stock caches."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._built: dict[Any, Tensor | None] = {}

    @property
    def plainly_causal(self) -> bool:
        return self._arguments.get("mask_function", causal_mask_function) is causal_mask_function

    @property
    def padding(self) -> Tensor | None:
        """Bool (batch, slots seen and new), True where a token is real; None if all are."""
        return self._arguments.get("attention_mask")

    def build(self, form: Callable[..., Tensor | None]) -> Tensor | None:
        """The mask that transformers' own attention of this form would have got; made once for all layers."""
        if form not in self._built:
            self._built[form] = form(**self._arguments)
        return self._built[form]


def lazy_mask(*args: Any, **kwargs: Any) -> LazyMask:
    """The mask function in transformers' registry."""
    if args:
        raise TypeError("this transformers release passes mask arguments by position; kvfloor supports 5.2 and newer")
    return LazyMask(kwargs)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function in transformers' registry: query (B, H, n, d) -> (B, n, H, dv)."""
    layer = CompressedLayer.of(key)
    if layer is None:
        return _stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    padding = None
    if isinstance(attention_mask, LazyMask):
        if not attention_mask.plainly_causal:
            raise ValueError("a compressed layer follows the plain causal rule; this model's mask adds to it")
        padding = attention_mask.padding
    elif attention_mask is not None:
        raise ValueError("a compressed layer needs the 2-d attention mask (batch, tokens), not a ready 4-d one")
    if kwargs.get("s_aux") is not None:
        raise ValueError("models with sink logits (s_aux) are not supported by compressed layers yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.answer(query, key, value, padding, scale, kwargs.get("softcap"))
    return out.transpose(1, 2).contiguous(), None


def _stock(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """Attention over a stock cache: transformers' sdpa, or the family's own eager form where sdpa cannot follow it."""
    plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    if isinstance(mask, LazyMask):
        mask = mask.build(sdpa_mask if plain else eager_mask)
    if plain:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` work with a `CompressedCache`; it stays exact with every other cache. Returns the model.

    Raises TypeError for what is no transformers model and ValueError for a family that ignores the attention
    interface (its attention cannot be reached from outside).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"prepare needs a transformers model, got {type(model).__name__}")
    if not model._supports_attention_backend:
        raise ValueError(
            f"{type(model).__name__} ignores transformers' attention interface, so its cache cannot be compressed "
            f"from outside; families such as Llama, Mistral, Qwen or Gemma honour it"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lazy_mask)
    if model.config._attn_implementation != NAME:
        _before[model] = model.config._attn_implementation or "eager"
        model.set_attn_implementation(NAME)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `prepare`: select the attention that was selected before. Does nothing if it was not prepared."""
    if model in _before:
        model.set_attn_implementation(_before.pop(model))
    return model
