"""Compute the trainer's forward pass: the transformers model's function, but only at positions that predict answers.

The last layer's queries, its feed-forward part and the output head are needed only at the positions that predict an
answer token. Short sequences use two matrix products for attention, which is faster there than the fused kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

SHORT = 96  # tokens up to which plain attention is the faster one on a CPU


def answer_logits(model: Any, ids: torch.Tensor, positions: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Return logits (rows, m, vocabulary) of a `LlamaForCausalLM` at token indexes `where` (rows, m).

    `ids` and `positions` are (rows, t). Padding comes after the text, so the causal mask hides it.
    """
    inner = model.model
    x = inner.embed_tokens(ids)
    cos, sin = (table.to(x.dtype).unsqueeze(1) for table in inner.rotary_emb(x, positions))
    for layer in inner.layers[:-1]:
        x = x + attend(layer, x, cos, sin)
        x = x + layer.mlp(norm(layer.post_attention_layernorm, x))
    last = inner.layers[-1]
    picked = where.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    y = x.gather(1, picked) + attend(last, x, cos, sin, where)
    y = y + last.mlp(norm(last.post_attention_layernorm, y))
    return model.lm_head(norm(inner.norm, y)).float()


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply RMS norm in one fused call, with the module's weight."""
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def attend(
    layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, where: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply one layer's causal self-attention at every position, or only at `where` (rows, m)."""
    block = layer.self_attn
    h = norm(layer.input_layernorm, x)
    rows, t, width = h.shape
    at = h if where is None else h.gather(1, where.unsqueeze(-1).expand(-1, -1, width))
    k = turn(block.k_proj(h).view(rows, t, -1, block.head_dim).transpose(1, 2), cos, sin)
    v = block.v_proj(h).view(rows, t, -1, block.head_dim).transpose(1, 2)
    q = block.q_proj(at).view(rows, at.shape[1], -1, block.head_dim).transpose(1, 2)
    if where is None:
        q = turn(q, cos, sin)
    else:
        chosen = where[:, None, :, None].expand(-1, 1, -1, block.head_dim)
        q = turn(q, cos.gather(2, chosen), sin.gather(2, chosen))
    q, k = q.to(v.dtype), k.to(v.dtype)
    if where is None and t > SHORT:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        out = plain(q, k, v, where)
    return block.o_proj(out.transpose(1, 2).reshape(rows, at.shape[1], -1))


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to x (rows, heads, t, dim), in the half-split layout of transformers."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """Compute attention as two products; query j of row i sees keys up to `where[i, j]`, or up to j if it is None."""
    rows, kv, t, d = k.shape
    m = q.shape[2]
    last = torch.arange(m).expand(rows, m) if where is None else where
    hidden = torch.arange(t)[None, None] > last[:, :, None]
    grouped = (q * d**-0.5).reshape(rows, kv, -1, d)
    scores = (grouped @ k.transpose(2, 3)).float().view(rows, kv, -1, m, t)
    p = scores.masked_fill(hidden[:, None, None], float("-inf")).softmax(-1)
    return (p.to(v.dtype).view(rows, kv, -1, t) @ v).view(rows, -1, m, d)
