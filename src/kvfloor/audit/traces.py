"""Measure the attention-output error: a method against exact attention, on a real model's queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.core.exact import Exact
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.recording import Recorder


@dataclass
class Trace:
    """Hold one layer's recorded stream of a few samples: q (rows, g, n, d), k and v (rows, n, .), present (rows, n).

    The last `asked` slots hold the question and the answer, the slots before them the context.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    present: Tensor
    scale: float
    softcap: float | None
    kv_heads: int
    asked: int
    exact: Tensor  # exact attention's answers to the last `asked` queries: (rows, g, asked, dv), float32


def record(model: PreTrainedModel, contexts: Sequence[Sequence[int]], asks: Sequence[Sequence[int]]) -> list[Trace]:
    """Run the model with the exact cache over context, question and right answer, and record each layer's stream."""
    cache = CompressedCache(model.config, "exact")
    seen = Recorder(cache.compressed)
    dialogue = Dialogue.start(model, cache, len(contexts))
    dialogue.feed(contexts)
    dialogue.feed(asks)
    traces = []
    for layer in cache.compressed:
        one = seen.of(layer.index)
        kv_heads = one.k.shape[1]
        present = dialogue.mask.to(torch.bool).repeat_interleave(kv_heads, 0)
        trace = Trace(
            layer.index, *one.by_row, present, one.scale, one.softcap, kv_heads, one.last, exact=torch.empty(0)
        )
        trace.exact = replay(trace, Exact())
        traces.append(trace)
    return traces


def replay(trace: Trace, method: Method) -> Tensor:
    """Feed the trace to a method, and return its answers (rows, g, asked, dv), float32, to the last queries.

    The method's budget must be in tokens already.
    """
    rows, _, d = trace.k.shape
    places = [(trace.layer, row % trace.kv_heads) for row in range(rows)]
    spec = Spec(rows, d, trace.v.shape[2], trace.scale, trace.softcap, trace.k.dtype, places=places)
    state = method.open(spec)
    cut = trace.k.shape[1] - trace.asked
    state.step(trace.q[:, :, :cut], trace.k[:, :cut], trace.v[:, :cut], trace.present[:, :cut])
    state.seal()
    return state.step(trace.q[:, :, cut:], trace.k[:, cut:], trace.v[:, cut:], trace.present[:, cut:]).float()


def errors(traces: Sequence[Trace], method: Method) -> list[list[float]]:
    """Compute the relative l2 error of the attention output per layer and kv head: ||answers - exact|| / ||exact||.

    Norms run over the samples, the group's heads, the question's and answer's tokens and the head width.
    """
    table = []
    for trace in traces:
        answers = replay(trace, method)
        real = trace.present[:, -trace.asked :, None].unsqueeze(1)
        shape = (-1, trace.kv_heads, *answers.shape[1:])
        wrong = ((answers - trace.exact) * real).view(shape).square().sum((0, 2, 3, 4))
        whole = (trace.exact * real).view(shape).square().sum((0, 2, 3, 4))
        table.append((wrong / whole.clamp_min(1e-30)).sqrt().tolist())
    return table
