"""Read a decode step by vLLM's kernel for CPUs, where a vLLM for CPUs is installed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

_BLOCK = 128
LACKS_VLLM = "vLLM's CPU kernel: no vLLM with CPU kernels is installed here (make bench-peers installs one)"


def paged_read(
    q: Tensor, held: Sequence[tuple[Tensor, Tensor]], scale: float, expected: Tensor
) -> tuple[Callable[[], object] | None, str | None]:
    """Return (a call that reads the next of `held` by vLLM's kernel, None), or (None, a line with the reason).

    q         (kv heads, g, d); held: copies of keys and values, each (kv heads, n, d)
    expected  the answers to compare the kernel's with, of as many elements as q; a kernel that is called in the wrong
              way is left out
    """
    if find_spec("vllm") is None:
        return None, LACKS_VLLM
    try:
        calls = [_call(q, k, v, scale) for k, v in held]
        out = calls[0]()
        torch.testing.assert_close(out.flatten().float(), expected.flatten().float(), rtol=2e-2, atol=2e-2)
    except Exception as error:  # another version's names and layouts, or a build without these kernels
        return None, f"vLLM's CPU kernel: it could not be called ({type(error).__name__}: {str(error).splitlines()[0]})"
    turn = itertools.cycle(calls)
    return lambda: next(turn)(), None


def _call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Tensor]:
    """Return a call of the kernel over one copy, which is packed into vLLM's blocks here."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # type: ignore[import-not-found]

    from vllm import _custom_ops as ops  # type: ignore[import-not-found]

    heads, group, width = q.shape
    n, isa = k.shape[1], _get_attn_isa(k.dtype, _BLOCK)
    blocks = -(-n // _BLOCK)
    packed = torch.zeros(2, blocks, heads, _BLOCK, width, dtype=k.dtype)
    ops.cpu_attn_reshape_and_cache(
        k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous(), packed[0], packed[1], torch.arange(n), isa
    )
    query = q.reshape(1, heads * group, width).contiguous()
    out, start = torch.empty_like(query), torch.tensor([0, 1], dtype=torch.int32)
    lengths, table = torch.tensor([n], dtype=torch.int32), torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=heads * group,
        num_kv_heads=heads,
        head_dim=width,
        seq_lens=lengths,
        dtype=k.dtype,
        query_start_loc=start,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )

    def call() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=packed[0],
            value_cache=packed[1],
            output=out,
            query_start_loc=start,
            seq_lens=lengths,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
        )
        return out

    return call
