"""Let a compressed cache serve latent attention (MLA), where all heads' keys are computed from one latent vector.

DeepSeek, GLM, Kimi and Mistral 4 have such attention.
Where transformers caches latents, the cache's `update` receives a token's latent c and its rotary key r, one of each
for all heads. The attention module's `expand_kv` then computes the keys and values of all heads from the latents that
`update` returns. Head h has the key [K_h c, r] and the value V_h c, where K_h and V_h are matrices of the module. A
head's logit is [K_h' q, q_rot] . [c, r], where K_h' is the transpose of K_h, and q and q_rot are the parts of the
head's query without and with rotation. The head's attention output is V_h times the weighted mean of the latents
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2, "absorbed"). So kvfloor stores [c, r] as key and as value of a single kv
head, whose GQA group is all query heads. The same tokens are kept for all heads. Some transformers releases cache the
keys of every head instead; they need none of this.

In shapes, c and r stand for the widths of the latent c and the rotary key r, and nope is the width of a key without
rotation. B is the batch, H the number of query heads, n the number of tokens, d and dv the widths of a head's key and
value.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor, nn

_ROUNDING = 0.05  # of a vector's length; 8-bit activations lose about a hundredth
_newest = threading.local()  # what the last `update` of this thread returned, by weak references


def remember_update(keys: Tensor, values: Tensor) -> None:
    """Remember, for this thread, the keys and values that a layer's `update` returned, for a later `newest_update`.

    Every compressed layer calls this in its `update`, of latent attention or not, and replaces what was remembered.
    A latent-attention module computes new tensors from these keys and values before it calls its attention function. So
    the function's arguments no longer show from which cache they came. Only weak references are kept.
    """
    _newest.pair = (weakref.ref(keys), weakref.ref(values))


def newest_update() -> tuple[Tensor, Tensor] | None:
    """Return the (keys, values) that this thread's last `update` of a compressed layer returned.

    They are latents only if that layer has latent attention, which the caller must check. Updates of transformers' own
    layers do not count. Returns None if these tensors no longer exist, because the forward ended or failed, or if there
    was no update yet.
    """
    pair = getattr(_newest, "pair", None)
    if pair is None:
        return None
    keys, values = pair[0](), pair[1]()
    return None if keys is None or values is None else (keys, values)


def absorbed(expansion: Tensor, query: Tensor, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Convert queries and latents to the queries (B, H, n, c + r) and keys (B, 1, n, c + r) of one shared kv head.

    The products q.k of these queries and keys are those of the module's own queries and per-head keys. In shapes, c, r
    and nope are the widths of a latent, of a rotary key, and of a head's key without rotation.
    expansion  the matrix (H, nope + dv, c) that maps a latent to every head's key and value, from the function
               `expansion`
    query      (B, H, n, nope + r): as the module computed it, its part without rotation first
    latent     (B, 1, n, c) and rotary (B, 1, n, r): as the module cached them
    """
    plain, turned = query.split([query.shape[-1] - rotary.shape[-1], rotary.shape[-1]], -1)
    to_key = expansion[:, : plain.shape[-1]]
    return torch.cat([torch.matmul(plain, to_key), turned], -1), torch.cat([latent, rotary], -1)


def values(expansion: Tensor, out: Tensor, dv: int) -> Tensor:
    """Convert attention outputs over latents (B, n, H, c + r) to attention outputs of the heads (B, n, H, dv).

    expansion: the matrix (H, nope + dv, c) that maps a latent to every head's key and value; its last dv rows are the
    head's value matrix. out: each head's weighted mean of [latent, rotary key], of widths c and r. The result is the
    value matrix times the latent part of `out`, and is contiguous.
    """
    of_latent = out[..., : expansion.shape[-1]].transpose(1, 2)  # (B, H, n, c)
    to_value = expansion[:, -dv:]
    return torch.matmul(of_latent, to_value.transpose(1, 2)).transpose(1, 2).contiguous()


def expansion(module: nn.Module, latent: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the matrix (H, nope + dv, c) that maps a latent to every head's key and value. Call it once per forward.

    In shapes, c is the width of a latent, and nope that of a head's key without its rotary part.
    module   the attention module, whose layer `kv_b_proj` is the map
    latent   (B, 1, n, c), with the key (B, H, n, .) and value (B, H, n, dv) that the module computed from it
    If `kv_b_proj` is plainly linear, without adapter or hook, the matrix is its weight. Any other layer is called on
    every unit vector, and nothing is cached. So an adapter, a hook, and a quantised or offloaded weight take effect as
    they are now. Such a layer must be linear too, so the matrix is checked on the newest token's key and value. Raises
    ValueError if the matrix's key and value differ from the module's by more than rounding.
    """
    project: nn.Module = module.kv_b_proj  # type: ignore[assignment]
    heads, dv = value.shape[1], value.shape[-1]
    if is_plainly_linear(project):
        return project.weight.view(heads, -1, latent.shape[-1])  # type: ignore[operator]
    units = torch.eye(latent.shape[-1], dtype=latent.dtype, device=latent.device)
    found = project(units).transpose(0, 1).reshape(heads, -1, latent.shape[-1])
    made = torch.cat([key[:, :, -1, : found.shape[1] - dv], value[:, :, -1]], -1)  # (B, H, nope + dv)
    again = torch.matmul(latent[:, :, -1:], found.to(latent.dtype).transpose(1, 2)).squeeze(2)
    if not (made.is_meta or _alike(again, made)):  # meta tensors have shapes only
        raise ValueError(
            f"{type(module).__name__}.kv_b_proj, or a hook on it, is not linear: keys and values cannot be had from "
            f"latents that a compressed cache keeps; take it off, or use a stock cache"
        )
    return found


def is_plainly_linear(project: nn.Module) -> bool:
    """Return True if a call of the module `project` is a product with its weight and nothing else.

    An adapter, a bias, a hook, or a quantised or offloaded weight makes it False.
    """
    return (
        type(project) is nn.Linear
        and type(project.weight) is nn.Parameter
        and not project.weight.is_meta
        and project.bias is None
        and "forward" not in vars(project)
        and not project._forward_hooks
        and not project._forward_pre_hooks
        and not torch.nn.modules.module._has_any_global_hook()
    )


def _alike(found: Tensor, right: Tensor) -> bool:
    """Return True if `found` equals `right` up to rounding, which may be that of quantised (8-bit) activations.

    The norm of the difference may be at most 5 % of the norm of `right`.
    """
    found, right = found.detach().float(), right.detach().float()
    return bool((found - right).norm() <= _ROUNDING * right.norm())
