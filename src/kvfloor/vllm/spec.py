"""Tell vLLM how much memory a request takes: one block per layer, from its first token to its end."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_cache_interface import (  # pyright: ignore[reportMissingImports]
    AttentionSpec,
    CircularBufferSpec,
    FullAttentionSpec,
)

from kvfloor.vllm.served import TABLE


def block_spec(spec: AttentionSpec) -> Any:
    """Return the description of a layer's memory for bounded KV caches, in place of vLLM's own description `spec`.

    A bounded cache keeps at most a fixed number of tokens. In vLLM a block holds the keys and values of `block_size`
    tokens. Here a block is as many bytes as the cache of one request takes, and `block_size` is the largest number of
    tokens of a request. So a request needs one block. The result is vLLM's description of ring buffers
    (CircularBufferSpec). With it, vLLM gives a request one block until the request ends, and does no prefix caching.
    Raises ValueError for a layer that is not plain attention over all tokens, or whose keys and values differ in width.
    """
    if type(spec) is not FullAttentionSpec or spec.head_size_v != spec.head_size:
        raise ValueError(
            f"kvfloor cannot serve this: a layer keeps its tokens by {type(spec).__name__}, with keys of width "
            f"{spec.head_size} and values of width {spec.head_size_v}; bounded caches are for attention over all "
            f"tokens, with keys and values of one width"
        )
    served = TABLE.of(spec.num_kv_heads, spec.head_size)
    return CircularBufferSpec(
        block_size=served.tokens,
        tokens_per_state=served.tokens,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=torch.uint8,
        num_head_slots=1,
        state_content_bytes=served.nbytes,
    )
