"""Tell vLLM how much memory a request takes: one block per layer, for its whole life."""

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
    """Return the memory of a layer with bounded caches, in place of the memory `spec` that vLLM would give it.

    A vLLM block holds the keys and values of `block_size` tokens. Here it is one entry of as many bytes as a state
    takes, which covers all tokens that a request may have. vLLM's spec for ring buffers gives a request one such
    block until it ends, and takes no part in prefix caching. Raises ValueError for a layer that is no plain attention
    over all tokens.
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
