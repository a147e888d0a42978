"""Measure what explains an audit's result: attention errors and floors by kv head on one text, example answers.

All of it is measured last, when the recommended setting is known, on one text and one prompt per task, so it takes
little time. An attention error is the relative error of the attention output to that of the exact cache. A setting is a
method with its budget, e.g. `h2o@256`; a cell is a task at a context length under a protocol; a row is the result of
one setting on one text or cell. A setting is safe if the rows show that it loses little quality; the safe setting of
fewest bytes is recommended. The setting nearest to safe is the one whose possible loss (upper confidence limit) is the
smallest. A floor is a lower bound on the bytes that any method needs for a kv head. `exact` is the cache that keeps
every token.
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
    """Hold the measurements that explain an audit's result.

    error_maps  relative error of the attention output per layer and kv head, one map per setting, on the first text
    floors      lower bounds on the bytes that some kv heads need, on the first text
    examples    answers of `exact` and of the recommended setting to the same prompts
    """

    error_maps: tuple[ErrorMap, ...] = ()
    floors: tuple[HeadFloor, ...] = ()
    examples: tuple[SideBySide, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the maps, floors and examples to three files in the audit's folder, which must exist.

        The files are `output_errors.jsonl`, `text_floors.jsonl` and `examples.jsonl`.
        """
        errors, floors, examples = (folder / name for name in EXPLANATIONS)
        write_error_maps(errors, self.error_maps)
        write_records(floors, self.floors)
        write_examples(examples, self.examples)


def read_closer(folder: Path, answer: Recommendation) -> Closer:
    """Read the files that `Closer.write` wrote into a folder; return an empty `Closer` if they are missing.

    answer: the recommendation. It may differ from the one at the time of writing, as the rows may be judged anew under
    another limit. So only examples are returned whose settings, beside `exact`, are the recommended one or the one with
    the next fewer bytes; if none is recommended, the one nearest to safe.
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
    """Measure attention errors and floors by kv head on the first text that was read, and example answers.

    The examples are on that text and on a few tasks.

    bench        the model with its tokenizer
    plan         the audit's settings
    excerpts     its texts, as token ids of context and continuation
    work         its cells (task, context length, protocol) with their samples
    rows, texts  the measured rows of the cells, and those of the texts
    answer       the recommendation, which decides the settings that the examples show
    progress     function that is called with a line of text before each step
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
