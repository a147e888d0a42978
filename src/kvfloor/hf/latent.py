"""Latent attention (MLA: DeepSeek, GLM, Kimi, Mistral 4): one latent per token, of which all heads make key and value.

Where transformers caches latents, `update` gets a token's latent c and its rotary key r, one of each for all heads, and
the module's `expand_kv` makes head h's key [K_h c, r] and value V_h c of what comes back. A head's logit is then
[K_h' q, q_rot] . [c, r], and its answer V_h times the weighted mean of the c (DeepSeek-V2, arXiv 2405.04434, section
2.1.2, "absorbed"). So a state serves it as one kv head whose group is all heads, with [c, r] for key and for value:
one set of kept tokens for all heads. Releases that cache every head's keys instead need none of this.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor, nn

_newest = threading.local()  # what the last `update` of this thread returned, by weak references


def staged(keys: Tensor, values: Tensor) -> None:
    """Remember what `update` returned: the module that called it makes new tensors of it before it asks."""
    _newest.pair = (weakref.ref(keys), weakref.ref(values))


def awaited() -> tuple[Tensor, Tensor] | None:
    """The pair that this thread's last `update` returned, while the forward that called it is still running.

    None where there is none: a forward that ended or broke off has let go of it.
    """
    pair = getattr(_newest, "pair", None)
    if pair is None:
        return None
    keys, values = pair[0](), pair[1]()
    return None if keys is None or values is None else (keys, values)


def absorbed(module: nn.Module, query: Tensor, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """The queries (B, H, n, c + r) that ask latents, and the keys (B, 1, n, c + r) that they ask.

    query (B, H, n, nope + r) as the module made it; latent (B, 1, n, c) and rotary (B, 1, n, r) as it cached them.
    """
    plain, turned = query.split([query.shape[-1] - rotary.shape[-1], rotary.shape[-1]], -1)
    to_key = _expansion(module)[:, : plain.shape[-1]]
    return torch.cat([torch.matmul(plain, to_key), turned], -1), torch.cat([latent, rotary], -1)


def values(module: nn.Module, out: Tensor) -> Tensor:
    """The heads' answers (B, n, H, dv), contiguous, of the weighted means (B, n, H, c + r) of what was kept."""
    expansion = _expansion(module)
    of_latent = out[..., : expansion.shape[-1]].transpose(1, 2)  # (B, H, n, c)
    to_value = expansion[:, _size(module, "qk_nope_head_dim") :]
    return torch.matmul(of_latent, to_value.transpose(1, 2)).transpose(1, 2).contiguous()


def _expansion(module: nn.Module) -> Tensor:
    """What makes every head's key and value of a latent: (H, nope + dv, c).

    Of a plain linear layer that is its weight; anything else, a quantised one or one with an adapter, is asked.
    """
    project: nn.Module = module.kv_b_proj  # type: ignore[assignment]
    if type(project) is nn.Linear:
        weight = project.weight
    else:
        like = next(x for x in module.parameters() if x.is_floating_point())
        one = torch.eye(_size(module, "kv_lora_rank"), dtype=like.dtype, device=like.device)
        weight = project(one).transpose(0, 1)
    return weight.view(-1, _size(module, "qk_nope_head_dim") + _size(module, "v_head_dim"), weight.shape[1])


def _size(module: nn.Module, name: str) -> int:
    size = getattr(module, name)
    assert isinstance(size, int)
    return size
