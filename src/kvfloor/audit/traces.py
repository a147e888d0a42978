"""Measure the attention-output error of a method against exact attention, on the real queries of a model.

An error is ||output - exact|| / ||exact||: `output` is the attention output under the method, `exact` that of exact
attention for the same queries. A sample is a context with a question and its right answer. A trace is one layer's
queries, keys and values on a few samples. A rank is a process that holds some heads of a model sharded by tensor
parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.core.exact import Exact
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.ranks import Ranks
from kvfloor.hf.recording import Recorded, Recorder


@dataclass
class Trace:
    """Hold one layer's recorded queries, keys and values on a few samples.

    A row is one kv head on one sample, in the order of the samples and then of the heads. g is the size of the GQA
    group, n the number of tokens, padding included, and d and dv are the widths of a key and a value.

    layer     number of the layer, as the model counts it
    q         (rows, g, n, d), queries
    k, v      (rows, n, d) and (rows, n, dv), keys and values
    present   (rows, n), False on padding
    scale     factor on q.k
    softcap   c in c * tanh(logit / c); None: logits are not capped
    kv_heads  number of kv heads of the layer
    asked     number of tokens at the end that are the question's and the answer's; the tokens before them are the
              context's
    exact     (rows, g, asked, dv), outputs of exact attention on these last tokens
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


def token_bytes(model: PreTrainedModel) -> int:
    """Return the bytes that the queries, keys and values of one token of one sample take in the traces of all layers.

    All heads of the model count: on a sharded model too, the traces on each rank hold those of all ranks.
    """
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers * width * (heads + 2 * kv_heads) * model.dtype.itemsize


def record(model: PreTrainedModel, contexts: Sequence[Sequence[int]], asks: Sequence[Sequence[int]]) -> list[Trace]:
    """Run the model with an exact cache over each context, question and right answer; return one trace per layer.

    contexts  token ids of the contexts, one list per sample
    asks      token ids of question and answer, one list per sample
    Traces are on the CPU. On a sharded model every rank calls this, and gets the traces of all kv heads.
    """
    cache = CompressedCache(model.config, "exact")
    seen = Recorder(cache.compressed)
    dialogue = Dialogue.start(model, cache, len(contexts))
    dialogue.feed(contexts)
    dialogue.feed(asks)
    traces = []
    for layer in cache.compressed:
        one = of_all_heads(seen.of(layer.index), cache.ranks)
        kv_heads = one.k.shape[1]
        present = dialogue.mask.cpu().to(torch.bool).repeat_interleave(kv_heads, 0)
        trace = Trace(
            layer.index, *one.by_row, present, one.scale, one.softcap, kv_heads, one.last, exact=torch.empty(0)
        )
        trace.exact = replay(trace, Exact())
        traces.append(trace)
    return traces


def of_all_heads(mine: Recorded, ranks: Ranks) -> Recorded:
    """Join one layer's queries, keys and values of all ranks along their heads, and return them on the CPU.

    mine: the recording of this rank's heads. Every rank must make this call.
    """
    parts = ranks.gather("traces.record()", tuple(x.cpu() for x in (mine.q, mine.k, mine.v)))
    if len(parts) == 1:
        return replace(mine, **dict(zip("qkv", parts[0], strict=True)))
    q, k, v = (torch.cat(heads, 1) for heads in zip(*parts, strict=True))
    return replace(mine, q=q, k=k, v=v)


def spec_of(trace: Trace) -> Spec:
    """Return the spec of a state for the rows of a trace."""
    rows, _, d = trace.k.shape
    places = [(trace.layer, row % trace.kv_heads) for row in range(rows)]
    return Spec(rows, d, trace.v.shape[2], trace.scale, trace.softcap, trace.k.dtype, places=places)


def replay(trace: Trace, method: Method) -> Tensor:
    """Return a method's attention outputs for the last `asked` queries of a trace: (rows, g, asked, dv), float32.

    A new state of the method gets the context's tokens. Then it is told that the prompt ends (`seal`), and gets the
    last `asked` tokens. The method's budget must be in tokens per kv head. A row is one kv head on one sample; g is the
    size of the GQA group, and dv the width of a value.
    """
    state = method.open(spec_of(trace))
    cut = trace.k.shape[1] - trace.asked
    state.step(trace.q[:, :, :cut], trace.k[:, :cut], trace.v[:, :cut], trace.present[:, :cut])
    state.seal()
    return state.step(trace.q[:, :, cut:], trace.k[:, cut:], trace.v[:, cut:], trace.present[:, cut:]).float()


def errors(traces: Sequence[Trace], method: Method) -> list[list[float]]:
    """Return a method's relative l2 error of the attention output, per layer and kv head: [layer][kv head].

    `traces` has one entry per layer. The method's budget must be in tokens per kv head. A norm is over all samples, the
    query heads of the GQA group, the tokens of question and answer, and the width of a value.
    """
    table = []
    for place, trace in enumerate(traces):
        answers = replay(trace, method.of_layer(place))
        real = trace.present[:, -trace.asked :, None].unsqueeze(1)
        shape = (-1, trace.kv_heads, *answers.shape[1:])
        wrong = ((answers - trace.exact) * real).view(shape).square().sum((0, 2, 3, 4))
        whole = (trace.exact * real).view(shape).square().sum((0, 2, 3, 4))
        table.append((wrong / whole.clamp_min(1e-30)).sqrt().tolist())
    return table
