"""Where training starts: the first layer's heads already look a few tokens back.

A head that finds the token before another one is the first half of every copying circuit, and gradient descent spends
most of a short training waiting for it. With a constant channel in all embeddings, queries and keys have a part that
depends on positions only; its rotary phases are set so that head h of the first layer looks h + 1 tokens back.
Everything is trained afterwards, these weights too. (The idea of starting from the pattern that training would reach:
Trockman and Kolter 2023, "Mimetic initialization of self-attention layers".)
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

EMBEDDING = 0.1  # standard deviation of token embeddings
CONSTANT = 0.8  # channel 0 of every embedding
QUIET = 0.25  # gain of what writes into the residual stream; all other gains are 1
FAST_PAIRS = 12  # rotary pairs used for looking back; the slower ones stay free for content
PEAK = 1.1  # size of the looking-back part in query and key weights


def initialise(model: LlamaForCausalLM) -> None:
    """Fills all weights of a freshly made model in place, from torch's global generator."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0, EMBEDDING)
                weight[:, 0] = CONSTANT
            elif weight.dim() == 2:
                gain = QUIET if "o_proj" in name or "down_proj" in name else 1.0
                weight.normal_(0, gain * weight.shape[1] ** -0.5)
        look_back(model)


def look_back(model: LlamaForCausalLM) -> None:
    """Makes head h of the first layer attend mostly to the token h + 1 places before."""
    config = model.config
    dim = config.head_dim
    block = model.model.layers[0].self_attn
    speeds = model.model.rotary_emb.inv_freq[:FAST_PAIRS]
    q = block.q_proj.weight.view(config.num_attention_heads, dim, -1)
    k = block.k_proj.weight.view(config.num_key_value_heads, dim, -1)
    half = dim // 2
    # what depends on content is made small there, so that the positions decide
    q *= 0.3
    k[:, :FAST_PAIRS, 0] = PEAK
    k[:, half : half + FAST_PAIRS, 0] = 0.0
    for head in range(config.num_attention_heads):
        angle = (head + 1) * speeds
        # a key `back` places earlier is turned by `back * speed` less than the query: the query starts behind by that
        q[head, :FAST_PAIRS, 0] = PEAK * torch.cos(angle)
        q[head, half : half + FAST_PAIRS, 0] = -PEAK * torch.sin(angle)
