"""Hold a loaded model with an audit's texts and samples, and measure one setting on one of them at a time.

A setting is a method with its budget. A place is a text, a cell of the tasks (task, context length, protocol), or a
sheet: a prompt with hidden facts. A row is the result of one setting on one place. The setting `exact` keeps every
token; the others are compared with its rows. In a race, i.e. an audit with a time limit, undecided settings are
measured on further passages of the texts and on further rounds of samples: round 1 of a cell has its first n samples,
round 2 the next n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfloor.audit.chat import chosen_chat
from kvfloor.audit.closer import Closer, look_closer
from kvfloor.audit.fact_rows import SheetRow
from kvfloor.audit.facts import Sheet, audited_sheets, sheet_row
from kvfloor.audit.grid import EXACT, AnyRow, Grid, Place
from kvfloor.audit.heads import head_floors
from kvfloor.audit.journal import Measured
from kvfloor.audit.measure import CHUNK_SLOTS, Bench, ExactOutcome, Prepared
from kvfloor.audit.nats import TextRow
from kvfloor.audit.plan import Work, prompt_work, round_work, settings, task_work
from kvfloor.audit.prompts import read_prompts
from kvfloor.audit.reading import Reader, text_row
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.rounds import MOST_ROUNDS
from kvfloor.audit.rows import Cell, Row
from kvfloor.audit.texts import Excerpt, excerpts, further_excerpts
from kvfloor.hf import prepare
from kvfloor.hf.held import Shares
from kvfloor.hf.intake import SharedPrompt
from kvfloor.models import load


@dataclass(frozen=True)
class _Opened:
    """Hold what all settings share on one place: the exact cache's logits on a text, or the samples of a cell.

    reference  on a text: the continuation in pieces of c tokens, each as (token ids (c,), the exact cache's logits
               (c, vocabulary)); None on a cell
    prompt     on a text or sheet: object that feeds the context to the cache of each setting; None on a cell
    prepared   on a cell: its samples as token ids; None on a text
    """

    place: Place
    reference: list[tuple[Tensor, Tensor]] | None = None
    prompt: SharedPrompt | None = None
    prepared: Prepared | None = None


class Worker:
    """Measure the settings of an audit with one model, place by place.

    grid: all places and settings of the audit.
    """

    def __init__(self, question: AuditRequest, folder: Path, track: Callable[[str], None]) -> None:
        """Load the model in `folder`, and make the texts and samples that `question`, the audit's arguments, asks for.

        `track` is called with a line of text before each long step. Raises ValueError for a text that is too short, and
        for contexts that are longer than the model's positions.
        """
        self._least_exact = question.least_exact
        self._settings = {one.text: one for one in settings(question.methods, question.budget_texts)}
        more = {"ranks": question.tp, "device_map": question.device_map}
        model, tokenizer = load(folder.absolute(), track=track, **more)  # a folder "smollm2" is not that model
        methods = [one.method for one in self._settings.values()]
        self._bench = bench = Bench(prepare(model), tokenizer, question.seed, methods=methods)
        self._reader = Reader(model, question.seed, methods)
        chat = chosen_chat(question.chat, bench.template, question.model)
        contexts = question.context_lengths
        read = excerpts(question.text_names, contexts, question.scored, bench.encode)
        _require_positions(model, question, max(contexts) + (question.scored if read else 0))
        work: list[Work] = []
        if question.prompts is not None:
            items = read_prompts(question.prompts, question.n)
            work = prompt_work(question.prompts.stem, items, question.protocols, bench.count, chat)
        elif question.task_names:
            names, seed = question.task_names, question.seed
            work = task_work(names, contexts, question.protocols, question.n, seed, bench.count, chat)
        chatting = tuple(dict.fromkeys(one.cell.task for one in work if one.chat))
        passages: list[Excerpt] = []
        rounds: list[Cell] = []
        if question.racing:
            passages = further_excerpts(question.text_names, contexts, question.scored, bench.encode)
        if question.racing and question.task_names:
            rounds = [one.cell._replace(round=i) for i in range(2, MOST_ROUNDS + 1) for one in work]
        sheets, refused = audited_sheets(tokenizer, contexts, question.sheets, question.seed)
        self._places: dict[Place, Excerpt | Work | Sheet] = {
            one.cell: one for one in (*read, *work, *sheets, *passages)
        }
        self._seed, self._methods = question.seed, methods
        self._shares: Shares = {}
        self._round_of = partial(
            round_work, tasks=question.task_names, n=question.n, seed=question.seed, count=bench.count, chat=chat
        )
        places = tuple(one.cell for one in (*read, *work, *sheets))
        notes = (refused,) if refused else ()
        self.grid = Grid(places, tuple(self._settings), in_turns(passages, rounds), chatting, notes)
        self._opened: _Opened | None = None

    def tokens(self, place: Place) -> int:
        """Return the number of tokens that one setting reads on a place, from which its time is estimated.

        On a text these are context and continuation, on a cell the contexts of all samples, on a sheet the prompt and
        all questions.
        """
        found = self._places[place.first if isinstance(place, Cell) else place]
        if isinstance(found, Excerpt):
            return len(found.context) + len(found.continuation)
        if isinstance(found, Sheet):
            return found.tokens
        return found.cell.context * len(found.items)

    def look_closer(
        self, rows: Sequence[Row], texts: Sequence[TextRow], answer: Recommendation, track: Callable[[str], None]
    ) -> Closer:
        """Measure errors of the attention output and floors by kv head, and example answers, and return them.

        A floor is a lower bound on the bytes that any method needs for the head. The example answers are those of
        `exact` and of the recommended setting to the same prompts.

        rows, texts  the measured rows of the cells, and those of the texts
        answer       the recommendation that follows from these rows
        track        function that is called with a line of text before each step
        """
        self._opened = None
        plan = list(self._settings.values())
        read = [one for one in self._places.values() if isinstance(one, Excerpt)]
        work = [one for one in self._places.values() if isinstance(one, Work)]
        return look_closer(self._bench, plan, read, work, rows, texts, answer, track)

    def open(self, place: Place) -> None:
        """Compute what all settings share on a place, and keep it until another place is opened.

        On a text these are the exact cache's logits, on a cell the samples' token ids and the recorded queries, keys
        and values of the first few samples. The samples of a further round are generated only here, as few further
        rounds are ever measured.
        """
        if self._opened is not None and self._opened.place == place:
            return
        self._opened = None  # so that two places are never in memory together
        found = self._found(place)
        if isinstance(found, Excerpt):
            self._opened = _Opened(place, self._reader.reference(found), self._reader.prompt(found))
        elif isinstance(found, Sheet):
            prompt = SharedPrompt(self._bench.model, [found.prompt], CHUNK_SLOTS, self._methods)
            self._opened = _Opened(place, prompt=prompt)
        else:
            self._opened = _Opened(place, prepared=self._bench.prepare(found))

    def measure(self, place: Place, setting: str, exact: AnyRow | None) -> Measured:
        """Measure a setting, given as text, on a place, and return its row. The place is opened first if necessary.

        exact: the row of the setting `exact` on this place; None while `exact` itself is measured. With the row of
        `exact` on a cell come the floors of the kv heads, i.e. lower bounds on the bytes that any method needs; there
        are none if `exact` scores too low, and none in a further round of samples.
        """
        self.open(place)
        opened, one = self._opened, self._settings[setting]
        assert opened is not None and (exact is None) == (setting == EXACT)
        found = self._places.get(place)
        if isinstance(found, Sheet):
            assert opened.prompt is not None
            return Measured(sheet_row(self._bench.model, one, found, opened.prompt, self._seed, self._shares))
        if isinstance(found, Excerpt):
            assert opened.reference is not None and not isinstance(exact, (Row, SheetRow))
            read = self._reader.read(one.method, found, opened.reference, opened.prompt)
            sizes = (
                (read if exact is None else exact).state_bytes,
                (read if exact is None else exact).state_16_bit_bytes,
            )
            vocabulary = self._reader.model.config.get_text_config(decoder=True).vocab_size
            return Measured(text_row(one, found, read, sizes, vocabulary))
        assert opened.prepared is not None and not isinstance(exact, (TextRow, SheetRow))
        outcome = self._bench.run(one.method, opened.prepared)
        against = (
            ExactOutcome(outcome.right, outcome.state_bytes)
            if exact is None
            else ExactOutcome(exact.outcomes, exact.state_bytes)
        )
        row = self._bench.row(one, opened.prepared, outcome, against)
        floors = exact is None and row.round == 1 and row.score >= self._least_exact
        return Measured(row, tuple(head_floors(row.cell, opened.prepared.traces)) if floors else ())

    def _found(self, place: Place) -> Excerpt | Work | Sheet:
        """Return the excerpt of a text, a sheet, or a cell with its samples.

        Samples of a further round are generated here.
        """
        if isinstance(place, Cell) and place.round > 1:
            return self._round_of(place)
        return self._places[place]


def in_turns(passages: Sequence[Excerpt], rounds: Sequence[Cell]) -> tuple[Place, ...]:
    """Return further places of a race in their order: second passages, second rounds, third passages, third rounds, ...

    passages  the excerpts of further passages of the texts
    rounds    the cells with a further round of samples, one entry per round
    """
    numbered: list[tuple[int, Place]] = [(one.passage, one.cell) for one in passages]
    numbered += [(one.round, one) for one in rounds]
    return tuple(place for _, place in sorted(numbered, key=lambda one: one[0]))


def _require_positions(model: Any, question: AuditRequest, longest: int) -> None:
    """Raise ValueError if the audit's longest input, of `longest` tokens, exceeds the model's trained positions.

    `question` holds the arguments of the audit; if its `allow_beyond` is True, nothing is raised.
    """
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(most, int) and longest > most and not question.allow_beyond:
        raise ValueError(
            f"contexts and continuations of {longest:,} tokens are longer than the {most:,} positions of the model "
            f"{question.model!r}: give smaller ones, or pass --allow-beyond"
        )
