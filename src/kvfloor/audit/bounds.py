"""Check the error bounds that a certified method gives with its answers, against attention in float64.

The queries, keys and values are those of a model, recorded on a few samples (`kvfloor.audit.traces`). An error is the
2-norm of an answer's difference from exact attention over the tokens as they were given, divided by the largest norm of
a value that the query sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfloor.audit.traces import Trace
from kvfloor.core.method import Method
from kvfloor.logits import capped
from kvfloor.methods.tiered.tiered import TieredState

_OWN = 1e-12  # error of this check's own arithmetic, in float64


@dataclass(frozen=True)
class Bounds:
    """Hold what a check of bounds found, over all layers that certify their answers.

    checked     number of answers that were compared, one for each query head of each token asked about
    bound       the largest bound of an answer; None if one was infinite
    error       the largest error of an answer
    violations  number of answers that err more than their bound: any is a fault of the method
    """

    checked: int
    bound: float | None
    error: float
    violations: int


def check_bounds(traces: Sequence[Trace], method: Method) -> Bounds | None:
    """Return what a method's bounds are worth on these traces, one per layer; None if no layer certifies its answers.

    A new state gets all of a trace's tokens, and is asked the queries of the question and the answer. The method's
    budget must be in tokens per kv head.
    """
    bounds, errors, violations = [0.0], [0.0], 0
    checked = 0
    for place, trace in enumerate(traces):
        state = method.of_layer(place).open(trace.spec(len(trace.k)))
        if not isinstance(state, TieredState):
            continue
        state.append(trace.k, trace.v, trace.present)
        real = trace.present[:, None, -trace.asked :].expand(-1, trace.q.shape[1], -1)
        q = trace.q[:, :, -trace.asked :].masked_fill(~real.unsqueeze(-1), 0)
        found = state.read_certified(q)
        largest = found.largest.double()
        error = (found.partial.mean.double() - _exact(trace, q)).norm(dim=-1)
        violations += int(((error > found.bound.double() + _OWN * largest) & real).sum())
        checked += int(real.sum())
        bounds.append(float(found.relative[real].max()))
        errors.append(float((error / largest.clamp_min(1e-300))[real].max()))
    if not checked:
        return None
    return Bounds(checked, max(bounds) if max(bounds) < math.inf else None, max(errors), violations)


def _exact(trace: Trace, q: Tensor) -> Tensor:
    """Return attention of q (rows, g, asked, d) over all tokens of a trace: (rows, g, asked, dv), float64."""
    k, v = (x.double().unsqueeze(1) for x in (trace.k, trace.v))
    logits = capped(q.double() @ k.mT * trace.scale, trace.softcap)
    return torch.softmax(logits.masked_fill(~trace.present[:, None, None], -torch.inf), -1) @ v
