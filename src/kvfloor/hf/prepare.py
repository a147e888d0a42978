"""Make a model use kvfloor's attention function, which works with a compressed cache and with every other cache.

A compressed cache has compressed layers: each stores the keys and values of a model's layer in compressed form, for
example by evicting tokens, and computes that layer's attention itself.
Nothing is patched. For each attention that a part of the model had selected, such as "sdpa", an attention function and
a mask function are added to transformers' own registries. The model's configuration then names them instead of the
earlier attention. With a compressed cache, the cache's layers compute the attention; with any other cache, the earlier
attention does. `restore(model)` selects the earlier attention again.
In arguments, `module` is the model's attention module; `call` is the arguments that the module passed beyond query,
key, value, mask and scaling, by name. A mask is a tensor, or a `LazyMask`: an object that holds the 2-d attention mask
and builds the 4-d tensor only if it is used. In shapes, B is the batch, H the number of query heads, n the number of
tokens, d and dv the widths of a key and a value.
"""

from __future__ import annotations

import sys
import weakref
from functools import partial
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from kvfloor.hf import latent, selection
from kvfloor.hf.answering import AnsweringLayer, layer_of
from kvfloor.hf.families import ignores_the_interface, own_cache_class, refusal
from kvfloor.hf.masks import LazyMask, mask_over
from kvfloor.hf.positions import table_room
from kvfloor.hf.ranks import ALONE, ranks_of
from kvfloor.hf.wrappers import refuse_own_cache, unwrapped

try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:  # until transformers 5.3 or so: there the argument alone requests weights
    _collector = None

Model = TypeVar("Model", bound=torch.nn.Module)
_prepared: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # now or earlier: their caches can be saved


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    over: str = "sdpa",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return attention of queries (B, H, n, d) as (B, n, H, dv), and the attention weights or None.

    This is the function that transformers calls. If a compressed layer returned the keys (it marks them), that layer
    computes the attention, and the weights are None. For other keys, the attention `over` that the model had selected
    before computes it; weights are returned if they are requested and the family's eager attention returns them.

    key, value      those to attend to: with a compressed layer the forward's new ones, else all so far
    attention_mask  a `LazyMask`, a 4-d tensor, or None without a mask
    scaling         factor on q.k, d**-0.5 if None
    dropout         share of weights that the earlier attention sets to 0; a compressed layer ignores it
    kwargs          further arguments of transformers' attention functions
    """
    answer: Any = _compressed
    if layer_of(key) is None:
        answer = _latent if hasattr(module, "expand_kv") else _stock
    if answer is not _stock and torch.compiler.is_compiling():
        answer = torch.compiler.disable(answer)
    kwargs |= {"scaling": scaling, "dropout": dropout, "over": over}
    return answer(module, query, key, value, attention_mask, **kwargs)


class _NoGradient(torch.autograd.Function):
    """Mark an attention output, so that a backward pass that reaches it raises RuntimeError.

    Called with the output and the inputs that require a gradient (query, key, value, sinks), it returns the output
    unchanged. The result depends on these inputs in the autograd graph. Otherwise a backward pass would stop at the
    output without an error.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, *sources: Tensor | None) -> Tensor:
        del ctx, sources
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError("a compressed cache has no gradient: train with a stock cache, or without one")


def _latent(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output (B, n, H, dv) of a latent-attention module (MLA), and its weights or None.

    Such a module computes its keys from latents that a cache returned. If the latents come from a compressed layer,
    that layer computes the attention; otherwise the attention selected before kvfloor's does. scaling: the factor on
    q.k, None for d**-0.5.
    """
    pair = latent.newest_update()
    layer = None if pair is None else layer_of(pair[0])
    if pair is None or layer is None or layer.index != module.layer_idx:
        return _stock(module, query, key, value, mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    expansion = latent.expansion(module, pair[0], key, value)
    asking, asked = latent.absorbed(expansion, query, *pair)
    out = _answered(layer, module, asking, asked, asked, mask, scale, kwargs)
    return latent.values(expansion, out, value.shape[-1]), None


def _compressed(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return the attention (B, n, H, dv) that a compressed layer computes for its own keys, and None for the weights.

    `key` leads to the layer by its mark. scaling: the factor on q.k, None for d**-0.5.
    The caller, `attention`, excludes this function from torch.compile. A compressed layer appends tokens in a loop over
    blocks, and compilation would trace the body of this loop once per block.
    """
    layer = layer_of(key)
    assert layer is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _answered(layer, module, query, key, value, mask, scale, kwargs), None


def _answered(
    layer: AnsweringLayer,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scale: float,
    call: dict[str, Any],
) -> Tensor:
    """Append these tokens to the compressed layer `layer`, and return the attention (B, n, H, dv) that it computes.

    key, value: those of these tokens, (B, kv heads, n, .). scale: the factor on q.k. Raises ValueError, with the layer
    unchanged, if `call` or the mask asks for attention that a compressed layer cannot compute.
    """
    try:
        _refuse(layer, module, query, key, mask, call)
    except ValueError:
        layer.unstage()
        raise
    if layer.served_by is None:
        _meet(layer, module)
    padding = mask.padding if isinstance(mask, LazyMask) else None
    law = (scale, call.get("softcap"), call.get("s_aux"))
    out = layer.answer(query, key, value, padding, *law, call.get("position_ids"))
    layer.served_by = weakref.ref(module)
    sources = [x for x in (query, key, value, call.get("s_aux")) if x is not None and x.requires_grad]
    return _NoGradient.apply(out, *sources) if sources and torch.is_grad_enabled() else out


def _meet(layer: AnsweringLayer, module: torch.nn.Module) -> None:
    """Store in an empty layer the number of positions in its model's learned position table; None without such a table.

    module: the attention module of the model that calls the layer for the first time. Raises ValueError, without
    storing the layer's keys, if the model is sharded over another number of ranks than the cache was made for.
    """
    model = owner(module)
    layer.room = table_room(model)
    count = (ALONE if model is None else ranks_of(model)).count
    if count != layer.opening.ranks.count:
        layer.unstage()
        raise ValueError(
            f"this cache was made for {layer.opening.ranks.count} rank(s), and the model is sharded over {count}: give "
            f"CompressedCache the prepared model itself"
        )


def _refuse(
    layer: AnsweringLayer, module: torch.nn.Module, query: Tensor, key: Tensor, mask: Any, call: dict[str, Any]
) -> None:
    """Raise ValueError if a call asks for attention that a compressed layer cannot compute.

    Refused are cross-attention, a ready-made 4-d mask, a mask that is not causal, a position bias, attention to later
    tokens (is_causal=False), and a request for attention weights.
    """
    crossing = query.shape[2] != key.shape[2] or not getattr(module, "is_causal", True)
    if crossing and getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(module).__name__} looks at the encoder's tokens through the same cache as at its own: give an "
            f"encoder-decoder model EncoderDecoderCache(CompressedCache(...), DynamicCache()), and begin with new ones"
        )
    if isinstance(mask, LazyMask):
        layer.refuse_rule(mask)
    elif mask is not None:
        raise ValueError("a compressed layer needs the 2-d attention mask (batch, tokens), not a ready 4-d one")
    if call.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a bias by position to its logits, which a compressed layer cannot: it "
            f"keeps keys, not a bias for every pair; use a stock cache with this model"
        )
    if call.get("is_causal") is False:
        raise ValueError(f"{type(module).__name__} looks ahead; a compressed layer answers from what came before")
    if call.get("output_attentions") or (not layer.place and _wants_weights(module, call)):
        raise ValueError(
            "output_attentions=True asks for the weight of every token, which a compressed layer does not have: leave "
            "it out, or use a stock cache"
        )


def _wants_weights(module: torch.nn.Module, call: dict[str, Any]) -> bool:
    """Return True if the user requested attention weights (output_attentions).

    Some families do not pass the argument on, so the configuration and transformers' output collector are read too.
    """
    if call.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    if torch.compiler.is_compiling() or _collector is None:
        return False
    return "attentions" in (_collector.get() or {})


def _stock(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, over: str, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output (B, n, H, dv), and the weights or None, for keys from any other cache or from none.

    The attention `over`, which the model had selected before, computes them. The family's own eager attention is used
    instead if sdpa cannot compute the call: with a cap on logits, with sinks, or with weights requested.
    """
    if isinstance(mask, LazyMask):
        mask = mask.for_stock()
    beyond_sdpa = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    eager = _eager(module) if over.endswith("eager") or beyond_sdpa or _wants_weights(module, kwargs) else None
    if eager is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    if not over.endswith("eager"):
        mask = _additive(module, query, key, mask, kwargs.get("is_causal"))
    return eager(module, query, key, value, mask, **kwargs)


def _eager(module: torch.nn.Module) -> Any:
    """Return the eager attention function defined in the module's own file; None unless there is exactly one."""
    file = vars(sys.modules[type(module).__module__])
    if "eager_attention_forward" in file:
        return file["eager_attention_forward"]
    likely = [thing for name, thing in file.items() if name.endswith("eager_attention_forward")]
    return likely[0] if len(likely) == 1 else None


def _additive(module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool | None) -> Any:
    """Convert a mask for sdpa to one for eager attention: 0 where a query may attend, the dtype's minimum elsewhere.

    query, key  give the numbers of queries and slots, and the dtype
    mask        a bool mask is converted; a mask of another dtype is returned unchanged. None stands for the causal mask
                if attention is causal and there are several queries, and this causal mask is converted. Otherwise None
                hides nothing, and None is returned
    causal      True if attention is causal; if not given (None), the module's attribute of that meaning, `is_causal`,
                decides
    """
    n, slots = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and causal and n > 1:
        mask = torch.ones(n, slots, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )


def prepare(model: Model) -> Model:
    """Make `model` work with kvfloor's cache (`CompressedCache`), and return it.

    With any other cache, the model gives the same results as before.
    `model` may be wrapped (torch.compile, PEFT, DataParallel). Its configurations are replaced by copies, so that other
    models built from the same ones do not change. Collective on a model sharded by tensor parallelism: every rank calls
    it. Raises TypeError if there is no transformers model in `model`, and ValueError for a family that cannot be
    served.
    """
    inner = unwrapped(model)
    refuse_own_cache(model)
    if ignores_the_interface(inner):
        raise ValueError(
            f"{type(inner).__name__} ignores transformers' attention interface, so its cache cannot be compressed "
            f"from outside; families such as Llama, Mistral, Qwen or Gemma honour it"
        )
    reason = refusal(inner.config)
    if reason is not None:
        raise ValueError(f"{type(inner).__name__} cannot have a compressed cache: {reason}")
    own = own_cache_class(inner)
    if own is not None:
        raise ValueError(
            f"{type(inner).__name__} fills a cache class of its own, {own}, so that no other cache can take its place "
            f"in transformers {transformers.__version__}; newer releases have dropped most such classes"
        )
    ranks_of(inner)
    for name in selection.select(inner):
        before = selection.before(name)
        assert before is not None
        AttentionInterface.register(name, partial(attention, over=before))
        AttentionMaskInterface.register(name, partial(mask_over, before))
    _prepared.add(inner)
    return model


def is_prepared(model: object) -> bool:
    """Return True if `model` is, or wraps, a transformers model that works with kvfloor's `CompressedCache` now."""
    try:
        inner = unwrapped(model)
    except TypeError:
        return False
    return inner in _prepared and selection.selects_kvfloor(inner.config)


def owner(module: torch.nn.Module | None) -> PreTrainedModel | None:
    """Return the prepared model that contains `module`; None if there is none, or it was deleted.

    If prepared models are nested, the outermost one is returned.
    """
    holders = [model for model in _prepared if module is not None and any(part is module for part in model.modules())]
    return max(holders, key=lambda model: sum(1 for _ in model.modules()), default=None)


def restore(model: Model) -> Model:
    """Undo `prepare`: select in every part of `model` the attention that was selected before. Returns `model`.

    Does nothing to a model that is not prepared. Works on a copy of a prepared model too.
    """
    selection.deselect(unwrapped(model))
    return model
