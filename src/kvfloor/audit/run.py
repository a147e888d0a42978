"""Run an audit from start to end: plan the work, measure it, recommend a setting, write the rows.

A setting is a method with its budget; a cell is a task at a context length under a protocol. A place is a text or a
cell. A measurement is a pair of place and setting, and its result is a row. In an audit with a time limit a cell may
have several rounds of samples (the first n, the next n, ...), whose rows are joined before they are judged or shown.
The journal holds the rows, in memory and in files of the audit's folder. A cell is left out if the exact cache, which
keeps every token, scores too low on it.
The identity of an audit is a dict of all that its rows depend on.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfloor.audit.chosen import with_chosen
from kvfloor.audit.clock import Clock
from kvfloor.audit.explain import why
from kvfloor.audit.fact_rows import FactRow, FactSheet, fact_summaries
from kvfloor.audit.grid import Grid
from kvfloor.audit.header import Header
from kvfloor.audit.heads import Head, heads
from kvfloor.audit.identity import differences, identity, versions
from kvfloor.audit.journal import Journal, is_explained
from kvfloor.audit.limits import Fixed, chat_notes, left_out, left_out_notes, unreadable, unreadable_note
from kvfloor.audit.meta import Meta
from kvfloor.audit.nats import TextCell, TextRow, summaries
from kvfloor.audit.plan import chosen_tasks, settings
from kvfloor.audit.prompts import read_prompts
from kvfloor.audit.provenance import hashes_of
from kvfloor.audit.race import Race, race
from kvfloor.audit.recommend import Recommendation, recommend
from kvfloor.audit.request import AuditRequest
from kvfloor.audit.require import Condition, conditions, shortfalls, uncovered
from kvfloor.audit.rounds import joined
from kvfloor.audit.rows import Cell, Row, certified_figures, document
from kvfloor.audit.setting import BudgetedMethod
from kvfloor.files import open_folder
from kvfloor.models.load import find

if TYPE_CHECKING:
    from kvfloor.audit.closer import Closer
    from kvfloor.audit.engine import Engine

Track = Callable[[int, str], None]
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """Hold the results of an audit.

    rows            the rows of the cells, one per setting and cell, with the samples of all rounds
    texts           the rows of the texts, one per setting and text
    heads           for each kv head its floor, a lower bound on the bytes that any method needs, and its cheapest good
                    setting; a setting is good for a head if the relative error of the head's attention output is at
                    most 0.1 on every cell and text
    recommendation  the recommended setting, and the verdict on every setting that could be recommended
    closer          errors of the attention output and floors by head on the first text, and example answers
    report          path of the HTML page, which `kvfloor.report.render` writes later
    shortfalls      one line for each result in which a condition of `--require` does not hold, and for each left-out
                    cell on which it cannot be checked
    meta            the source of the results: model, command, versions, machine
    left_out        the exact cache's row of each cell that was left out
    facts           for each setting and context, how many hidden facts came back through its cache
    facts_note      a sentence on facts that even exact does not return, as the model cannot do the task; "" for none
    """

    rows: list[Row]
    texts: list[TextRow]
    heads: list[Head]
    recommendation: Recommendation
    closer: Closer
    report: Path
    shortfalls: tuple[str, ...]
    meta: Meta
    left_out: tuple[Row, ...] = ()
    facts: tuple[FactRow, ...] = ()
    facts_note: str = ""

    def as_dict(self) -> dict:
        """Return the document of `kvfloor audit --json` as plain JSON types."""
        plain = document(
            model=self.meta.model,
            seed=self.meta.seed,
            rows=self.rows,
            method=self.recommendation.method,
            why=why(self.recommendation),
            report=str(self.report),
        )
        nats = [asdict(found) for found in summaries(self.texts, self.recommendation.standard.racing)]
        names = ("task", "context", "protocol")
        weak = [{name: getattr(row, name) for name in names} | {"exact_score": row.score} for row in self.left_out]
        return plain | {
            "certified": [certified_figures(row) for row in self.rows if row.checked],
            "texts": nats,
            "heads": [head.as_dict() for head in self.heads],
            "output_errors": [asdict(one) for one in self.closer.error_maps],
            "examples": [asdict(one) for one in self.closer.examples],
            "left_out": weak,
            "facts": [row.as_dict() for row in self.facts],
            "facts_note": self.facts_note,
        }


def _silent(text: str) -> None:
    del text


def run(question: AuditRequest, track: Track, announce: Announce = _silent) -> Answer:
    """Run the audit that is asked for, write its rows, and return its results.

    question  the arguments of the audit
    track     function `track(total, text)` that is called before each of `total` measurements, which `text` names;
              total is 0 while the model is loaded
    announce  function that is called with lines of text that tell the expected time, and what was measured before
    Rows that are in the folder `question.out` already, of an audit that was stopped, are not measured again. Raises
    ValueError with one line for anything in `question` that cannot be done.
    """
    question, notes = with_chosen(question, track, announce)
    plan, required = _checked(question)
    with Journal(open_folder(question.out)) as journal:
        _measure(question, plan, journal, track, announce, notes)
        return answer(journal, question.kl_limit, required, question.command)


def measure_part(question: AuditRequest, track: Track, announce: Announce = _silent) -> int:
    """Measure the part of an audit that `question.shard` names, and return its number of rows.

    Shard (i, n) is the i-th of n parts; `kvfloor merge` joins them. The other arguments are those of `run`:
    `track(total, text)` is called before each of `total` measurements, `announce` with lines of text that tell the
    expected time and what was measured before. Raises ValueError as `run` does.
    """
    question, _ = with_chosen(question, track, announce)
    plan, _ = _checked(question)
    with Journal(open_folder(question.out)) as journal:
        return _measure(question, plan, journal, track, announce)


def answer(journal: Journal, kl_limit: float, required: Sequence[Condition], command: str) -> Answer:
    """Return the results that follow from the rows in a journal.

    kl_limit  largest tolerated divergence from the exact cache, nats per token
    required  the parsed conditions of `--require`
    command   command line that the report shows
    Raises ValueError if every cell is left out and no text was read, so that nothing is left to compare.
    """
    from kvfloor.audit.closer import read_closer

    header = journal.about
    weak, mute = left_out(journal.rows, header.least_exact), unreadable(journal.rows)
    rows, texts = _judged_rows(journal, weak), journal.texts
    facts = fact_summaries([row for row in journal.facts if row.cell not in mute])
    facts_note = unreadable_note(list(mute.values()))
    notes = left_out_notes(list(weak.values()), header.least_exact)
    if not rows and not texts and weak:
        raise ValueError(f"nothing is left to compare. {notes[0]}")
    meta = Meta(
        model=header.model,
        seed=header.seed,
        command=command,
        versions=header.versions,
        machine=header.machine,
        duration_s=header.seconds,
        notes=(*header.notes, *chat_notes(header.chat), *notes),
        hashes=header.hashes,
    )
    found = recommend(rows, texts=texts, kl_limit=kl_limit, racing=header.racing)
    closer = read_closer(journal.folder, found)
    floors = [floor for some in journal.floors.values() for floor in some]
    by_head = heads([*floors, *closer.floors], [*rows, *closer.error_maps])
    report = journal.folder / "report.html"
    read = summaries(texts, header.racing)
    missed = (*shortfalls(required, rows, read), *uncovered(required, list(weak.values())))
    return Answer(
        rows, texts, by_head, found, closer, report, missed, meta, tuple(weak.values()), tuple(facts), facts_note
    )


def _checked(question: AuditRequest) -> tuple[list[BudgetedMethod], tuple[Condition, ...]]:
    """Return an audit's settings and the parsed conditions of its `--require`; no conditions without one.

    Raises ValueError if something in `question`, the arguments of the audit, cannot be measured.
    """
    plan = settings(question.methods, question.budget_texts)
    if question.prompts is not None:
        read_prompts(question.prompts, question.n)
        tasks: tuple[str, ...] = (question.prompts.stem,)
    else:
        tasks = tuple(task.name for task in chosen_tasks(question.task_names)) if question.task_names else ()
    return plan, () if question.require is None else conditions(question.require, plan, tasks, question.text_names)


def _measure(
    question: AuditRequest,
    plan: Sequence[BudgetedMethod],
    journal: Journal,
    track: Track,
    announce: Announce,
    notes: Sequence[str] = (),
) -> int:
    """Make the measurements that have no row yet, write the journal's files anew, and return the number of rows.

    question  the arguments of the audit
    plan      the settings
    track     function `track(total, text)` that is called before each of `total` measurements, which `text` names
    announce  function that is called with a line of text that tells what was measured before
    notes     sentences for the report
    """
    begin, began = time.perf_counter(), time.time()
    folder = find(question.model, question.accept_terms, lambda text: track(0, text))
    known = identity(question, plan, folder)
    before = None
    if question.fresh or not journal.resume(known):
        before = journal.header
    elif _is_done(question, journal):
        announce(f"{_out(question)} has all of this measured: the report is made anew (--fresh measures again)")
        return len(journal.rows)
    with closing(_engine(question, folder, known, lambda text: track(0, text))) as engine:
        seconds = journal.seconds if journal.rows else 0.0
        header = _header(question, plan, known, engine.grid, hashes_of(question), began, seconds)
        if before is not None:
            names = ", ".join(differences(before.identity, known))
            announce(f"{_out(question)} has another audit (another {names}): its rows are removed")
        elif journal.rows:
            count = f"{len(journal.rows)} of {len(header.grid.pairs)} measurements"
            announce(f"{_out(question)} has {count}: going on from there")
        journal.begin(header)
        asked = _asked(question, header)
        clock = Clock(question.minutes, announce, begin)
        missing = journal.missing(asked(journal.rows))
        total = len(missing) + len({place for place, _ in missing})
        engine.measure(asked, journal, clock, lambda text: track(total, text))
        count = _finish(question, journal, asked, (*notes, *engine.grid.notes, *clock.note()))
        if question.shard is None:
            _look_closer(question, engine, journal, lambda text: track(total, text))
    return count


def _look_closer(question: AuditRequest, engine: Engine, journal: Journal, track: Announce) -> None:
    """Measure errors by head, memory floors and example answers, which explain the result, and write them to files.

    Nothing is done if every cell is left out and no text was read.

    question  the arguments of the audit, of which only the limit of the divergence is used
    engine    measures on the loaded model, in this process or on a Ray cluster
    journal   holds the rows; the files are written into its folder
    track     function that is called with a line of text before each step
    """
    header = journal.about
    rows, texts = _judged_rows(journal, left_out(journal.rows, header.least_exact)), journal.texts
    if rows or texts:
        found = recommend(rows, texts=texts, kl_limit=question.kl_limit, racing=header.racing)
        engine.look_closer(rows, texts, found, track).write(journal.folder)


def _judged_rows(journal: Journal, weak: Collection[Cell]) -> list[Row]:
    """Return one row per setting and cell, with the samples of all its rounds; none on the left-out cells `weak`."""
    return joined([row for row in journal.tasks if row.cell.first not in weak], journal.about.racing)


def _engine(question: AuditRequest, folder: Path, known: dict[str, Any], track: Announce) -> Engine:
    """Return the engine, with the model loaded: it measures in this process, or on a Ray cluster.

    question  the arguments of the audit, which name the engine
    folder    the model's files
    known     the identity of the audit
    track     function that is called with a line of text before each long step
    """
    if question.engine == "ray":
        from kvfloor.audit.cluster import Cluster

        return Cluster(question, folder, known, track)
    from kvfloor.audit.engine import Here

    return Here(question, folder, track)


def _header(
    question: AuditRequest,
    plan: Sequence[BudgetedMethod],
    known: dict[str, Any],
    grid: Grid,
    hashes: dict[str, str],
    began: float,
    seconds: float,
) -> Header:
    """Return the description of the audit that begins now, for `audit.json`.

    question  the arguments of the audit
    plan      the settings
    known     the identity of the audit
    grid      the places and settings
    hashes    file or text -> SHA-256 of what is measured
    began     time at which this start of the command began, seconds since 1970
    seconds   time that earlier starts took
    """
    return Header(
        model=question.model,
        seed=question.seed,
        identity=known,
        settings=[(one.text, one.baseline, one.asked) for one in plan],
        texts=[place for place in grid.places if isinstance(place, TextCell)],
        cells=[place for place in grid.places if isinstance(place, Cell)],
        sheets=[place for place in grid.places if isinstance(place, FactSheet)],
        further=grid.further,
        racing=question.racing,
        least_exact=question.least_exact,
        hashes=hashes,
        chat=grid.chat,
        versions=versions(),
        machine=f"{platform.machine()}, {_threads()} torch threads"
        + (f" x {question.tp} ranks" if question.tp else ""),
        began=began,
        seconds=seconds,
    )


def _asked(question: AuditRequest, header: Header) -> Race | Fixed:
    """Return the rule that says which measurements the audit asks for: a race, or a fixed list.

    An audit with a time limit is a race: settings that clearly lose stop early, and undecided ones have further
    passages of the texts and further samples of the tasks. `question` holds the arguments of the audit; `header` is its
    description, with the places and settings.
    """
    if header.racing:
        configurations = [one.configuration for one in header.methods]
        return race(header.grid, configurations, question.kl_limit, header.least_exact)
    return Fixed(header.grid.part(question.shard), header.least_exact)


def _is_done(question: AuditRequest, journal: Journal) -> bool:
    """Return True if nothing is left to measure in the journal's folder for the audit with the arguments `question`.

    That is so if all rows that are asked for are there. It is also so if rows are missing, but an earlier run of the
    command with the same time limit came to its end: these rows did not fit into the time.
    """
    header = journal.about
    if header.racing != question.racing or (question.shard is None and not is_explained(journal.folder)):
        return False
    limited = question.shard is None and header.minutes is not None and question.minutes is not None
    same_end = limited and header.ended and header.minutes == question.minutes
    return same_end or not journal.missing(_asked(question, header)(journal.rows))


def _finish(question: AuditRequest, journal: Journal, asked: Race | Fixed, notes: Sequence[str]) -> int:
    """Write the files in the order of the report, and return the number of rows.

    Rows of a place on which a setting is missing are left out. A part of an audit (`question.shard`, None for a whole
    audit) keeps all rows, as other parts may be measured in the same folder. `question` holds the arguments of the
    audit, `asked` is the rule that says which measurements are asked for, `notes` are sentences for the report.
    """
    pairs = asked(journal.rows)
    missing = journal.missing(pairs)
    if question.shard is not None:
        journal.sort()
        return len(pairs) - len(missing)
    lacking = {place for place, _ in missing}
    kept = [pair for pair in journal.about.grid.all_pairs if pair in journal.rows and pair[0] not in lacking]
    if isinstance(asked, Race) and (told := asked.note({pair: journal.rows[pair] for pair in kept})):
        notes = (*notes, told)
    journal.finish(kept, question.minutes, notes)
    return len(kept)


def _out(question: AuditRequest) -> str:
    return repr(str(question.out))


def _threads() -> int:
    import torch

    return torch.get_num_threads()
