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
    read_examples,
    shown_settings,
    task_examples,
    text_examples,
    write_examples,
)
from kvfloor.audit.heads import HeadFloor, with_cell
from kvfloor.audit.journal import EXPLANATIONS, is_explained
from kvfloor.audit.measure import Bench
from kvfloor.audit.nats import TextRow
from kvfloor.audit.output_errors import MOST_BYTES, ErrorMap, map_errors, read_error_maps, write_error_maps
from kvfloor.audit.plan import Work
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.records import read_records, write_records
from kvfloor.audit.rows import Row
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.audit.texts import Excerpt


@dataclass(frozen=True)
class Closer:
    """Hold what explains an audit's result beside its rows.

    error_maps  the output error per layer and kv head of each setting, on the first text
    floors      the floors of some kv heads, on the first text
    examples    example answers of exact and of the recommended setting
    """

    error_maps: tuple[ErrorMap, ...] = ()
    floors: tuple[HeadFloor, ...] = ()
    examples: tuple[SideBySide, ...] = ()

    def write(self, folder: Path) -> None:
        """Write `output_errors.jsonl`, `text_floors.jsonl` and `examples.jsonl` into a folder."""
        errors, floors, examples = (folder / name for name in EXPLANATIONS)
        write_error_maps(errors, self.error_maps)
        write_records(floors, self.floors)
        write_examples(examples, self.examples)


def read_closer(folder: Path, answer: Recommendation) -> Closer:
    """Read what `Closer.write` wrote; nothing where the files are not there.

    Examples are left out if they show other settings than this recommendation asks for, as after another limit.
    """
    if not is_explained(folder):
        return Closer()
    errors, floors, examples = (folder / name for name in EXPLANATIONS)
    read = read_records(floors, HeadFloor, MOST_BYTES, floors.name, "the floor of a kv head")
    shown = set(shown_settings(answer))
    return Closer(
        tuple(read_error_maps(errors)),
        tuple(with_cell(one) for one in read),
        tuple(one for one in read_examples(examples) if {other.setting for other in one.others} <= shown),
    )


def look_closer(
    bench: Bench,
    plan: Sequence[BudgetedMethod],
    excerpts: Sequence[Excerpt],
    work: Sequence[Work],
    rows: Sequence[Row],
    texts: Sequence[TextRow],
    answer: Recommendation,
    progress: Callable[[str], None],
) -> Closer:
    """Measure what explains an audit's result, on the same model.

    plan, excerpts, work  the audit's settings, texts, and cells (task, context length, protocol) with their samples
    rows, texts           the measured rows of cells and texts
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
    return Closer(tuple(maps), tuple(text_floors), tuple(examples))
