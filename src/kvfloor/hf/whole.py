"""Join the parts of one cache that the ranks of a sharded model hold, and take one rank's part out of a whole cache.

A rank is one of the processes over which the model is sharded. Rank r of n holds the r-th of n equal runs of every
layer's kv heads; its part of the cache is what is stored for these heads. A whole cache, state or layer has the kv
heads of all ranks. A row is the stream of one (batch item, kv head), and the rows of a state (a compressed layer's
memory) are ordered by batch item and then by kv head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.budget import tokens, with_budget
from kvfloor.core.memory import joined
from kvfloor.core.method import Method, rebuilt
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from kvfloor.hf import other_layers as stock
from kvfloor.hf.opener import own_rows
from kvfloor.hf.promise import joined_entries
from kvfloor.hf.ranks import Ranks

_BY_ROW = ("tokens", "held", "evicted", "row_bytes")
_SUMMED = ("heads", "state_bytes", "staged_bytes")


def row_budgets(state: State | None) -> tuple[int, ...]:
    """Return the budget of every row of a state in tokens; an empty tuple without a state or without a budget."""
    budget = None if state is None else state.method.budget
    return () if state is None or budget is None else tuple(tokens(budget, state.spec.rows))


def _with_budgets(method: Method, budgets: Sequence[int]) -> Method:
    """Return the method with these budgets of its rows in tokens, as one number if they are all equal.

    Returns the method itself if `budgets` is empty.
    """
    if not budgets:
        return method
    return with_budget(method, tuple(budgets) if len(set(budgets)) > 1 else budgets[0])


def whole_entry(parts: Sequence[tuple[dict[str, Any], tuple[int, ...]]], method: Method | None) -> dict[str, Any]:
    """Return one layer's entry in the report of the whole cache (`CompressedCache.report`), from every rank's entry.

    parts   every rank's entry for the layer, with the budgets of its rows (`row_budgets`), in the order of ranks
    method  the layer's method on this rank; None if nothing was fed to the layer
    """
    entries, budgets = zip(*parts, strict=True)
    first, heads = entries[0], entries[0]["heads"]
    batch = len(first["tokens"]) // heads if heads else 0
    order = _order(batch, heads, len(entries)).tolist()

    def in_order(lists: Sequence[Sequence[Any]]) -> list[Any]:
        listed = [one for rows in lists for one in rows]
        return [listed[row] for row in order] if listed else []

    told = first | {name: in_order([entry[name] for entry in entries]) for name in _BY_ROW}
    told |= {name: sum(entry[name] for entry in entries) for name in _SUMMED}
    if method is not None:
        told["method"] = str(_with_budgets(method, in_order(budgets)))
    told["certified"] = joined_entries([entry["certified"] for entry in entries])
    stated = [entry["guarantee"] for entry in entries]
    if stated[0] is not None:  # of all rows: the weakest
        told["guarantee"] = max(stated, key=lambda one: (not one["holds"], one["epsilon"]))
    return told


def _order(batch: int, heads: int, count: int) -> Tensor:
    """Return the indices (rows,) that sort rows, listed rank by rank, into the order of the whole cache.

    batch: number of batch items; heads: kv heads of one rank; count: number of ranks. Entry i is the index in the list
    of the row that comes i-th in the whole cache.
    """
    return torch.arange(count * batch * heads).view(count, batch, heads).transpose(0, 1).flatten()


@dataclass(frozen=True)
class LayerPart:
    """Hold one rank's part of one cache layer, as it is sent to rank 0 for saving.

    plain    the layer's description, JSON-ready, as `kvfloor.hf.saved` writes it to a file
    fields   the layer's tensors by name, on the CPU
    budgets  of the layer's method, one number of tokens per row; empty without a state or a budget
    """

    plain: dict[str, Any]
    fields: dict[str, Any]
    budgets: tuple[int, ...]


def part_of(plain: dict[str, Any], fields: dict[str, Any], state: State | None) -> LayerPart:
    """Return this rank's part of a layer, given its description, its tensors by name on any device, and its state."""
    return LayerPart(plain, _on_cpu(fields), row_budgets(state))


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_cpu(inner) for name, inner in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def whole_layers(
    parts: Sequence[Sequence[LayerPart]], methods: Sequence[Method | None]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Join the ranks' parts: return (description, tensors) of every layer of a cache, with all kv heads.

    parts    the layers' parts, of every rank, in the order of ranks
    methods  rank 0's method of every layer, None where it has no state
    Raises ValueError if an attribute that is not divided by kv heads differs between ranks.
    """
    return [_whole_layer(layer, method) for layer, method in zip(zip(*parts, strict=True), methods, strict=True)]


def _whole_layer(parts: Sequence[LayerPart], method: Method | None) -> tuple[dict[str, Any], dict[str, Any]]:
    plain, fields = parts[0].plain, dict(parts[0].fields)
    if "clocks" not in plain:
        return plain, _whole_stock([part.fields for part in parts], plain["layer"])
    fields["beside"] = _whole_stock([part.fields["beside"] for part in parts], plain["layer"])
    if method is None:
        return plain, fields
    specs = [Spec.from_dict(part.plain["spec"]) for part in parts]
    spec = replace(
        specs[0],
        rows=sum(one.rows for one in specs),
        row_ids=[row for one in specs for row in one.row_ids or ()],
        places=[place for one in specs for place in one.places or ()],
    )
    method = _with_budgets(method, [budget for part in parts for budget in part.budgets])
    state = rebuilt(method, spec.as_dict(), joined([part.fields["state"] for part in parts]), "cpu")
    batch = plain["clocks"]["batch"]
    state.select_rows(_order(batch, specs[0].rows // batch, len(parts)))
    fields["state"] = state.export()
    return plain | {"method": str(state.method), "spec": state.spec.as_dict()}, fields


def _whole_stock(parts: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Join the attributes of a layer of transformers' own class, given as one dict of attributes per rank.

    Keys and values are joined along their kv heads. Everything else must be the same on all ranks. name: the layer's
    class, for the error.
    """
    found = {}
    for attribute, value in parts[0].items():
        others = [part[attribute] for part in parts]
        if attribute in stock.BY_HEAD and isinstance(value, Tensor) and value.ndim == 4:
            found[attribute] = torch.cat(others, 1)
        elif all(_equal(value, other) for other in others):
            found[attribute] = value
        else:
            raise ValueError(
                f"the ranks hold different numbers in {name}.{attribute}, which is not divided by kv heads: this "
                f"model's cache cannot be saved while it is sharded"
            )
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    return bool(type(one) is type(other) and one == other)


def own_part(state: State, batch: int, ranks: Ranks, device: torch.device) -> State:
    """Cut a whole state of `batch` batch items, on the CPU, down to the rows of this rank's kv heads, on `device`."""
    state.select_rows(own_rows(ranks, batch, state.spec.rows // batch))
    return state if device.type == "cpu" else state.method.from_bytes(state.to_bytes(), device)


def own_stock(fields: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Return the saved attributes `fields` of a layer, with keys and values cut down to this rank's kv heads."""
    if ranks.count == 1:
        return fields
    cut = {name: fields[name] for name in stock.BY_HEAD if isinstance(fields.get(name), Tensor)}
    return fields | {name: x.chunk(ranks.count, 1)[ranks.rank].contiguous() for name, x in cut.items() if x.ndim == 4}
