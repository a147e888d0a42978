"""Propose settings with one method per layer for an audit, from costs measured on text that the audit does not read.

The costs of methods in single layers (`audit/layer_costs.py`) are measured before the audit, in this process, and kept
in the audit's folder. A proposal is the choice of one method per layer that takes the fewest bytes, or costs the fewest
nats, by these costs alone. So the audited texts have no part in the choice, and the audit judges a proposal by the same
rule as every other setting.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvfloor.audit.format import bytes_text, nats_text, number_of_nats
from kvfloor.audit.layer_costs import METHODS, costs_on
from kvfloor.audit.request import LEAST_BYTES, AuditRequest
from kvfloor.audit.texts import GENERATED, unread_excerpt
from kvfloor.core.budget import size_bytes
from kvfloor.core.exact import Exact
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.hf.layers import layers_served
from kvfloor.hf.mixed import cache_shapes, choose, choose_smallest
from kvfloor.methods.mixed.costs import CostTable, read_costs, write_costs

FILE = "layer_costs.json"
AIM = 0.4
"""Share of the limit of divergence that the sum of costs may reach.

Sums come out up to 1.6 times too low (`docs/frontier.md`), and the upper end of an interval must lie within the limit.
"""
MOST_CONTEXT = 1024
SCORED = 512
MOST_UNITS = 16
_TIMED = 3  # measurements after which the time of all is told

Announce = Callable[[str], None]
Track = Callable[[int, str], None]


def proposals(
    question: AuditRequest, model: Any, tokenizer: Any, track: Track, announce: Announce
) -> list[tuple[str, str]]:
    """Return the settings that `question.mixed` asks for, as (text of the setting, sentence that says why it is there).

    question  the arguments of the audit; costs are written to its folder, or read from it if they are of this model
    model     the prepared model
    track     called with the number of all steps, and a line of text, before each measurement
    announce  called with lines of text that tell what is measured, how long it takes, and what is proposed
    A setting that keeps every token in every layer is not proposed; `announce` tells so. Raises ValueError if no text
    is long enough, and for a number of bytes too few for the smallest of the measured methods.
    """
    table = _costs(question, model, tokenizer, track, announce)
    shapes, dtype = cache_shapes(model)
    length, aim = max(question.context_lengths), AIM * question.kl_limit
    found = []
    for wish in question.mixed:
        if wish == LEAST_BYTES:
            method, choice = choose_smallest(table, aim, shapes, length, dtype)
            reason = f"the fewest bytes whose summed costs are within {number_of_nats(aim)} nats"
        else:
            size = size_bytes(wish) or 0
            try:
                method, choice = choose(table, size, shapes, length, dtype)
            except ValueError as cause:
                raise ValueError(f"--mixed {wish} after {length:,} tokens: {cause}") from None
            reason = f"the least sum of costs in {wish}"
        if method.kinds == (Exact(),):
            announce(f"--mixed {wish}: every layer would keep every token, so nothing is proposed")
            continue
        found.append(
            (
                str(method),
                f"{method} was proposed by --mixed {wish}: {reason} (predicted {nats_text(choice.nats)} in "
                f"{bytes_text(choice.nbytes)} after {length:,} tokens), by {FILE}, measured on {table.texts[0]}.",
            )
        )
        announce(found[-1][1])
    return found


def _costs(question: AuditRequest, model: Any, tokenizer: Any, track: Track, announce: Announce) -> CostTable:
    """Return the costs in the audit's folder; measure them, and write them to it, if they are not there yet."""
    path = question.out / FILE
    longest = max(question.context_lengths)
    excerpt = unread_excerpt(
        question.text_names or (GENERATED if question.is_builtin else ()),
        longest + question.scored,
        min(longest, MOST_CONTEXT),
        SCORED,
        lambda text: tokenizer(text, verbose=False).input_ids,
    )
    layers = layers_served(model.config)
    together = -(-layers // MOST_UNITS)
    if (known := _known(path)) is not None and not question.fresh:
        same = (known.model, known.texts, known.context, known.scored)
        units, methods = [unit for unit, _ in known.units()], {row.method for row in known.rows}
        wanted = (fingerprint(model), (excerpt.cell.text,), excerpt.cell.context, excerpt.cell.continuation)
        if same == wanted and len(units) == -(-layers // together) and methods == {"exact", *METHODS}:
            announce(f"{str(path)!r} has this model's costs by layer (--fresh measures again)")
            return known
    announce(f"measuring {len(METHODS)} methods in each of {-(-layers // together)} groups of layers on {excerpt.cell}")
    table = costs_on(model, excerpt, METHODS, together=together, seed=question.seed, track=_Estimate(track, announce))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_costs(path, table)
    return table


def _known(path: Path) -> CostTable | None:
    """Return the costs in a file; None if there is none, or if it cannot be read."""
    try:
        return read_costs(path) if path.exists() else None
    except ValueError:
        return None


class _Estimate:
    """Pass steps on to `track`, and tell the expected time of all once a few are done."""

    def __init__(self, track: Track, announce: Announce) -> None:
        self._track, self._announce = track, announce
        self._steps, self._began = 0, 0.0

    def __call__(self, total: int, text: str) -> None:
        if self._steps == 1:  # the exact predictions are done
            self._began = time.perf_counter()
        if self._steps == 1 + _TIMED:
            minutes = (time.perf_counter() - self._began) / _TIMED * total / 60
            self._announce(
                f"{total - 1} costs of a method in a group of layers take about {max(1, round(minutes))} min"
            )
        self._steps += 1
        self._track(total, text)
