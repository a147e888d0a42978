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
import transformers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, eager_mask, sdpa_mask

from kvfloor.hf import latent
from kvfloor.hf.families import ignores_the_interface, own_cache_class, refusal
from kvfloor.hf.layer import CompressedLayer
from kvfloor.hf.positions import table_room

NAME = "kvfloor"
EVERY = slice(None)
_before: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()
_prepared: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # now or earlier: their caches can be saved


class LazyMask:
    """What the mask function returns: the rule and the padding, made into a mask only for stock caches."""

    def __init__(self, arguments: dict[str, Any], queries: slice = EVERY) -> None:
        self._arguments = arguments
        self._queries = queries
        self._built: dict[Any, Tensor | None] = {}
        self._plain: bool | None = None

    def __getitem__(self, index: tuple[slice, slice, slice, slice]) -> LazyMask:
        """The mask of some queries alone: mask[:, :, queries, :], as the layers without keys of their own cut it."""
        batch, heads, queries, keys = index
        if (batch, heads, keys) != (EVERY, EVERY, EVERY) or self._queries != EVERY:
            raise ValueError(f"a mask of kvfloor can be cut along its queries once, not by {index}")
        return LazyMask(self._arguments | {"allow_is_causal_skip": False}, queries)

    @property
    def plainly_causal(self) -> bool:
        """Whether each token sees all before it and nothing else, padding apart.

        A rule that adds to this, such as images whose tokens see each other, may add nothing for the tokens at hand:
        both rules are written out then, once for all layers.
        """
        if self._arguments.get("mask_function", causal_mask_function) is causal_mask_function:
            return True
        if self._plain is None:
            unpadded: dict[str, Any] = self._arguments | {"attention_mask": None, "allow_is_causal_skip": False}
            its_own: Any = sdpa_mask(**unpadded)
            unpadded["mask_function"] = causal_mask_function
            plain: Any = sdpa_mask(**unpadded)
            self._plain = bool((its_own == plain).all())
        return self._plain

    @property
    def padding(self) -> Tensor | None:
        """Bool (batch, slots seen and new), True where a token is real; None if all are."""
        return self._arguments.get("attention_mask")

    def build(self, form: Callable[..., Tensor | None]) -> Tensor | None:
        """The mask that transformers' own attention of this form would have got; made once for all layers."""
        if form not in self._built:
            mask = form(**self._arguments)
            self._built[form] = None if mask is None else mask[:, :, self._queries, :]
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
    answer: Any = _latent if hasattr(module, "expand_kv") else _stock
    if CompressedLayer.of(key) is not None:
        answer = _compressed
    if answer is not _stock and torch.compiler.is_compiling():
        answer = torch.compiler.disable(answer)
    return answer(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


class _NoGradient(torch.autograd.Function):
    """Pass the first argument on, as if it depended on all others, and refuse to go back."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor | None) -> Tensor:
        del ctx, sources
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("a compressed cache has no gradient: train with a stock cache, or without one")


def _latent(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of a module that makes its keys of what `update` returned: of a compressed layer, or stock."""
    pair = latent.awaited()
    layer = None if pair is None else CompressedLayer.of(pair[0])
    if pair is None or layer is None or layer.index != module.layer_idx:
        return _stock(module, query, key, value, mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    expansion = latent.expansion(module, pair[0], key, value)
    asking, asked = latent.absorbed(expansion, query, *pair)
    out = _answered(layer, module, asking, asked, asked, mask, scale, **kwargs)
    return latent.values(expansion, out, value.shape[-1]), None


def _compressed(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention that a compressed layer answers; outside what torch.compile traces, which would trace every block."""
    layer = CompressedLayer.of(key)
    assert layer is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _answered(layer, module, query, key, value, mask, scale, **kwargs), None


def _answered(
    layer: CompressedLayer,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scale: float,
    **kwargs: Any,
) -> Tensor:
    """The layer's answer (B, n, H, dv), once the rules of this call are found to be ones that it follows."""
    padding = None
    if isinstance(mask, LazyMask):
        if not mask.plainly_causal:
            raise ValueError("a compressed layer follows the plain causal rule; this model's mask adds to it")
        padding = mask.padding
    elif mask is not None:
        raise ValueError("a compressed layer needs the 2-d attention mask (batch, tokens), not a ready 4-d one")
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a bias by position to its logits, which a compressed layer cannot: it "
            f"keeps keys, not a bias for every pair; use a stock cache with this model"
        )
    if kwargs.get("is_causal") is False:
        raise ValueError(f"{type(module).__name__} looks ahead; a compressed layer answers from what came before")
    law = (scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    out = layer.answer(query, key, value, padding, *law, kwargs.get("position_ids"))
    if layer.served_by is None:
        layer.room = table_room(owner(module))
    layer.served_by = weakref.ref(module)
    sources = [x for x in (query, key, value, kwargs.get("s_aux")) if x is not None and x.requires_grad]
    return _NoGradient.apply(out, *sources) if sources and torch.is_grad_enabled() else out


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
    if ignores_the_interface(model):
        raise ValueError(
            f"{type(model).__name__} ignores transformers' attention interface, so its cache cannot be compressed "
            f"from outside; families such as Llama, Mistral, Qwen or Gemma honour it"
        )
    reason = refusal(model.config)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot have a compressed cache: {reason}")
    own = own_cache_class(model)
    if own is not None:
        raise ValueError(
            f"{type(model).__name__} fills a cache class of its own, {own}, so that no other cache can take its place "
            f"in transformers {transformers.__version__}; newer releases have dropped most such classes"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lazy_mask)
    _prepared.add(model)
    if model.config._attn_implementation != NAME:
        _before[model] = model.config._attn_implementation or "eager"
        model.set_attn_implementation(NAME)
    return model


def is_prepared(model: object) -> bool:
    """Whether this is a transformers model that works with a `CompressedCache` now."""
    return isinstance(model, PreTrainedModel) and model in _prepared and model.config._attn_implementation == NAME


def owner(module: torch.nn.Module | None) -> PreTrainedModel | None:
    """The prepared model that `module` is a part of, the whole one if it was prepared in parts; None if it is gone."""
    holders = [model for model in _prepared if module is not None and any(part is module for part in model.modules())]
    return max(holders, key=lambda model: sum(1 for _ in model.modules()), default=None)


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `prepare`: select the attention that was selected before. Does nothing if it was not prepared."""
    if model in _before:
        model.set_attn_implementation(_before.pop(model))
    return model
