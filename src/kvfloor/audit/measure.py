"""Measure the rows of an audit: run the model under each setting on each cell's samples, decoding greedily.

A setting is a method with its budget; a cell is a task at a context length under a protocol: "visible" compresses a
sample's question with its context, "after" asks it after the compression.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvfloor import floors
from kvfloor.audit import traces
from kvfloor.audit.clock import Clock
from kvfloor.audit.heads import HeadFloor, head_floors
from kvfloor.audit.plan import Work
from kvfloor.audit.rows import Row, measured_row
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.core.budget import resolve
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue

CHUNK_SLOTS = 256  # slots per chunk of the prefill, so that the tokens of a call do not dominate the peak
TRACED_SAMPLES = 4


@dataclass(frozen=True)
class Prepared:
    """Hold a cell's samples as token ids, and the recorded traces (queries, keys, values) of the first few.

    work      the cell (task, context length, protocol) with its samples as text
    contexts  token ids of the prompt: the context and, in "visible", the question without its last token
    asks      token ids fed after the end of the prompt: the question, or in "visible" only its last token
    answers   token ids of the right answers
    traces    one per layer
    """

    work: Work
    contexts: list[list[int]]
    asks: list[list[int]]
    answers: list[list[int]]
    traces: list[traces.Trace]


@dataclass(frozen=True)
class Measurement:
    """Record one setting's answers on the samples of a cell, with the bytes and times per sequence.

    A setting is a method with its budget, a sequence one sample. Times are those of the whole batch, divided by its
    number of sequences.

    right          one 0 (wrong) or 1 (right) per sample
    state_bytes    bytes of the cache at the end of the context; peak_state_bytes: the most bytes at any moment
    bytes_read     bytes of the cache that are read to produce one token
    output_tokens  mean length of the answers, in tokens
    budget_tokens  tokens kept per kv head; None if the budget is not one number
    """

    right: tuple[int, ...]
    state_bytes: int
    peak_state_bytes: int
    bytes_read: float
    prefill_ms: float
    decode_ms_per_token: float | None
    output_tokens: float
    budget_tokens: int | None


class Bench:
    """Measure settings (methods with budgets) on one prepared model with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, seed: int, extra_tokens: int = 4) -> None:
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self._extra_tokens = extra_tokens  # an answer that goes on for these is wrong

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, special tokens included."""
        return self.tokenizer(text, verbose=False).input_ids  # verbose: a warning about texts longer than the model's

    def count(self, text: str) -> int:
        """Count the tokens of a text, special tokens included."""
        return len(self.encode(text))

    def prepare(self, work: Work) -> Prepared:
        """Return a cell's samples as token ids, split at the end of the prompt, and the traces of the first few.

        The prompt, at whose end the cache is sealed, is the context under the protocol "after", and the context and the
        question without its last token under "visible". A trace is one layer's queries, keys and values, recorded
        over context, question and right answer. `work` is the cell (task, context length, protocol) and its samples as
        text.
        """
        plain = self._plain
        contexts, asks, answers = [], [], []
        for item in work.items:
            context, ask = self.tokenizer(item.context).input_ids, plain(" " + item.question if item.question else "")
            if work.cell.protocol == "visible":
                whole = context + ask
                contexts.append(whole[:-1])
                asks.append(whole[-1:])
            else:
                contexts.append(context)
                asks.append(ask)
            answers.append(plain(" " + item.answer))
        few = slice(0, TRACED_SAMPLES)
        spoken = [ask + answer for ask, answer in zip(asks[few], answers[few], strict=True)]
        return Prepared(work, contexts, asks, answers, traces.record(self.model, contexts[few], spoken))

    def resolved(self, method: Method, prepared: Prepared) -> Method:
        """Return the method with its budget in tokens per kv head.

        A budget given as a share is that share of the cell's context length. A budget given in bytes is the size of the
        whole cache of one sequence.
        """
        trace, layers = prepared.traces[0], len(prepared.traces)
        heads, d, dv = trace.kv_heads, trace.k.shape[2], trace.v.shape[2]
        places = [(trace.layer, head) for head in range(heads)]
        spec = Spec(heads, d, dv, trace.scale, trace.softcap, trace.k.dtype, places=places)
        return resolve(method, spec, layers=layers, length=prepared.work.cell.context, g=trace.q.shape[1])

    def run(self, method: Method, prepared: Prepared) -> Measurement:
        """Run a method on all samples of a cell in one batch, and return the answers, bytes and times.

        The contexts are prefilled and the cache is sealed (end of the prompt). Then the questions are fed, and the
        answers are decoded greedily.
        """
        batch, method = len(prepared.contexts), self.resolved(method, prepared)
        cache = CompressedCache(self.model, method, seed=self.seed, requests=range(batch))
        dialogue = Dialogue.start(self.model, cache, batch)
        begin = time.perf_counter()
        dialogue.feed(prepared.contexts, CHUNK_SLOTS)
        cache.seal()
        prefill_ms = (time.perf_counter() - begin) * 1e3
        state_bytes, bytes_read = cache.nbytes, cache.bytes_read
        dialogue.feed(prepared.asks)
        most = max(len(answer) for answer in prepared.answers) + self._extra_tokens
        said, steps_ms = dialogue.answer(most, self.tokenizer.eos_token_id)
        budget = method.budget
        return Measurement(
            right=tuple(int(self._is_right(*pair)) for pair in zip(prepared.work.items, said, strict=True)),
            state_bytes=math.ceil(state_bytes / batch),
            peak_state_bytes=math.ceil(cache.peak_nbytes / batch),
            bytes_read=bytes_read / batch,
            prefill_ms=prefill_ms / batch,
            decode_ms_per_token=statistics.median(steps_ms) / batch if steps_ms else None,
            output_tokens=statistics.fmean(len(tokens) for tokens in said),
            budget_tokens=budget if isinstance(budget, int) else None,
        )

    def row(self, setting: BudgetedMethod, prepared: Prepared, outcome: Measurement, exact: Measurement) -> Row:
        """Build the row of a setting on a cell, from the setting's measurement and the exact cache's.

        A setting is a method with its budget; a cell is a task at a context length under a protocol. The error of the
        attention output is measured here, on the recorded traces of `prepared`.
        """
        cell = prepared.work.cell
        by_head = traces.errors(prepared.traces, self.resolved(setting.method, prepared))
        trace = prepared.traces[0]
        floor = floors.space(
            cell.context, trace.k.shape[2], trace.v.shape[2], heads=trace.kv_heads, layers=len(prepared.traces)
        )
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        return measured_row(
            setting=setting,
            budget_tokens=outcome.budget_tokens,
            task=cell.task,
            context=cell.context,
            protocol=cell.protocol,  # type: ignore[arg-type]
            outcomes=outcome.right,
            exact_outcomes=exact.right,
            state_bytes=outcome.state_bytes,
            peak_state_bytes=outcome.peak_state_bytes,
            exact_bytes=exact.state_bytes,
            floor_bytes=math.ceil(floor.bytes),
            token_id_bytes=math.ceil(cell.context * math.log2(vocabulary) / 8),
            bytes_read_per_token=outcome.bytes_read,
            output_error_by_layer=[statistics.fmean(heads) for heads in by_head],
            output_error_by_head=by_head,
            prefill_ms=outcome.prefill_ms,
            decode_ms_per_token=outcome.decode_ms_per_token,
            output_tokens=outcome.output_tokens,
        )

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _is_right(self, item: Any, said: Sequence[int]) -> bool:
        """Return True if the decoded tokens `said` are the sample's answer, after white space is normalised.

        The samples of a user's own file do not define where an answer ends (`item.ends` is False). For such a sample,
        further tokens may follow the right answer.
        """
        text = self.tokenizer.decode(said, skip_special_tokens=True).split()
        wanted = self.tokenizer.decode(self._plain(" " + item.answer), skip_special_tokens=True).split()
        return text == wanted if item.ends else text[: len(wanted)] == wanted


def run_cells(
    bench: Bench,
    settings: Sequence[BudgetedMethod],
    work: Sequence[Work],
    progress: Callable[[str], None],
    clock: Clock,
) -> tuple[list[Row], list[HeadFloor]]:
    """Run every setting on every cell; return the measured rows, and the memory floors of the model's kv heads.

    A setting is a method with its budget; a cell is a task at a context length under a protocol, and `work` has the
    cells with their samples as text. A row is one setting measured on one cell. A floor is the least bytes that any
    method needs for a kv head on a cell. The exact cache comes first in `settings`, as the other settings are compared
    with it. `progress` is called with a line of text before each measurement. `clock` leaves out the cells that do not
    fit into the audit's time.
    """
    rows, floors = [], []
    for one in work:
        tokens = one.cell.context * len(one.items)
        if not clock.fits(str(one.cell), tokens):
            continue
        begin = time.perf_counter()
        prepared = bench.prepare(one)
        progress(f"{one.cell.task} {one.cell.context} {one.cell.protocol}: floors of the heads")
        floors += head_floors(one.cell, prepared.traces)
        exact: Measurement | None = None
        for setting in settings:
            progress(f"{one.cell.task} {one.cell.context} {one.cell.protocol}: {setting.text}")
            outcome = bench.run(setting.method, prepared)
            exact = outcome if exact is None else exact
            rows.append(bench.row(setting, prepared, outcome, exact))
        clock.took(time.perf_counter() - begin, tokens)
    return rows, floors
