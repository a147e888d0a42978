"""Write how many hidden facts each method's cache returned, and the bits that this certifies."""

from __future__ import annotations

from collections.abc import Sequence

from kvfloor.audit.fact_rows import FactRow
from kvfloor.audit.format import bytes_text

HEADS = (
    "setting",
    "bytes",
    "at 16 bits",
    "facts right",
    "bits certified",
    "bits per KiB",
    "needs at least",
    "could hold",
)


def fact_lines(rows: Sequence[FactRow]) -> list[str]:
    """Return the rows as lines of text, with a line above them and notes below."""
    cells = [HEADS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    hidden = rows[0].hidden_bits if rows else 0.0
    lines.append("")
    lines.append(
        f"Hidden: {hidden:,.0f} bits. Certified: the caches carried so many of them, but for a chance of 2^-20."
    )
    lines.append(
        "needs at least: no cache of fewer bytes returns so many facts. could hold: no more facts fit these bytes."
    )
    lines += hiding_lines(rows)
    return lines


def hiding_lines(rows: Sequence[FactRow]) -> list[str]:
    """Return a sentence for each row with more certified bits than its caches hold."""
    return [
        f"{row.method}: more bits came out than its caches hold, so the method keeps memory elsewhere."
        for row in rows
        if row.hides_memory
    ]


def returned_by_setting(rows: Sequence[FactRow]) -> dict[str, str]:
    """Return for each setting how many facts came back over all contexts, such as "57 of 64"."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        right, facts = found.get(row.method, (0, 0))
        found[row.method] = right + row.right, facts + row.facts
    return {setting: f"{right} of {facts}" for setting, (right, facts) in found.items()}


def _cells(row: FactRow) -> tuple[str, ...]:
    low, high = row.right_interval
    return (
        row.method,
        bytes_text(row.cache_bytes),
        bytes_text(row.cache_16_bit_bytes),
        f"{row.right} of {row.facts} ({low:.0%} to {high:.0%})",
        f"{row.certified_bits:,.0f}",
        f"{row.bits_per_kib:.3g}",
        bytes_text(row.needed_bytes),
        f"{row.most_facts:,.0f}",
    )
