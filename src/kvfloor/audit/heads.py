"""Compare three sizes in bytes for each kv head: its floor, its cheapest good setting and its exact cache.

The floor is a lower bound on the bytes that any method must hold to answer queries over the head's keys. A setting is a
method with its budget; it is good for a head if the relative error of the head's attention output is at most 0.1
(GOOD). The exact cache keeps every token. A cell is a task at a context length under a protocol (question asked before
or after the compression). Floors are measured on one sample of a cell, or on a text.

A group is one token, or several with nearly the same key. A query reads a group if its attention weight on the group is
so large that the group's value can be recovered from the attention output. Each floor here is a read floor for a set of
queries: a number of bytes that every method must hold if, for each of these queries, its attention output has an
additive error of at most eta with probability 0.9 (P), whatever the values in [-1, 1] are. eta is the head's own: good
settings err by no more on the recorded queries (`good_error`). One such set is all queries whose norm is at most the
largest recorded one. A head is compressible if the queries of this set can read at most a quarter (COMPRESSIBLE) as
many groups as the context has tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from kvfloor.audit.nats import TextCell
from kvfloor.audit.rows import Cell
from kvfloor.audit.traces import Trace
from kvfloor.floors.measured import Limit, Readable, Stopped, causal_mass, readable_by, readable_within, volume_by
from kvfloor.hf.calibrate import P

GOOD = 0.1  # largest relative l2 error of a head's output at which a setting counts as good for it
MOST_ETA = 0.25  # of values in [-1, 1]: a head whose outputs are large is measured at no larger error
COMPRESSIBLE = 0.25  # a head is called compressible if queries can read at most this share of the context's tokens
MOST_TOKENS = 32_768  # longer contexts are left out: the time to compute the floor grows with the square
WEIGHED = 8192
"""Number of tokens whose queries are weighed at most for one floor, so that each takes seconds.

A search that stops after them tells so. It depends on nothing else, so an audit's floors can be had again.
"""
MOST_WORK = 2**25
"""Number of kv heads times the square of the tokens that is measured at most on one cell; fewer heads are otherwise."""

FEWEST_HEADS = 2  # measured on a cell, however many its tokens


class Erring(Protocol):
    """Define the fields that this file uses of a setting's result on one cell or text.

    method                the setting as text
    cell                  the cell or text
    state_bytes           bytes of the setting's whole cache
    output_error_by_head  relative error of the attention output: (layers, kv heads)
    """

    @property
    def method(self) -> str: ...
    @property
    def cell(self) -> Cell | TextCell: ...
    @property
    def state_bytes(self) -> int: ...
    @property
    def output_error_by_head(self) -> tuple[tuple[float, ...], ...]: ...


@dataclass(frozen=True)
class HeadFloor:
    """Hold the read floors of one kv head on one recorded sample of a cell, or on a text. Bytes are of this head alone.

    cell               the cell or text
    layer, head        number of the layer as the model counts it, and of the kv head in it
    position           index of the layer among those whose cache is compressed: the first index of the settings' tables
                       of errors by layer and head
    tokens             number of tokens of the context
    readable_groups    number of groups that queries can read whose norm is at most the largest recorded norm
    floor_bytes        read floor for all queries whose norm is at most the largest recorded norm
    asked_floor_bytes  floor for the queries that were recorded after the context: of read and volume floor the larger
    exact_bytes        bytes of the context's keys and values
    eta                the error that the floors allow in an output, for values in [-1, 1] (`good_error`)
    weighed            number of tokens whose queries were weighed for `readable_groups` if not all were: these are at
                       least the groups that can be read; None: all
    """

    cell: Cell | TextCell
    layer: int
    head: int
    position: int
    tokens: int
    readable_groups: int
    floor_bytes: int
    asked_floor_bytes: int
    exact_bytes: int
    eta: float = MOST_ETA
    weighed: int | None = None


def with_cell(read: HeadFloor) -> HeadFloor:
    """Return a floor that was read from a JSON file, with its `cell` as a named tuple again.

    JSON has plain lists only. The named tuple is a `TextCell` for a text, and a `Cell` for a cell of a task.
    """
    plain: Any = read.cell
    return replace(read, cell=TextCell(*plain) if isinstance(plain[2], int) else Cell(*plain))


@dataclass(frozen=True)
class Head:
    """Hold one kv head's largest floor over all cells and texts, and its cheapest setting that is good on all of them.

    Every number but `layer`, `head` and `eta` is the largest over the cells and texts.

    layer, head        number of the layer as the model counts it, and of the kv head in it
    readable_share     number of groups that queries can read whose norm is at most the largest recorded norm, divided
                       by the number of tokens of the context
    floor_bytes        read floor for all queries whose norm is at most the largest recorded norm
    asked_floor_bytes  floor for the queries that were recorded after the context: of read and volume floor the larger
    exact_bytes        bytes of the context's keys and values
    best_method        text of the cheapest good setting; None if only exact is good
    best_bytes         bytes per kv head of the cheapest good setting; None without one
    best_error         relative error of the head's attention output under that setting; None without one
    compressible       True if readable_share is at most COMPRESSIBLE, and no search stopped early
    eta                the least error that the floors allow in an output, for values in [-1, 1]
    stopped            how far a search came that stopped early, in words; None: all came to their ends
    """

    layer: int
    head: int
    readable_share: float
    floor_bytes: int
    asked_floor_bytes: int
    exact_bytes: int
    best_method: str | None
    best_bytes: int | None
    best_error: float | None
    compressible: bool
    eta: float = MOST_ETA
    stopped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)


def head_floors(cell: Cell | TextCell, traces: Sequence[Trace], most_work: int = MOST_WORK) -> list[HeadFloor]:
    """Return the read floors of the kv heads of all layers, as one list, on the first sample of a cell or on a text.

    cell       the cell or text that was recorded
    traces     the sample's queries, keys and values, one entry per layer
    most_work  largest number of kv heads times the square of the context's tokens. If all heads would exceed it, fewer
               are measured (at least FEWEST_HEADS), evenly spread over the layers
    The list is empty for a context of more than MOST_TOKENS tokens. A layer whose values are its keys (latent
    attention) has no entry: a read floor takes the keys as public, and then nothing is left that values could hide.
    """
    places = [
        (position, head) for position, trace in enumerate(traces) if not trace.tied for head in range(trace.kv_heads)
    ]
    longest = max(trace.k.shape[1] - trace.asked for trace in traces)
    found: list[HeadFloor] = []
    for position, head in _spread(places, max(FEWEST_HEADS, most_work // max(1, longest) ** 2)):
        trace = traces[position]
        cut = trace.k.shape[1] - trace.asked
        before, after = trace.present[head, :cut], trace.present[head, cut:]
        if int(before.sum()) > MOST_TOKENS:
            return []
        k, own = trace.k[head, :cut][before].float(), trace.k[head, cut:][after].float()
        asked = trace.q[head, :, cut:][:, after].float()
        eta = good_error(trace, head)
        within, asked_bytes = _floors(head, trace, k, asked, own, eta)
        width = (trace.k.shape[-1] + trace.v.shape[-1]) * trace.k.dtype.itemsize
        # the recorded queries are among those of at most their length, so the larger of both floors holds for these
        floor = max(within.bytes, asked_bytes)
        weighed = None if within.stopped is None else within.stopped.weighed
        place = (cell, trace.layer, head, position)
        found.append(HeadFloor(*place, len(k), within.groups, floor, asked_bytes, len(k) * width, eta, weighed))
    return found


def good_error(trace: Trace, row: int) -> float:
    """Return the error, as a share of the largest value, within which good settings answer a share P of the queries.

    A setting is good if the relative l2 error of its outputs is at most GOOD over the asked queries of a row. By
    Markov's inequality a share P of them then has an l2 error, and so an error in every number, of at most GOOD /
    sqrt(1 - P) times the root mean square of the exact outputs' l2 norms. The largest value is that of the context's
    tokens. The result is at most MOST_ETA, which is also returned where all values are 0.
    """
    cut = trace.k.shape[1] - trace.asked
    largest = trace.v[row, :cut][trace.present[row, :cut]].float().abs().max().item()
    outputs = trace.exact[row][:, trace.present[row, cut:]]
    typical = outputs.square().sum(-1).mean().sqrt().item()
    return min(MOST_ETA, GOOD * typical / (math.sqrt(1.0 - P) * largest)) if largest > 0.0 else MOST_ETA


def _spread(places: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Return `places`, a list of (layer index, kv head), if it has at most `most` entries, else `most` of its entries.

    Those are evenly spaced, and the first and the last are among them.
    """
    if len(places) <= most:
        return places
    return [places[round(index * (len(places) - 1) / (most - 1))] for index in range(most)]


def _floors(head: int, trace: Trace, k: Tensor, asked: Tensor, own: Tensor, eta: float) -> tuple[Readable, int]:
    """Return two floors of one kv head: for all queries up to the largest recorded norm, and for those in `asked`.

    The first is a read floor: a `Readable` has it as `bytes`, and the number of groups that its queries can read as
    `groups`. The second is the larger of read floor and volume floor, in bytes.

    head              number of the kv head in its layer
    trace             the layer's trace: gives the scale, softcap and sinks of the logits and the largest query norm
    k      (n, d)     keys of the context's n tokens
    asked  (g, t, d)  queries of the t tokens after the context, for the g query heads of the kv head
    own    (t, d)     keys of these t tokens, which also take a share of the asked queries' attention
    eta               error allowed in an output, for values in [-1, 1]
    """
    law: dict[str, Any] = {"scale": trace.scale, "softcap": trace.softcap}
    demand: dict[str, Any] = {"eta": eta, "dv": trace.v.shape[-1], "p": P, "dtype": trace.v.dtype}
    radius = trace.q[head][:, trace.present[head]].float().norm(dim=-1).max().item()
    sink = None if trace.sink is None else trace.sink[head]
    least = None if sink is None else sink.min().item()  # any query may be asked by the query head with the least sink
    limit = Limit(tokens=WEIGHED) if len(k) > WEIGHED else None
    within = readable_within(k, radius=radius, others="present", later_mass=least, limit=limit, **law, **demand)
    mass = causal_mass(asked, own, sink=sink, **law)
    asked_bytes = max(
        by(k, asked.flatten(0, 1), later_mass=mass, **law, **demand).bytes for by in (readable_by, volume_by)
    )
    return within, asked_bytes


def heads(floors: Iterable[HeadFloor], rows: Sequence[Erring]) -> list[Head]:
    """Combine each kv head's floors with the settings' errors, into one `Head` per kv head, ordered by layer and head.

    rows: the settings' results on cells and on texts, with their errors by head. A head without floors is left out.
    """
    found: dict[tuple[int, int], list[HeadFloor]] = {}
    for floor in floors:
        found.setdefault((floor.layer, floor.head), []).append(floor)
    return [_head(place, of_head, rows) for place, of_head in sorted(found.items())]


def _head(place: tuple[int, int], floors: Sequence[HeadFloor], rows: Sequence[Erring]) -> Head:
    share = max(floor.readable_groups / floor.tokens for floor in floors)
    stopped = max((Stopped(one.weighed, one.tokens) for one in floors if one.weighed is not None), default=None)
    best = _cheapest((floors[0].position, place[1]), {floor.cell for floor in floors}, rows)
    return Head(
        layer=place[0],
        head=place[1],
        readable_share=share,
        floor_bytes=max(floor.floor_bytes for floor in floors),
        asked_floor_bytes=max(floor.asked_floor_bytes for floor in floors),
        exact_bytes=max(floor.exact_bytes for floor in floors),
        best_method=best[1] if best else None,
        best_bytes=best[0] if best else None,
        best_error=best[2] if best else None,
        compressible=share <= COMPRESSIBLE and stopped is None,
        eta=min(floor.eta for floor in floors),
        stopped=None if stopped is None else str(stopped),
    )


def _cheapest(
    place: tuple[int, int], cells: set[Cell | TextCell], rows: Sequence[Erring]
) -> tuple[int, str, float] | None:
    """Return a kv head's cheapest good setting as (bytes per head, setting, largest error); None without a good one.

    A setting is good if the head's output error is at most GOOD on each of `cells` (cells and texts); the exact cache
    is left out. The bytes are the largest over the cells, divided by the number of kv heads of all layers.

    place  (index of the head's layer among those whose cache is compressed, number of the head in the layer)
    rows   the settings' results, with the measured errors and bytes
    """
    position, head = place
    settings: dict[str, list[Erring]] = {}
    for row in rows:
        if row.cell in cells and row.method != "exact":
            settings.setdefault(row.method, []).append(row)
    serving = []
    for method, of_method in settings.items():
        error = max(row.output_error_by_head[position][head] for row in of_method)
        if len(of_method) == len(cells) and error <= GOOD:
            shape = of_method[0].output_error_by_head
            largest = max(row.state_bytes for row in of_method)
            serving.append((math.ceil(largest / (len(shape) * len(shape[0]))), method, error))
    return min(serving, default=None)


def summary(found: Sequence[Head]) -> str:
    """Write one sentence that names the compressible kv heads among `found`, or that says that there are none."""
    if not found:
        return "No head's floor was measured."
    names = [f"layer {one.layer} head {one.head}" for one in found if one.compressible]
    open_ = [one for one in found if one.stopped is not None and one.readable_share <= COMPRESSIBLE]
    if not names and open_:
        return f"No head was found compressible; {len(open_)} of {len(found)} were not searched to the end."
    if not names:
        return (
            f"No head is compressible: in each of the {len(found)}, queries of the recorded length can read more than "
            f"{COMPRESSIBLE:.0%} of the context's tokens apart."
        )
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"{len(names)} of {len(found)} heads are compressible: queries of the recorded length can read at most "
        f"{COMPRESSIBLE:.0%} of the context's tokens apart ({shown})."
    )
