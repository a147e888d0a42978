"""Serve latent attention (MLA: DeepSeek, GLM, Kimi, Mistral 4), which makes all heads' keys and values of one latent.

Where transformers caches latents, `update` gets a token's latent c and its rotary key r, one of each for all heads, and
the module's `expand_kv` makes head h's key [K_h c, r] and value V_h c of the latents that `update` returns. A head's
logit is then [K_h' q, q_rot] . [c, r], and its answer V_h times the weighted mean of the c (DeepSeek-V2, arXiv
2405.04434, section 2.1.2, "absorbed"). So a state serves it as one kv head whose group is all heads, with [c, r] for
key and for value: one set of kept tokens for all heads. Releases that cache every head's keys instead need none of
this.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor, nn

_ROUNDING = 0.05  # of a vector's length; 8-bit activations lose about a hundredth
_newest = threading.local()  # what the last `update` of this thread returned, by weak references


def staged(keys: Tensor, values: Tensor) -> None:
    """Remember the tensors that `update` returned.

    The module that called `update` makes new tensors of them before it calls its attention function.
    """
    _newest.pair = (weakref.ref(keys), weakref.ref(values))


def awaited() -> tuple[Tensor, Tensor] | None:
    """Return the pair that this thread's last `update` returned, while the forward that called it is still running.

    Returns None where there is no such pair: a forward that ended or broke off has released it.
    """
    pair = getattr(_newest, "pair", None)
    if pair is None:
        return None
    keys, values = pair[0](), pair[1]()
    return None if keys is None or values is None else (keys, values)


def absorbed(expansion: Tensor, query: Tensor, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries (B, H, n, c + r) against latents, and the keys (B, 1, n, c + r) that they are compared with.

    query (B, H, n, nope + r) as the module made it; latent (B, 1, n, c) and rotary (B, 1, n, r) as it cached them.
    """
    plain, turned = query.split([query.shape[-1] - rotary.shape[-1], rotary.shape[-1]], -1)
    to_key = expansion[:, : plain.shape[-1]]
    return torch.cat([torch.matmul(plain, to_key), turned], -1), torch.cat([latent, rotary], -1)


def values(expansion: Tensor, out: Tensor, dv: int) -> Tensor:
    """Return the heads' answers (B, n, H, dv), contiguous, given the weighted means (B, n, H, c + r) of [c, r]."""
    of_latent = out[..., : expansion.shape[-1]].transpose(1, 2)  # (B, H, n, c)
    to_value = expansion[:, -dv:]
    return torch.matmul(of_latent, to_value.transpose(1, 2)).transpose(1, 2).contiguous()


def expansion(module: nn.Module, latent: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the matrix that makes every head's key and value of a latent: (H, nope + dv, c). Call it once per forward.

    For a plain linear layer without adapter or hook, the matrix is its weight. Any other module is called on every unit
    vector: an adapter, a quantised or offloaded weight and a hook count as they are now, and nothing is kept. Such a
    module must be linear. So its result is compared with the newest token's key (B, H, n, .) and value (B, H, n, dv),
    which the module made of its latent (B, 1, n, c). Raises ValueError if they are not alike.
    """
    project: nn.Module = module.kv_b_proj  # type: ignore[assignment]
    heads, dv = value.shape[1], value.shape[-1]
    if is_plainly_linear(project):
        return project.weight.view(heads, -1, latent.shape[-1])  # type: ignore[operator]
    units = torch.eye(latent.shape[-1], dtype=latent.dtype, device=latent.device)
    found = project(units).transpose(0, 1).reshape(heads, -1, latent.shape[-1])
    made = torch.cat([key[:, :, -1, : found.shape[1] - dv], value[:, :, -1]], -1)  # (B, H, nope + dv)
    if not _alike(torch.matmul(latent[:, :, -1:], found.to(latent.dtype).transpose(1, 2)).squeeze(2), made):
        raise ValueError(
            f"{type(module).__name__}.kv_b_proj, or a hook on it, is not linear: keys and values cannot be had from "
            f"latents that a compressed cache keeps; take it off, or use a stock cache"
        )
    return found


def is_plainly_linear(project: nn.Module) -> bool:
    """Return True if a call of this module is a product with its weight only: no adapter, hook or other storage."""
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
    """Return True if two products differ by no more than rounding, that of quantised activations included.

    A constant factor between the two counts as a difference.
    """
    found, right = found.detach().float(), right.detach().float()
    return bool((found - right).norm() <= _ROUNDING * right.norm())
