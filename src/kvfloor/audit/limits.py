"""Write the notes of a report about its cells: which were left out, and which are in the chat template."""

from __future__ import annotations

from collections.abc import Sequence

from kvfloor.audit.format import percent_text
from kvfloor.audit.plan import Work
from kvfloor.audit.rows import Row


def left_out_notes(weak: Sequence[Row], least: float) -> tuple[str, ...]:
    """Return at most one sentence: the cells where exact scores below `least`, from their rows, and what to do.

    A cell is a task at a context length under a protocol.
    """
    if not weak:
        return ()
    cells = "; ".join(f"{row.cell} ({percent_text(row.score)})" for row in weak)
    return (
        f"Left out, because exact itself scores below {percent_text(least)} there: {cells}. "
        "Give easier tasks or shorter contexts, or keep them with --least-exact 0.",
    )


def chat_notes(work: Sequence[Work]) -> tuple[str, ...]:
    """Return at most one sentence: the tasks whose samples are in the model's chat template."""
    tasks = dict.fromkeys(one.cell.task for one in work if one.chat)
    return (f"Asked in the model's chat template: {', '.join(tasks)}.",) if tasks else ()
