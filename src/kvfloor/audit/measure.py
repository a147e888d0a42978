"""Measure the rows of an audit: run the model under each setting on each cell's samples, decoding greedily.

A setting is a method with its budget; a cell is a task at a context length under a protocol: "visible" compresses a
sample's question with its context, "after" asks it after the compression. A sample is a context with questions about
it. A row is the result of one setting on one cell. To seal a cache is to tell it that the prompt ends. A trace is one
layer's queries, keys and values, recorded over context, question and right answer. The exact cache keeps every token.
A task may check an answer in several parts, each named, e.g. "first word"; each check gives a share from 0 to 1. An
audit with a time limit may measure a cell on further rounds of samples: round 1 has the first n, round 2 the next n.
Errors of the attention output are measured in round 1 alone, so a further round costs the answers and little more.
A sample is right if each of its questions is answered right, i.e. each check of each answer gives the share 1. On a
sharded model, every rank makes the same calls, and bytes are those of all ranks together.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from kvfloor.audit import traces
from kvfloor.audit.bounds import check_bounds
from kvfloor.audit.chat import Template
from kvfloor.audit.plan import Item, Work
from kvfloor.audit.rows import Row, measured_row
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.audit.worst_case import worst_case_bytes
from kvfloor.core.budget import resolve
from kvfloor.core.method import Method
from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue
from kvfloor.hf.intake import Room, SharedPrompt
from kvfloor.tasks.sample import apart

CHUNK_SLOTS = 256  # slots per chunk of the prefill, so that the tokens of a call do not dominate the peak
TRACED_SAMPLES = 4
TRACED_BYTES = 2**29  # the most that the traces of a cell may take, unless one sample needs more
BATCH_BYTES = 2**29  # the most that the exact cache of a batch may take, unless one sample needs more


@dataclass(frozen=True)
class Turn:
    """Hold one question to every sample of a cell, as token ids.

    Every sample has as many questions as the others; turn i holds the i-th question of each sample.

    asks     per sample, the tokens to feed before the answer is decoded: those of the question. For the first question
             under "visible" it is its last token alone, as its other tokens are fed with the context
    answers  per sample, the tokens of the right answer
    most     largest number of tokens to decode
    """

    asks: list[list[int]]
    answers: list[list[int]]
    most: int


@dataclass(frozen=True)
class Prepared:
    """Hold a cell's samples as token ids, and the traces of the first few samples.

    In a further round of samples the traces have two tokens alone, as no error is measured on them: only the shapes of
    their keys and values are used.

    work      the cell with its samples as text
    contexts  per sample, the tokens of the prompt: the context and, under "visible", the first question without its
              last token, which is in `turns[0]`
    turns     the questions that are asked after the end of the prompt, one after the other: turns[i] holds the i-th
              question of every sample
    traces    the traces of the first samples, TRACED_SAMPLES (4) at most, one entry per layer
    batches   indices of the samples that run together, with an object that feeds their prompts to a setting's cache
    """

    work: Work
    contexts: list[list[int]]
    turns: list[Turn]
    traces: list[traces.Trace]
    batches: list[tuple[range, SharedPrompt]]


@dataclass(frozen=True)
class Measurement:
    """Record one setting's answers on the samples of a cell, with the bytes and times per sample.

    Samples run in batches: the times and bytes of a batch are divided by its number of samples.

    right                one number per sample: 1 if all its questions are answered right, else 0
    parts                name of each part of the answers -> share, from 0 to 1, that its check gave; mean over samples
    state_bytes          bytes of the cache at the end of the context
    cold_bytes           bytes that it keeps on the host or a disk then
    peak_state_bytes     the most bytes of the cache at any moment
    bytes_read           bytes of the cache that are read to produce one token
    prefill_ms           milliseconds to read the context
    decode_ms_per_token  median milliseconds of a decode step; None if no token was decoded
    output_tokens        mean length of the answers, in tokens
    budget_tokens        tokens kept per kv head; None if the budget is not one number
    """

    right: tuple[int, ...]
    parts: dict[str, float]
    state_bytes: int
    cold_bytes: int
    peak_state_bytes: int
    bytes_read: float
    prefill_ms: float
    decode_ms_per_token: float | None
    output_tokens: float
    budget_tokens: int | None


class ExactOutcome(NamedTuple):
    """Hold what other settings are compared with on a cell: the exact cache's answers and its bytes.

    right        one number per sample: 1 if all its questions are answered right, else 0
    state_bytes  bytes of the cache at the end of the context, per sample (mean over the samples)
    """

    right: tuple[int, ...]
    state_bytes: int


class _Run(NamedTuple):
    """Hold the results of one batch of samples. Bytes are of the caches of all its samples together.

    said              the decoded tokens: said[sample][question] is a list of token ids
    state_bytes       bytes of the caches at the end of the prompts; `cold_bytes` those on the host or a disk
    peak_state_bytes  the most bytes of the caches at any moment
    bytes_read        bytes of the caches that are read to produce one token of each sample
    prefill_ms        milliseconds to read the prompts of all samples
    steps_ms          milliseconds of each decoding step, divided by the number of samples
    """

    said: list[list[list[int]]]
    state_bytes: float
    cold_bytes: float
    peak_state_bytes: float
    bytes_read: float
    prefill_ms: float
    steps_ms: list[float]


def _token_bytes(recorded: Sequence[traces.Trace]) -> int:
    """Return the bytes of one token's keys and values in all layers of the exact cache.

    recorded: traces, one entry per layer; they give the number of kv heads (of all ranks), the widths and the dtype.
    """
    return sum(one.kv_heads * one.spec(one.kv_heads).token_bytes for one in recorded)


def _batches(lengths: Sequence[int], token_bytes: int) -> list[range]:
    """Divide samples into batches, each with an exact cache of at most BATCH_BYTES, and return their ranges of indices.

    lengths      length of each sample's prompt in tokens
    token_bytes  bytes of a token in the exact cache
    The batches cover the samples in their order, and differ by at most one sample in size. A sample that alone exceeds
    BATCH_BYTES still gets a batch.
    """
    most = max(1, BATCH_BYTES // (max(lengths) * token_bytes))
    count = -(-len(lengths) // most)
    cuts = [len(lengths) * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]


class Bench:
    """Measure settings on one model, which `kvfloor.hf.prepare` made ready for compressed caches, with its tokenizer.

    seed          seed of the random draws of methods
    extra_tokens  number of tokens that are decoded beyond the length of the right answer: an answer that goes on after
                  the right words is wrong
    """

    def __init__(
        self, model: Any, tokenizer: Any, seed: int, extra_tokens: int = 4, methods: Sequence[Method] = ()
    ) -> None:
        """Build the bench.

        methods: those that will be measured. Those of them that compress only at the prompt's end share one run of the
        model over a cell's prompts, unless the record of the run would be too large.
        """
        self.model, self.tokenizer, self.seed, self._methods = model, tokenizer, seed, methods
        self._extra_tokens = extra_tokens  # an answer that goes on for these is wrong
        self.template = Template.of(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, special tokens included."""
        return self.tokenizer(text, verbose=False).input_ids  # verbose: a warning about texts longer than the model's

    def count(self, text: str) -> int:
        """Count the tokens of a text, special tokens included."""
        return len(self.encode(text))

    def prepare(self, work: Work) -> Prepared:
        """Return a cell's samples as token ids, cut at the end of the prompt, with the traces of the first few.

        `work` is the cell with its samples as text. Under the protocol "after" the prompt is the context. Under
        "visible" it is the context and the question without its last token. That token is fed after the cache is
        sealed, to get the first logits of the answer.
        """
        contexts = []
        per_turn: list[Turn] = [Turn([], [], 0) for _ in work.items[0].turns]
        for item in work.items:
            context, *asks = self._pieces(item, work.chat)
            if work.cell.protocol == "visible":
                whole = context + asks[0]
                context, asks[0] = whole[:-1], whole[-1:]
            contexts.append(context)
            for i, (turn, question, ask) in enumerate(zip(per_turn, item.turns, asks, strict=True)):
                answer = self._plain(apart(question.answer))
                most = len(answer) + self._extra_tokens if question.most is None else question.most
                per_turn[i] = Turn([*turn.asks, ask], [*turn.answers, answer], max(turn.most, most))
        few = self._traced(contexts)
        spoken = [[token for turn in per_turn for token in turn.asks[i] + turn.answers[i]] for i in range(few)]
        if work.cell.round > 1:  # the shapes alone are needed
            recorded = traces.record(self.model, [contexts[0][:1]], [spoken[0][:1]])
        else:
            recorded = traces.record(self.model, contexts[:few], spoken)
        room = Room()
        batches = [
            (samples, SharedPrompt(self.model, [contexts[i] for i in samples], CHUNK_SLOTS, self._methods, room))
            for samples in _batches([len(context) for context in contexts], _token_bytes(recorded))
        ]
        return Prepared(work, contexts, per_turn, recorded, batches)

    def _traced(self, contexts: Sequence[Sequence[int]]) -> int:
        """Return how many of a cell's samples are recorded in the traces: 1 to TRACED_SAMPLES, as TRACED_BYTES allows.

        contexts: token ids of the prompt, per sample.
        """
        length = max(len(context) for context in contexts[:TRACED_SAMPLES])
        return max(1, min(len(contexts), TRACED_SAMPLES, TRACED_BYTES // (length * traces.token_bytes(self.model))))

    def _pieces(self, item: Item, chat: bool) -> list[list[int]]:
        """Return a list of token ids: those of a sample's context, then those to feed before each of its answers.

        item  the sample
        chat  True if the sample is put into the model's chat template
        """
        first, *later = item.turns
        if not chat:
            context = self.tokenizer(item.context, verbose=False).input_ids
            return [context, *(self._plain(question.lead) for question in item.turns)]
        if self.template is None:
            raise ValueError("the tokenizer has no chat template: use --chat off")
        texts = [*self.template.first(item.context, first), *(self.template.later(question) for question in later)]
        return [self._plain(text) for text in texts]

    def resolved(self, method: Method, prepared: Prepared) -> Method:
        """Return the method with its budget in tokens per kv head.

        A budget given as a share is that share of the cell's context length. A budget given in bytes is the size of the
        whole cache of one sample. `prepared` has the cell and its samples.
        """
        trace, layers = prepared.traces[0], len(prepared.traces)
        spec = trace.spec(trace.kv_heads)
        return resolve(method, spec, layers=layers, length=prepared.work.cell.context, g=trace.q.shape[1])

    def run(self, method: Method, prepared: Prepared) -> Measurement:
        """Run a method on all samples of a cell, batch by batch, and return the answers, bytes and times.

        `prepared` holds the cell's samples as token ids. The contexts are prefilled and the cache is sealed. Then each
        question is fed, and its answer is decoded greedily. A sample's questions follow each other in one cache, so a
        later question comes after the earlier ones and the model's own answers to them.
        """
        method = self.resolved(method, prepared)
        runs = [self._run(method, prepared, samples, prompt) for samples, prompt in prepared.batches]
        said = [told for run in runs for told in run.said]
        shares = [self._shares(item, told) for item, told in zip(prepared.work.items, said, strict=True)]
        budget, n = method.budget, len(said)
        steps_ms = [ms for run in runs for ms in run.steps_ms]
        return Measurement(
            right=tuple(int(all(share == 1 for share in one.values())) for one in shares),
            parts={name: statistics.fmean(one[name] for one in shares) for name in shares[0]},
            state_bytes=math.ceil(sum(run.state_bytes for run in runs) / n),
            cold_bytes=math.ceil(sum(run.cold_bytes for run in runs) / n),
            peak_state_bytes=math.ceil(sum(run.peak_state_bytes for run in runs) / n),
            bytes_read=sum(run.bytes_read for run in runs) / n,
            prefill_ms=sum(run.prefill_ms for run in runs) / n,
            decode_ms_per_token=statistics.median(steps_ms) if steps_ms else None,
            output_tokens=statistics.fmean(sum(map(len, told)) for told in said),
            budget_tokens=budget if isinstance(budget, int) else None,
        )

    def _run(self, method: Method, prepared: Prepared, samples: range, prompt: SharedPrompt) -> _Run:
        """Run a method, whose budget is in tokens, on one batch: prefill, seal, then feed and answer each question.

        The questions follow each other in one cache, which also holds the answers before.
        prepared  the cell with its samples
        samples   indices of the batch's samples
        prompt    object that feeds the prompts of these samples to the cache
        """
        batch, before = len(samples), (prepared.work.cell.round - 1) * len(prepared.work.items)
        cache = CompressedCache(self.model, method, seed=self.seed, requests=[before + i for i in samples])
        dialogue = Dialogue.start(self.model, cache, batch)
        seconds = prompt.feed(dialogue)
        begin = time.perf_counter()
        cache.seal()
        prefill_ms = (seconds + time.perf_counter() - begin) * 1e3
        state_bytes, cold_bytes, bytes_read = cache.nbytes, cache.bytes["cold"], cache.bytes_read
        said: list[list[list[int]]] = []
        steps_ms: list[float] = []
        for turn in prepared.turns:
            dialogue.feed([turn.asks[i] for i in samples], CHUNK_SLOTS)
            tokens, times = dialogue.answer(turn.most, self._stops(prepared.work.chat))
            said.append(tokens)
            steps_ms += [ms / batch for ms in times]
        by_sample = [list(told) for told in zip(*said, strict=True)]
        return _Run(by_sample, state_bytes, cold_bytes, cache.peak_nbytes, bytes_read, prefill_ms, steps_ms)

    def row(self, setting: BudgetedMethod, prepared: Prepared, outcome: Measurement, exact: ExactOutcome) -> Row:
        """Build the row of a setting on a cell, and in the first round measure the error of the attention output.

        prepared  the cell's samples; the error is measured on their traces
        outcome   the setting's answers, bytes and times
        exact     the exact cache's answers and bytes
        """
        cell = prepared.work.cell
        by_head: list[list[float]] = []
        bounds = None
        if cell.round == 1:
            method = self.resolved(setting.method, prepared)
            by_head, bounds = traces.errors(prepared.traces, method), check_bounds(prepared.traces, method)
        trace = prepared.traces[0]
        floor = worst_case_bytes(
            self.model.config, cell.context, trace.k.shape[2], trace.v.shape[2], heads=trace.kv_heads,
            layers=len(prepared.traces), tied=trace.tied,
        )  # fmt: skip
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        return measured_row(
            setting=setting,
            budget_tokens=outcome.budget_tokens,
            task=cell.task,
            context=cell.context,
            protocol=cell.protocol,  # type: ignore[arg-type]
            outcomes=outcome.right,
            exact_outcomes=exact.right,
            parts=outcome.parts,
            state_bytes=outcome.state_bytes,
            peak_state_bytes=outcome.peak_state_bytes,
            exact_bytes=exact.state_bytes,
            floor_bytes=floor,
            token_id_bytes=math.ceil(cell.context * math.log2(vocabulary) / 8),
            bytes_read_per_token=outcome.bytes_read,
            output_error_by_layer=[statistics.fmean(heads) for heads in by_head],
            output_error_by_head=by_head,
            prefill_ms=outcome.prefill_ms,
            decode_ms_per_token=outcome.decode_ms_per_token,
            output_tokens=outcome.output_tokens,
            round=cell.round,
            cold_bytes=outcome.cold_bytes,
            bounds=bounds,
        )

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _stops(self, chat: bool) -> set[int]:
        """Return the ids of the tokens that end an answer.

        chat: True for samples in the chat template, where the end of the assistant's turn ends it too.
        """
        found = {self.tokenizer.eos_token_id} - {None}
        return found | set(self.template.ends()) if chat and self.template else found

    def _shares(self, item: Item, told: Sequence[Sequence[int]]) -> dict[str, float]:
        """Check a sample's decoded answers part by part, and return a dict: name of the part -> share from 0 to 1.

        The share is 1 if the answer passes the part's check in full.

        item  the sample
        told  the decoded tokens, one list per question of the sample
        """

        def form(text: str) -> str:
            return self.tokenizer.decode(self._plain(apart(text)), skip_special_tokens=True)

        found: dict[str, float] = {}
        for question, tokens in zip(item.turns, told, strict=True):
            found |= question.shares(self.tokenizer.decode(tokens, skip_special_tokens=True), form)
        return found
