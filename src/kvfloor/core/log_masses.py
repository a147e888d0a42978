"""Compute the log-masses (log-sum-exp of the logits) of attention without its outputs, from the keys alone.

In shapes, q is (rows, m, d) and k (rows, s, d): m queries and s tokens per row, where a row is one (batch item, kv
head) stream. `core.attend` defines logits and the compute dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.attend import attend, compute_dtype, fused, split_applies
from kvfloor.core.attend_few import attend_few, serves
from kvfloor.logits import capped

FEW_QUERIES = 16
"""Most queries of a row for which a product of matrices is faster than torch's fused kernel, in float32."""

LEAST_KEYS = 2**17
"""Least numbers in all keys together for which it is."""


def log_masses(
    q: Tensor,
    k: Tensor,
    scale: float,
    softcap: float | None = None,
    log_weight: Tensor | None = None,
    hide: Tensor | None = None,
) -> Tensor:
    """Compute the log-masses (rows, m) of queries q (rows, m, d) over keys k (rows, s, d), in the compute dtype.

    A log-mass is the log-sum-exp of the logits scale q.k + log_weight; it is that of `attend`, which needs values too.
    A query that sees no key gets -inf.
    softcap     c: scale q.k is replaced by c tanh(scale q.k / c); None: no cap
    log_weight  (rows, s), added to the logits; None: nothing is added
    hide        bool (rows or 1, m or 1, s), True where a query does not see a key; None: all keys are seen
    On a CPU, the kernel in C for few queries (`core.attend_few`) reads the keys alone. Other kernels compute attention;
    they take the keys as values, which have the right width and are at hand. Without the kernel in C, a product of
    matrices is faster for few queries on many keys in float32; it stores m numbers per key.
    """
    if softcap is None and hide is None and serves(q, k, k):
        return attend_few(q, k, None, scale, log_weight)[1]
    few = q.shape[1] <= FEW_QUERIES
    product = few and k.dtype == torch.float32 and k.numel() >= LEAST_KEYS
    if (hide is None and split_applies(q, k, k)) or (fused(q, k, k, softcap) and not product):
        return attend(q, k, k, scale, softcap, log_weight, hide)[1]
    dtype = compute_dtype(k.dtype)
    q, k = q.to(dtype) * scale, k.to(dtype)
    # With the keys on the left, they are not packed anew: for few queries that is half of the time.
    logits = torch.matmul(k, q.mT).mT.contiguous() if few else torch.matmul(q, k.mT)
    logits = capped(logits, softcap)
    if log_weight is not None:
        logits = logits + log_weight.to(dtype).unsqueeze(1)
    if hide is not None:
        logits = logits.masked_fill(hide, -torch.inf)
    return logits.logsumexp(-1)
