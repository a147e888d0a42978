"""Choose the method of each layer for a model and a number of bytes, from costs that were measured on this model.

A compressed layer is one with attention over all tokens, whose keys and values a kvfloor method stores. The cost of a
method in a layer is measured with all other layers exact (`kvfloor.methods.mixed.costs`). The costs of all layers are
added up as if they did not influence each other, so the sum is only a prediction; measure the result with
`kvfloor audit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.core.budget import size_bytes
from kvfloor.core.method import Method
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.hf.held import held_bytes
from kvfloor.hf.layer_shape import LayerShape
from kvfloor.hf.layers import watched_cache
from kvfloor.hf.prepare import is_prepared
from kvfloor.hf.ranks import ranks_of
from kvfloor.hf.weights import input_device
from kvfloor.hf.wrappers import unwrapped
from kvfloor.methods.grammar import parse
from kvfloor.methods.mixed.auto import COMMAND, Auto
from kvfloor.methods.mixed.choice import CacheOption, OptionChoice, cheapest, smallest
from kvfloor.methods.mixed.costs import CostTable, read_costs
from kvfloor.methods.mixed.layered import Layered
from kvfloor.validation import whole


def choose_layers(model: PreTrainedModel, method: Auto | str, context: int) -> Layered:
    """Return the method of each layer that `method`, such as "auto(rows='rows.json')@64MiB", asks for.

    model    the prepared model, on which the costs in the file `rows` were measured. It runs over one token
    context  length in tokens at which the bytes hold: those of one request's states in the model's dtype after a prompt
             of so many tokens
    `CompressedCache` calls this for each new cache; give it the result, to choose once for many caches.
    Raises ValueError if no rows are given, if they are of another model, and for bytes too few for the smallest of the
    measured options.
    """
    asked = parse(method) if isinstance(method, str) else method
    if not isinstance(asked, Auto) or not isinstance(asked.budget, str):
        raise ValueError(f"{asked} asks for no bytes to divide among the layers: give auto(rows='rows.json')@64MiB")
    whole("context", context)
    table = _rows_for(model, asked)
    shapes, dtype = cache_shapes(model)
    if len(shapes) != table.layers:
        raise ValueError(f"{asked.rows!r} has costs of {table.layers} layers; this model has {len(shapes)}")
    try:
        return choose(table, size_bytes(asked.budget) or 0, shapes, context, dtype)[0]
    except ValueError as cause:
        raise ValueError(f"{asked} after {context:,} tokens: {cause}") from None


def choose(
    table: CostTable, most_bytes: int, shapes: Sequence[LayerShape], context: int, dtype: torch.dtype
) -> tuple[Layered, OptionChoice]:
    """Return the methods of all layers with the least sum of measured costs, and that sum with its bytes.

    most_bytes  bytes of one request's states after a prompt of `context` tokens, with keys and values of `dtype`
    shapes      sizes of the compressed layers
    Raises ValueError for bytes too few for the smallest options.
    """
    options = _options(table, shapes, context, dtype)
    found = cheapest(options, most_bytes)
    return _layered(table, options, found), found


def choose_smallest(
    table: CostTable, most_nats: float, shapes: Sequence[LayerShape], context: int, dtype: torch.dtype
) -> tuple[Layered, OptionChoice]:
    """Return the smallest methods of all layers whose measured costs add up to at most `most_nats`, and that sum.

    The other arguments are those of `choose`. Raises ValueError if all measured options cost more.
    """
    options = _options(table, shapes, context, dtype)
    found = smallest(options, most_nats)
    return _layered(table, options, found), found


def _options(
    table: CostTable, shapes: Sequence[LayerShape], context: int, dtype: torch.dtype
) -> list[list[CacheOption]]:
    """Return each unit's options with their bytes; the arguments are those of `choose`."""
    known: dict[tuple[object, ...], int] = {}

    def sized(method: str, place: int) -> int:
        one = shapes[place]
        sizes = (method, one.heads, one.d, one.dv, one.g, one.tied)
        if sizes not in known:
            known[sizes] = held_bytes(parse(method), (one,), context, dtype, 1)[1].after
        return known[sizes]

    return [
        [
            CacheOption(row.method, sum(sized(row.method, place) for place in range(first, last + 1)), row.nats)
            for row in rows
        ]
        for (first, last), rows in table.units()
    ]


def _layered(table: CostTable, options: list[list[CacheOption]], found: OptionChoice) -> Layered:
    """Return the methods of all layers that a choice among the units' options stands for."""
    methods: list[Method] = []
    for ((first, last), _), unit, index in zip(table.units(), options, found.picks, strict=True):
        methods += [parse(unit[index].method)] * (last + 1 - first)
    return Layered(tuple(methods))


def cache_shapes(model: PreTrainedModel) -> tuple[tuple[LayerShape, ...], torch.dtype]:
    """Return the sizes of a prepared model's compressed layers and the dtype of their keys, seen on one token.

    The heads are those of the whole model, also if it is sharded. Raises ValueError for a model that is not prepared.
    """
    if not is_prepared(model):
        raise ValueError(
            f"{type(model).__name__} does not use kvfloor's attention: call kvfloor.hf.prepare(model) first"
        )
    inner = unwrapped(model)
    cache, layers = watched_cache(inner.config)
    found: dict[int, tuple[LayerShape, torch.dtype]] = {}
    ranks = ranks_of(inner).count

    def recorder(index: int) -> Callable[..., None]:
        def record(q: Tensor, k: Tensor, v: Tensor, *law: Any) -> None:
            del law
            shape = LayerShape(
                index, k.shape[1] * ranks, k.shape[-1], v.shape[-1], q.shape[1] // k.shape[1], tied=v is k
            )
            found.setdefault(index, (shape, k.dtype))

        return record

    for layer in layers:
        layer.record = recorder(layer.index)
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.int64, device=input_device(inner)), past_key_values=cache, use_cache=True)
    shapes = [found[layer.index] for layer in layers]
    return tuple(shape for shape, _ in shapes), shapes[0][1]


def _rows_for(model: PreTrainedModel, asked: Auto) -> CostTable:
    """Return the costs in the file that `asked` names; raise ValueError if there is none, or it is of another model."""
    measure = f"measure them with: {COMMAND} (or kvfloor.audit.layer_costs.measure_layers)"
    if not asked.rows:
        raise ValueError(f"{asked} names no costs of this model's layers; {measure}; then auto(rows='ROWS.json')")
    table, here = read_costs(asked.rows), fingerprint(model)
    if dict(table.model) != here:
        raise ValueError(
            f"the costs in {asked.rows!r} are of another model than this {here['model']} (weights, dtype or "
            f"configuration differ: digest {str(table.model.get('sha256'))[:12]} there, {here['sha256'][:12]} here); "
            f"{measure}"
        )
    return table
