"""Initialise heads of the first layer to look back, and heads of later layers to match tokens and copy.

Most of a short training passes before gradient descent finds one circuit, the induction head: a head that writes the
token before each token into the residual stream as a note, and a later head that finds where the present token was
noted and copies the token there. So the weights start near this circuit, and all of them are trained from there. The
residual stream holds a constant channel, the token's own embedding (first half), and the notes about the tokens one
and two places back (a quarter each). To start from the pattern that training would reach is the method of Trockman and
Kolter 2023, "Mimetic initialization of self-attention layers".
"""

from __future__ import annotations

from typing import Any

import torch

EMBEDDING = 0.14  # standard deviation of token embeddings
CONSTANT = 0.8  # channel 0 of every embedding: attention by position alone reads its queries and keys from it
NOTE = 0.15  # gain of the first layer's notes
PEAK = 1.1  # size of the looking-back part in the first layer's query and key weights
MATCH = 1.8  # size of the comparing part in later layers' query and key weights
COPY = 0.15  # size of the copying part in later layers' output weights
NOISE = 0.3  # gain of the random part of queries and keys
QUIET = 0.05  # gain of the random part of weights that write into the residual stream; other gains are 1


def initialise(model: Any) -> None:
    """Fill all weights of a new model in place, from torch's global generator."""
    half = model.config.hidden_size // 2
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0, EMBEDDING)
                weight[:, half:] *= 0.1
                weight[:, 0] = CONSTANT
            elif weight.dim() == 2:
                gain = QUIET if "o_proj" in name or "down_proj" in name else 1.0
                gain = NOISE if "q_proj" in name or "k_proj" in name else gain
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
        look_back(model)
        for layer in range(1, model.config.num_hidden_layers):
            match(model, layer)


def heads(model: Any, layer: int) -> tuple[torch.Tensor, ...]:
    """Return views of one layer's weights by head.

    They are q (kv, group, dim, hidden), k and v (kv, dim, hidden), and o (hidden, kv, group, dim).
    """
    config, block = model.config, model.model.layers[layer].self_attn
    kv, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    return (
        block.q_proj.weight.view(kv, groups, config.head_dim, -1),
        block.k_proj.weight.view(kv, config.head_dim, -1),
        block.v_proj.weight.view(kv, config.head_dim, -1),
        block.o_proj.weight.view(-1, kv, groups, config.head_dim),
    )


def summary(model: Any) -> torch.Tensor:
    """Return the fixed random projection (quarter, half) of embeddings in which tokens are noted and compared."""
    half = model.config.hidden_size // 2
    return torch.randn(half // 2, half, generator=torch.Generator().manual_seed(0)) * half**-0.5


def look_back(model: Any) -> None:
    """Make head h of the first layer attend mostly to the token h + 1 places back; heads 0 and 1 write notes."""
    q, k, v, o = heads(model, 0)
    hidden, dim = model.config.hidden_size, model.config.head_dim
    half, fast = hidden // 2, dim // 4
    speeds = model.model.rotary_emb.inv_freq[:fast]
    k[:, :fast, 0] = PEAK
    k[:, dim // 2 : dim // 2 + fast, 0] = 0.0
    for head in range(model.config.num_attention_heads):
        angle = (head + 1) * speeds
        # a key h + 1 places earlier is rotated by `angle` less, so the query starts rotated back by as much
        q.view(-1, dim, hidden)[head, :fast, 0] = PEAK * torch.cos(angle)
        q.view(-1, dim, hidden)[head, dim // 2 : dim // 2 + fast, 0] = -PEAK * torch.sin(angle)
    width = min(dim, half)
    v[0] = 0.0
    v[0, :width, :width] = torch.eye(width)
    v[0, 0, 0] = 0.0
    project = summary(model)[:, :width]
    o[:, 0] *= 0.2
    o[half : half + half // 2, 0, 0, :width] += NOTE * project
    o[half + half // 2 :, 0, 1, :width] += NOTE * project


def match(model: Any, layer: int) -> None:
    """Make the heads of a later layer find where the present token was noted, and copy the token there.

    Kv head 0 compares the present token with each key's note about one place back. Kv head 1 compares half of the
    channels like that, and in the other half the token before the present one with the note about two places back.
    """
    q, k, v, o = heads(model, layer)
    hidden, dim = model.config.hidden_size, model.config.head_dim
    half = hidden // 2
    quarter = half // 2
    slow = [i for i in range(dim) if i % (dim // 2) >= dim // 4][:quarter]
    token = torch.zeros(quarter, hidden)
    token[:, :half] = summary(model)
    token[:, 0] = 0.0
    back1, back2 = torch.zeros(quarter, hidden), torch.zeros(quarter, hidden)
    back1[:, half : half + quarter] = torch.eye(quarter)
    back2[:, half + quarter :] = torch.eye(quarter)
    even = torch.arange(quarter) % 2 == 0
    q[0][:, slow] += MATCH * token
    k[0][slow] += MATCH * back1
    q[1][:, slow] += MATCH * torch.where(even[:, None], token, back1)
    k[1][slow] += MATCH * torch.where(even[:, None], back1, back2)
    width = min(dim, half)
    read = torch.zeros(dim, hidden)
    read[:width, :width] = torch.eye(width)
    read[0, 0] = 0.0
    for kv in range(v.shape[0]):
        v[kv] = read
        o[:width, kv, :, :width] += COPY * torch.eye(width)[:, None]
