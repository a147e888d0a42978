"""Compute softmax attention and its log-mass (log-sum-exp of the logits), eagerly or by torch's fused CPU kernel.

In shapes, q is (rows, m, d), k (rows, s, d), v (rows, s, dv): m queries and s tokens per row, where a row is one (batch
item, kv head) stream. A logit is scale q.k; a softcap c replaces it by c tanh(scale q.k / c). The log-mass of a query
is the log-sum-exp of its logits. The compute dtype is float64 for float64 inputs, float32 for all others.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfloor.core.attend_few import attend_few, serves
from kvfloor.logits import capped

Backend = Literal["auto", "eager", "flash"]

MANY_NUMBERS = 2**17
"""Least numbers in all keys together for which one token's queries are asked by the kernel in C."""

MOST_SPLIT = 64
"""Most queries of a row for which the Triton kernel is used: with more, other kernels have enough work to share."""

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which attention is computed: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None = None,
    log_weight: Tensor | None = None,
    hide: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention of queries q over keys k and values v: outputs (rows, m, dv) and log-masses (rows, m).

    An output is the mean of the values under softmax(scale q k^T + log_weight); its log-mass is the log-sum-exp of
    these logits. Both are in the compute dtype. A query that sees no key gets output 0 and log-mass -inf.
    q, k, v     (rows, m, d), (rows, s, d), (rows, s, dv)
    softcap     c: scale q.k is replaced by c tanh(scale q.k / c); None: no cap
    log_weight  (rows, s), added to the logits; None: nothing is added
    hide        bool (rows or 1, m or 1, s), True where a query does not see a key; None: all keys are seen
    backend     "auto": on a GPU the Triton kernel (`split_applies`); on a CPU the kernel in C for weighted reads of few
                queries (`attend_few.serves`), otherwise torch's fused kernel (`fused`); the definition where none
                applies. "flash": torch's fused CPU kernel, or ValueError where it does not apply; "eager": no kernel
    """
    if backend == "auto" and hide is None and split_applies(q, k, v):
        from kvfloor.core import attend_triton

        return attend_triton.attend_split(q, k, v, scale, softcap, log_weight)
    if backend == "auto" and log_weight is not None and softcap is None and hide is None and serves(q, k, v):
        return attend_few(q, k, v, scale, log_weight)
    applies = fused(q, k, v, softcap)
    if backend == "flash" and not applies:
        raise ValueError(f"the fused path needs CPU tensors, d == dv and no softcap; got {q.device}, {k.shape}")
    if applies and backend != "eager":
        return _flash(q, k, v, scale, log_weight, hide)
    mean, log_mass, _ = weigh(q, k, v, scale, softcap, log_weight, hide)
    return mean, log_mass


def attend_newest(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None, log_weight: Tensor | None = None
) -> Tensor:
    """Return attention outputs (rows, g, 1, dv) of the newest token's queries q (rows, g, 1, d), which see all keys.

    k (rows, s, d), v (rows, s, dv); g is the GQA group, i.e. query heads per kv head. The outputs have k's dtype where
    a kernel for CPUs applies, otherwise the compute dtype. log_weight (rows, s) is added to the logits; None: nothing
    is added. From `MANY_NUMBERS` on, the kernel in C is taken (`attend_few`), but not for one query per row in float32,
    for which torch's fused kernel is faster. Torch's is called through `scaled_dot_product_attention` and not through
    `attend`: with few keys the overhead of `attend` is a third of the time.
    """
    many = k.numel() >= MANY_NUMBERS and (q.shape[1] > 1 or k.dtype == torch.bfloat16)
    if many and log_weight is None and softcap is None and serves(of_all := q.squeeze(2), k, v):
        return attend_few(of_all, k, v, scale)[0].to(k.dtype).unsqueeze(2)
    if log_weight is None and fused(q, k, v, softcap) and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        out = scaled_dot_product_attention(q.transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1), scale=scale)
        return out.transpose(1, 2)
    return attend(q.squeeze(2), k, v, scale, softcap, log_weight)[0].unsqueeze(2)


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Compute causal attention: query i of q (rows, g, a, d) sees keys 0 .. i of k (rows, a, d).

    a is the number of tokens, g the GQA group, i.e. query heads per kv head; v is (rows, a, dv). Returns outputs (rows,
    g, a, dv) and log-masses (rows, g, a), in the compute dtype.
    softcap  c: scale q.k is replaced by c tanh(scale q.k / c); None: no cap
    backend  "auto": torch's fused CPU kernel wherever it applies (`fused`), which skips hidden keys instead of masking
             them; "flash": the kernel, or ValueError where it does not apply; "eager": never the kernel
    """
    rows, g, a, _d = q.shape
    if backend != "eager" and fused(q, k, v, softcap):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        keys, values = (x.unsqueeze(1).expand(-1, g, -1, -1) for x in (k, v))
        assert _FLASH is not None
        out, log_mass = _FLASH(q, keys, values, 0.0, True, attn_mask=None, scale=scale)
        return out.float(), log_mass.float()
    later = torch.ones(a, a, dtype=torch.bool, device=q.device).triu(1).repeat(g, 1).unsqueeze(0)
    mean, log_mass = attend(q.reshape(rows, g * a, -1), k, v, scale, softcap, hide=later, backend=backend)
    return mean.view(rows, g, a, -1), log_mass.view(rows, g, a)


def weigh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None = None,
    log_weight: Tensor | None = None,
    hide: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute softmax attention without the fused kernel, and return the softmax weights (rows, m, s) too.

    Returns outputs (rows, m, dv), log-masses (rows, m) and the weights, in the compute dtype.
    softcap     c: scale q.k is replaced by c tanh(scale q.k / c); None: no cap
    log_weight  (rows, s), added to the logits; None: nothing is added
    hide        bool (rows or 1, m or 1, s), True where a query does not see a key; None: all keys are seen
    """
    dtype = compute_dtype(k.dtype)
    logits = torch.matmul(q.to(dtype) * scale, k.to(dtype).transpose(-1, -2))
    logits = capped(logits, softcap)
    if log_weight is not None:
        logits = logits + log_weight.to(dtype).unsqueeze(-2)
    if hide is not None:
        logits = logits.masked_fill(hide, -torch.inf)
    if logits.shape[-1] == 0:
        mean = v.new_zeros(*logits.shape[:-1], v.shape[-1], dtype=dtype)
        return mean, logits.new_full(logits.shape[:-1], -torch.inf), logits
    top = logits.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.clamp_min(torch.finfo(dtype).tiny)
    return torch.matmul(weights, v.to(dtype)), (top + torch.log(total)).squeeze(-1), weights


def fused(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> bool:
    """Return True if torch's fused CPU attention kernel, which never stores the logits, applies to these tensors.

    It needs non-empty CPU tensors of one dtype, float32 or bfloat16, with d = dv, and no softcap.
    """
    return (
        _FLASH is not None
        and softcap is None
        and q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype
        and k.dtype in (torch.float32, torch.bfloat16)
        and k.shape[-1] == v.shape[-1]
        and min(q.shape) > 0
        and min(k.shape) > 0
    )


def split_applies(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return True if the Triton kernel, which splits the keys among programs, applies to these tensors.

    It needs CUDA tensors of one dtype of at most 32 bits, keys and values whose entries lie together, at most
    `MOST_SPLIT` queries per row, and an installed triton.
    """
    return (
        q.device.type == "cuda"
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and 0 < q.shape[1] <= MOST_SPLIT
        and min(k.shape) > 0
        and k.stride(-1) == v.stride(-1) == 1
        and has_triton()
    )


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return True if triton is installed, and a first kernel run on this machine's GPU agrees with torch.

    If it does not run there or does not agree, a warning says so once.
    """
    if find_spec("triton") is None:
        return False
    from kvfloor.core import attend_triton

    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 64, generator=draw) for n in (4, 300, 300))
    try:
        there = attend_triton.attend_split(*(x.cuda() for x in (q, k, v)), scale=0.125, parts=3)
        worst = max(float((a.cpu() - b).abs().max()) for a, b in zip(there, weigh(q, k, v, 0.125)[:2], strict=True))
    except Exception as failure:  # of a compiler, a driver or a device, which have no common class
        warnings.warn(f"triton's kernels do not run here, so torch computes attention: {failure}", stacklevel=2)
        return False
    if not worst < 1e-4:
        warnings.warn(f"triton's kernels err by {worst:.1e} here, so torch computes attention", stacklevel=2)
    return worst < 1e-4


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, log_weight: Tensor | None, hide: Tensor | None
) -> tuple[Tensor, Tensor]:
    bias, most = None, None
    if log_weight is not None or hide is not None:
        # The additive mask stays float32 even for bfloat16 keys: log-weights would lose their precision.
        bias = torch.zeros(1, 1, k.shape[1]) if log_weight is None else log_weight.float().unsqueeze(1)
        if hide is not None:
            bias = bias.masked_fill(hide, -torch.inf)
        most = bias.amax(-1)
        bias = bias.expand(q.shape[0], q.shape[1], -1).unsqueeze(1)
    assert _FLASH is not None
    # The fused kernel assumes a last axis of stride 1: on a transposed input it reads wrong numbers.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, log_mass = _FLASH(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), 0.0, False, attn_mask=bias, scale=scale)
    mean, log_mass = out.squeeze(1).float(), log_mass.squeeze(1).float()
    if most is not None and -torch.inf in most.flatten().tolist():
        # The fused kernel returns log-mass 0 for a query that sees no key.
        blind = most == -torch.inf
        log_mass = log_mass.masked_fill(blind, -torch.inf)
        mean = mean.masked_fill(blind.unsqueeze(-1), 0.0)
    return mean, log_mass
