"""Print the costs of methods in single layers of a model."""

from __future__ import annotations

from kvfloor.methods.mixed.costs import CostTable


def cost_lines(table: CostTable) -> list[str]:
    """Return a table as lines of text: one line per unit of adjacent layers, one column per method, costs in nats."""
    units = list(table.units())
    methods = list(dict.fromkeys(row.method for row in table.rows))
    width = max(map(len, methods)) + 2
    lines = ["layers   " + "".join(f"{method:>{width}}" for method in methods)]
    for (first, last), rows in units:
        nats = {row.method: f"{row.nats:.2g}" for row in rows}
        name = str(first) if first == last else f"{first}-{last}"
        lines.append(f"{name:<9}" + "".join(f"{nats.get(method, '-'):>{width}}" for method in methods))
    return lines
