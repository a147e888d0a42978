"""Print the memory plan of a model: a few named facts, then a table with a line per kind of cache.

A plan says how many bytes a model's weights and its KV cache take, the cache under each of several methods (KV-cache
compressors).
"""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfloor.audit.format import bytes_text, counted, smaller_text
from kvfloor.planning import Line, MemoryPlan
from kvfloor.report.text import visible


def print_plan(plan: MemoryPlan, console: Console) -> None:
    """Print a plan to the terminal `console`: facts on the model, a table with a line per method, and notes.

    One of the facts is the floor, a lower bound on any method's bytes for worst-case keys and values.
    """
    for name, words in _pairs(plan):
        console.print(Text(f"{name:<9}", style="bold") + Text(visible(words)))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("cache", overflow="fold")
    columns = ["tokens", "bytes", "smaller", *(["requests", "longest"] if plan.memory_bytes is not None else [])]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for line in plan.lines:
        table.add_row(Text(visible(line.method)), *_cells(line, plan)[: len(columns)])
    console.print(table)
    for sentence in _notes(plan):
        console.print(Text(sentence, style="dim"))


def _pairs(plan: MemoryPlan) -> list[tuple[str, str]]:
    layers = f"{counted(plan.compressed_layers, 'layer')} with full attention"
    layers += f", {plan.window_layers} with a sliding window" if plan.window_layers else ""
    cache = f"{plan.context:,} tokens" if plan.batch == 1 else f"{plan.batch:,} requests of {plan.context:,} tokens"
    within = "any relative error below 1" if plan.floor_eta is None else f"a relative error of {plan.floor_eta:g}"
    floor = f"{bytes_text(plan.floor_bytes)} for any method, in the worst case over keys and values, at {within}"
    unproved = plan.compressed_layers + plan.window_layers - plan.floor_layers
    floor += f"; {counted(unproved, 'latent layer')} without a floor" if unproved else ""
    pairs = [
        ("model", f"{plan.model} ({plan.model_type}), {layers}"),
        ("weights", f"{plan.parameters:,} numbers in {plan.dtype}: {bytes_text(plan.weights_bytes)}"),
        ("context", cache),
        ("floor", floor),
    ]
    if plan.memory_bytes is not None:
        left = plan.memory_bytes - plan.weights_bytes
        pairs.insert(2, ("memory", f"{bytes_text(plan.memory_bytes)}, {bytes_text(left)} beside the weights"))
    return pairs


def _cells(line: Line, plan: MemoryPlan) -> list[str]:
    return [
        "all" if line.budget_tokens is None else f"{line.budget_tokens:,}",
        bytes_text(line.cache_bytes),
        smaller_text(plan.lines[0].cache_bytes, line.cache_bytes),
        "-" if line.requests is None else f"{line.requests:,}",
        _longest(line),
    ]


def _longest(line: Line) -> str:
    if not line.grows:
        return "any" if line.requests else "none"
    return "-" if line.longest_context is None else f"{line.longest_context:,}"


def _notes(plan: MemoryPlan) -> list[str]:
    notes = ["stock: transformers' own cache; the others hold positions and spare room too"]
    if plan.own_bytes:
        notes.append(f"{bytes_text(plan.own_bytes)} of every line are layers that are not compressed")
    dense = [line.method for line in plan.lines if line.prompt_bytes > 1.01 * line.cache_bytes]
    if dense:
        notes.append(f"{visible(', '.join(dense))}: more while the prompt is read (prompt_bytes in --json)")
    if plan.memory_bytes is not None:
        notes.append("requests: caches that fit beside the weights; longest: tokens of one request, by proportion")
    if plan.trained_positions is not None and plan.context > plan.trained_positions:
        notes.append(f"the model was trained for {plan.trained_positions:,} positions")
    notes.append("Not counted: activations, logits, and what the runtime itself takes")
    return notes
