"""Look closer at an audit's result: errors by head on the first text, the heads' floors, and example answers.

A setting is a method with its budget. All of this is measured once the recommended setting is known, and is small
beside the audit: one text, one prompt per task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvfloor.audit.examples import (
    SideBySide,
    Speaker,
    shown_settings,
    task_examples,
    text_examples,
    write_examples,
)
from kvfloor.audit.heads import Head, HeadFloor, heads
from kvfloor.audit.measure import Bench
from kvfloor.audit.nats import TextRow
from kvfloor.audit.output_errors import ErrorMap, map_errors, write_error_maps
from kvfloor.audit.plan import Work
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.rows import Row
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.audit.texts import Excerpt


@dataclass(frozen=True)
class Closer:
    """Hold what explains an audit's result beside its rows.

    error_maps  the output error per layer and kv head of each setting, on the first text
    heads       the kv heads' floors, each with its cheapest good setting
    examples    example answers of exact and of the recommended setting
    """

    error_maps: tuple[ErrorMap, ...] = ()
    heads: tuple[Head, ...] = ()
    examples: tuple[SideBySide, ...] = ()

    def write(self, folder: Path) -> None:
        """Write `output_errors.jsonl` and `examples.jsonl` into a folder."""
        write_error_maps(folder / "output_errors.jsonl", self.error_maps)
        write_examples(folder / "examples.jsonl", self.examples)


def look_closer(
    bench: Bench,
    plan: Sequence[BudgetedMethod],
    excerpts: Sequence[Excerpt],
    work: Sequence[Work],
    rows: Sequence[Row],
    texts: Sequence[TextRow],
    floors: Sequence[HeadFloor],
    answer: Recommendation,
    progress: Callable[[str], None],
) -> Closer:
    """Measure what explains an audit's result, on the same model.

    plan, excerpts, work  the audit's settings, texts, and cells (task, context length, protocol) with their samples
    rows, texts, floors   the measured rows of cells and texts, and the kv heads' floors on the cells
    answer                the recommendation, whose settings the examples show
    `progress` is called with a line of text before each step.
    """
    methods = {one.text: one.method for one in plan}
    speaker = Speaker(bench, {text: methods[text] for text in shown_settings(answer) if text in methods})
    read = next((one for one in excerpts if any(row.cell == one.cell for row in texts)), None)
    maps, text_floors, examples = [], [], []
    if read is not None:
        maps, text_floors = map_errors(bench.model, plan, read, texts, progress)
        examples += text_examples(speaker, read, progress)
    examples += task_examples(speaker, work, rows, progress)
    return Closer(tuple(maps), tuple(heads([*floors, *text_floors], [*rows, *maps])), tuple(examples))
