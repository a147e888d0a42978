"""Compute the memory plan of a model at a context length, from its configuration alone.

A line of the plan is one way to keep the KV cache: in transformers' own classes, in this library's exact cache (which
keeps every token), in a quantised one, or by a compression method under a budget. A `ModelShape` has the sizes of the
model's layers. Compressed layers are the layers with attention over all tokens: their cache depends on the line. A
state is what a method keeps of one compressed layer's tokens. In all other layers (sliding windows, convolutions,
linear attention) transformers' own classes keep the past, whatever the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from kvfloor import floors
from kvfloor.core.budget import parse_budget, size_bytes
from kvfloor.core.method import Method, standard_law
from kvfloor.core.spec import DTYPES
from kvfloor.hf.held import held_bytes
from kvfloor.hf.layer_shape import LayerShape
from kvfloor.hf.shapes import ModelShape, model_shape
from kvfloor.methods.grammar import parse
from kvfloor.models.configuration import configuration
from kvfloor.models.load import BUILTIN
from kvfloor.splitting import shortened
from kvfloor.validation import one_of, relative_error, whole

BASELINES = ("exact", "quant(bits=8)", "quant(bits=4)")
METHODS, BUDGETS = ("sinks", "h2o"), ("25%",)
STOCK = "stock"
_VALUES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
PLANNED_DTYPES = tuple(_VALUES)


@dataclass(frozen=True)
class Line:
    """Hold the bytes that the cache of the whole batch takes if it is kept in one of the ways that a plan compares.

    method           the method as text, with its budget; "stock" is transformers' own cache
    budget_tokens    the budget in tokens per kv head; None if the method has none
    state_bytes      bytes of the compressed layers' states after the prompt, which is the whole context
    cache_bytes      `state_bytes` plus the bytes of all other layers
    prompt_bytes     the most bytes at any time: more than `cache_bytes` for methods that hold the whole prompt before
                     they compress it
    requests         number of requests with this context whose caches fit into memory beside the weights; None if no
                     memory size was given
    longest_context  estimate of the longest context, in tokens, for which one request's cache fits into memory beside
                     the weights; bytes are taken as proportional to the context. None if no memory size was given, or
                     if the cache does not grow
    grows            True if the cache grows with the context
    """

    method: str
    budget_tokens: int | None
    state_bytes: int
    cache_bytes: int
    prompt_bytes: int
    requests: int | None
    longest_context: int | None
    grows: bool


@dataclass(frozen=True)
class MemoryPlan:
    """Hold the memory that a model takes at a context length, in bytes: the whole model, not one process's part of it.

    model              the model's name or path; model_type: its type in transformers, such as "llama"
    dtype              of the weights, and of keys and values
    context            tokens of each request; batch: number of requests that share the cache
    trained_positions  largest context that the model was trained for; None where the configuration does not say
    parameters         number of weights; weights_bytes: their bytes
    memory_bytes       the memory that weights and caches must fit into; None: not limited
    compressed_layers  number of layers with attention over all tokens; window_layers: with a sliding window
    own_bytes          bytes of the cache in all but the compressed layers: sliding windows, convolution and linear
                       states
    floor_eta          relative error that answers may have, for which the floor is told; None: any error below 1
    floor_bytes        the floor: bytes that any method provably needs, on worst-case keys and values, for the whole
                       batch, summed over the layers for which the bound is known
    floor_layers       number of these layers: all with full or sliding-window attention, unless one tensor is both key
                       and value (latent attention)
    lines              one entry per way to keep the cache
    """

    model: str
    model_type: str
    dtype: str
    context: int
    batch: int
    trained_positions: int | None
    parameters: int
    weights_bytes: int
    memory_bytes: int | None
    compressed_layers: int
    window_layers: int
    own_bytes: int
    floor_eta: float | None
    floor_bytes: int
    floor_layers: int
    lines: tuple[Line, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dict of JSON types; its key "schema" has the version of the dict's layout, 1."""
        return {"schema": 1, **asdict(self), "lines": [asdict(line) for line in self.lines]}


def plan(
    model: str | Path = BUILTIN,
    context: int = 8192,
    *,
    batch: int = 1,
    memory: str | int | None = None,
    methods: Sequence[str] | None = None,
    budgets: Sequence[str] | None = None,
    dtype: str = PLANNED_DTYPES[0],
    eta: float | None = None,
    config: PreTrainedConfig | None = None,
) -> MemoryPlan:
    """Return the memory plan of a model, from its configuration: no weights are loaded and the model does not run.

    model    "builtin", the name of a published model that was fetched before, a model's folder, or a config.json file
    context  tokens of each request's prompt, which is read in one forward
    batch    requests that share one cache
    memory   bytes for weights and caches, or a text such as "24GiB"; None: not limited
    methods  texts of methods, such as "h2o@512" or "h2o", to plan besides transformers' own cache, exact, quant(bits=8)
             and quant(bits=4), which every plan has; None: sinks and h2o
    budgets  budgets, such as "512" (tokens) or "25%" (of the context), each of which is planned for those of `methods`
             that have no budget of their own; None: 25%. If `methods` is None too, a method is left out if 25% is no
             more than the tokens that the method never evicts
    dtype    bfloat16, float16 or float32: of the weights, and of keys and values
    eta      relative error that answers may have, in [0, 1): the floor is that of values of `dtype`. None: the floor
             that holds for every eta below 1, that of values of one bit
    config   the model's configuration, instead of the one of `model`
    Raises ValueError for bad input, and for a memory that does not hold the weights.
    """
    whole("context", context)
    whole("batch", batch)
    one_of("dtype", dtype, PLANNED_DTYPES)
    values = "binary" if eta is None else _VALUES[dtype]
    eta = None if eta is None else relative_error(eta)
    total = None if memory is None else _memory(memory)
    chosen = _methods(METHODS if methods is None else methods, BUDGETS if budgets is None else budgets)
    asked = methods is not None or budgets is not None
    kind = DTYPES[dtype]
    about: PreTrainedConfig = configuration(model) if config is None else config
    shape = model_shape(about, kind, batch)
    weights = shape.parameters * kind.itemsize
    free = None if total is None else total - weights
    if free is not None and free < 0:
        raise ValueError(
            f"the weights take {weights:,} bytes in {dtype}, and the memory has {total:,}: {-free:,} bytes are missing"
        )
    lines = [_line(STOCK, None, _stock(shape, context, kind.itemsize, batch), None, shape, context, batch, free)]
    for method in chosen:
        try:
            sized, held = held_bytes(method, shape.compressed, context, kind, batch)
        except ValueError:
            if asked:
                raise
            continue  # a quarter of this context has no room beside the tokens that the method protects
        tokens = sized.budget if isinstance(sized.budget, int) else None
        sizes = (held.after, held.before)
        lines.append(_line(str(method), tokens, sizes, method, shape, context, batch, free))
    bounded = [layer for layer in (*shape.compressed, *shape.windows) if not layer.tied]
    return MemoryPlan(
        model=str(model),
        model_type=about.model_type,
        dtype=dtype,
        context=context,
        batch=batch,
        trained_positions=_positions(about),
        parameters=shape.parameters,
        weights_bytes=weights,
        memory_bytes=total,
        compressed_layers=len(shape.compressed),
        window_layers=len(shape.windows),
        own_bytes=shape.own_bytes(context),
        floor_eta=eta,
        floor_bytes=sum(_floor(layer, context, batch, eta or 0.0, values) for layer in bounded),
        floor_layers=len(bounded),
        lines=tuple(lines),
    )


def _memory(memory: str | int) -> int:
    total = size_bytes(memory) if isinstance(memory, str) else whole("memory", memory)
    if not total:
        raise ValueError(f"memory {shortened(str(memory))}: give a size such as 24GiB, 800MiB or 80GB")
    return total


def _methods(methods: Sequence[str], budgets: Sequence[str]) -> list[Method]:
    """Return the methods to plan: the exact and the quantised caches, which every plan has, then `methods` parsed.

    A method without a budget of its own comes once with each of `budgets`, unless no budget can bound it; equal methods
    come once. Raises ValueError if a method needs a budget and `budgets` is empty, and for a method of another
    attention than softmax(q.k), such as tensor attention (over pairs of tokens).
    """
    sizes = [parse_budget(text) for text in budgets]
    found = [parse(text) for text in BASELINES]
    for text in methods:
        method = standard_law(parse(text), "a plan")
        if method.budget is not None or method.with_budget(2**20) is None:
            found.append(method)
        elif sizes:
            found += [bounded for size in sizes if (bounded := method.with_budget(size)) is not None]
        else:
            raise ValueError(f"{method} has no budget, so nothing bounds it: write {method}@512, or give budgets")
    return list({str(method): method for method in found}.values())


def _stock(shape: ModelShape, context: int, itemsize: int, batch: int) -> tuple[int, int]:
    """Return the bytes of the compressed layers' keys and values in transformers' own cache, as (after, before).

    For a method, these are the bytes after and before the compression at the prompt's end. Here nothing is compressed,
    so the two are equal. shape: the model's sizes; context: tokens per request; itemsize: bytes of a number; batch:
    number of requests.
    """
    per_token = sum(layer.heads * (layer.d + (0 if layer.tied else layer.dv)) for layer in shape.compressed)
    size = batch * context * per_token * itemsize
    return size, size


def _line(
    name: str,
    budget_tokens: int | None,
    sizes: tuple[int, int],
    method: Method | None,
    shape: ModelShape,
    context: int,
    batch: int,
    free: int | None,
) -> Line:
    """Build a line of the plan, for one way to keep the cache.

    name           the method as text
    budget_tokens  tokens per kv head that the method may keep; None: any number
    sizes          (after, before): bytes of the compressed layers' states after and before the compression at the
                   prompt's end
    method         the method; None for transformers' own cache
    shape          the model's sizes, among them the bytes of the layers that are not compressed
    context        tokens per request; batch: number of requests
    free           bytes of memory that the weights leave; None: not limited
    """
    after, before = sizes
    own = shape.own_bytes(context)
    share = method is not None and isinstance(method.budget, str) and method.budget.endswith("%")
    grows = method is None or share or not method.traits.constant_memory
    requests = longest = None
    if free is not None:
        requests = free * batch // (after + own)
        if grows:
            widest = max([context, *(layer.window or 0 for layer in shape.windows)])
            left = free * batch - shape.own_bytes(widest)
            longest = max(0, left) * context // max(after, before)
    return Line(name, budget_tokens, after, after + own, max(after, before) + own, requests, longest, grows)


def _floor(layer: LayerShape, context: int, batch: int, eta: float, values: str) -> int:
    attention = "standard" if layer.window is None else "window"
    return floors.space(
        context, layer.d, layer.dv, attention=attention, window=layer.window, eta=eta, heads=layer.heads, layers=batch,
        values=values,
    ).bytes  # fmt: skip


def _positions(config: PreTrainedConfig) -> int | None:
    try:
        found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    except RuntimeError:  # transformers raises it if a field varies from layer to layer
        return None
    return found if isinstance(found, int) else None
