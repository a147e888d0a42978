"""Measure what each method costs in each layer of a model, in nats, with all other layers exact.

A unit is one compressed layer (a layer with attention over all tokens), or several adjacent ones that have the same
method together. In every measurement one unit is compressed. The model takes in a text's context, the cache is told
that the prompt ends, and the next tokens of the text are predicted (scored). The cost is the mean KL divergence of the
predictions from those of the exact cache. This is a screening stage: short texts rank the methods of a layer, and the
sum over all layers predicts what a mixed setting costs. What it really costs, an audit of the setting measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kvfloor.audit.nats import BLOCK_TOKENS
from kvfloor.audit.reading import Reader
from kvfloor.audit.texts import Excerpt, check_scored, excerpts
from kvfloor.core.exact import Exact
from kvfloor.core.method import Method, standard_law
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.hf.layers import layers_served
from kvfloor.hf.wrappers import unwrapped
from kvfloor.methods.grammar import parse
from kvfloor.methods.mixed.costs import CostTable, LayerCost
from kvfloor.methods.mixed.layered import Layered
from kvfloor.statistics import blocks, mean_interval
from kvfloor.validation import whole

METHODS = (
    *("exact:k8v8", "exact:k6v5", "exact:k5v4", "exact:k4v4", "exact:k4v3", "exact:k3v3"),
    *("snapkv:k5v4@50%", "snapkv:k4v3@50%", "snapkv:k5v4@25%", "snapkv:k4v3@25%", "snapkv:k4v3@12.5%"),
)


def measure_layers(
    model: Any,
    encode: Callable[[str], list[int]],
    methods: Sequence[str] = METHODS,
    *,
    texts: Sequence[str] = ("novel",),
    context: int = 1024,
    scored: int = 512,
    together: int = 1,
    seed: int = 0,
    track: Callable[[int, str], None] = lambda total, text: None,
) -> CostTable:
    """Return the costs of each method in each unit of a prepared model; `exact`, which costs nothing, is among them.

    encode    returns the token ids of a text
    methods   texts of methods, each with its budget in tokens or as a share of the context
    texts     names of texts (`kvfloor.audit.texts`) or files
    context   tokens of each text that are taken in; scored: tokens after them that are predicted
    together  adjacent layers that form a unit; the last unit may be smaller
    seed      seeds the methods' own randomness
    track     called with the number of all steps, and a line of text, before each
    Raises ValueError for a method that is no method of one layer, for texts too short, and for too few scored tokens.
    """
    whole("context", context)
    check_scored(len(texts), whole("scored", scored), False)
    asked = _of_layers(methods, together)
    return _costs(model, excerpts(texts, [context], scored, encode), asked, together, seed, track)


def costs_on(
    model: Any,
    excerpt: Excerpt,
    methods: Sequence[str],
    *,
    together: int,
    seed: int,
    track: Callable[[int, str], None],
) -> CostTable:
    """Return the costs of each method in each unit of a prepared model, measured on one excerpt.

    The other arguments and errors are those of `measure_layers`.
    """
    return _costs(model, [excerpt], _of_layers(methods, together), together, seed, track)


def _of_layers(methods: Sequence[str], together: int) -> list[Method]:
    """Return the methods but `exact`, each once; raise ValueError for what cannot be the method of one layer."""
    whole("together", together)
    asked = list(dict.fromkeys(standard_law(parse(text), "a layer") for text in methods if text != "exact"))
    Layered((Exact(), *asked))
    return asked


def _costs(
    model: Any,
    read: Sequence[Excerpt],
    methods: Sequence[Method],
    together: int,
    seed: int,
    track: Callable[[int, str], None],
) -> CostTable:
    layers = layers_served(unwrapped(model).config)
    units = [(first, min(first + together, layers) - 1) for first in range(0, layers, together)]
    kls: dict[tuple[tuple[int, int], Method], list[tuple[float, int]]] = {}
    total = len(read) * (1 + len(units) * len(methods))
    for excerpt in read:
        track(total, f"{excerpt.cell}: exact")
        reader = Reader(model, seed)
        reference = reader.reference(excerpt)
        for unit in units:
            for method in methods:
                track(total, f"{excerpt.cell}: layers {unit[0]} to {unit[1]}, {method}")
                found = reader.read(_alone(method, unit, layers), excerpt, reference).figures.kl
                kls.setdefault((unit, method), []).extend(blocks(found, BLOCK_TOKENS))
    rows = []
    for unit in units:
        rows.append(LayerCost(*unit, "exact", 0.0, 0.0, 0.0))
        rows += [LayerCost(*unit, str(method), *mean_interval(kls[unit, method])) for method in methods]
    texts, cell = tuple(one.cell.text for one in read), read[0].cell
    return CostTable(fingerprint(unwrapped(model)), layers, texts, cell.context, cell.continuation, tuple(rows))


def _alone(method: Method, unit: tuple[int, int], layers: int) -> Layered:
    """Return the methods of all `layers` layers: `method` in the unit's, exact in all others."""
    first, last = unit
    return Layered(tuple(method if first <= place <= last else Exact() for place in range(layers)))
