"""Compute plain attention: in float64 as the truth, in the cache's dtype to measure how much rounding is normal.

In shapes, rows are streams of one kv head of one sequence, g is the size of the GQA group, and d and dv are the widths
of a key and a value. The spec has the sizes and constants of attention, such as the scale of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfloor.core.spec import Spec


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, zero_logits: Tensor | None = None, hide: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return outputs (..., m, dv) and log-masses (..., m) of the attention of m queries over s tokens, in q's dtype.

    q (..., m, d)             queries
    k, v                      keys (..., s, d) and values (..., s, dv)
    spec                      gives the scale and softcap of the logits
    zero_logits (..., e, dv)  values of e further tokens, whose logit is 0; None: there are none
    hide (..., m, s)          True where a query does not see a token; None: each query sees all
    A log-mass is the log-sum-exp of a query's logits.
    """
    logits = torch.matmul(q, k.transpose(-1, -2)) * spec.scale
    if spec.softcap is not None:
        logits = torch.tanh(logits / spec.softcap) * spec.softcap
    if hide is not None:
        logits = logits.masked_fill(hide, -torch.inf)
    if zero_logits is not None:
        logits = torch.cat([logits, logits.new_zeros(*logits.shape[:-1], zero_logits.shape[-2])], -1)
        v = torch.cat([v, zero_logits], -2)
    return torch.matmul(torch.softmax(logits, -1), v), torch.logsumexp(logits, -1)


def causal(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> Tensor:
    """Return the outputs (rows, g, t, dv) of causal attention of q (rows, g, t, d) over t tokens, in q's dtype.

    k (rows, t, d) and v (rows, t, dv) are the tokens' keys and values; spec gives the scale and softcap of the logits.
    """
    t = k.shape[1]
    hide = torch.ones(t, t, dtype=torch.bool).triu(1)
    return attention(q, k.unsqueeze(1), v.unsqueeze(1), spec, hide=hide)[0]
