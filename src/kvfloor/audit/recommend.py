"""Recommend the setting of fewest bytes whose loss of quality stays below a limit, from the audit's rows alone.

A setting is one method under one budget. `exact` is the cache that keeps every token. Quality is measured in two ways:

- **Texts.** The divergence is the mean KL (nats per token) of the next-token distributions to exact's over all texts.
  It shows even small losses, so it decides where texts were read: *with 95 % confidence, the recommended setting
  diverges by less than the limit*, and no task shows a loss.
- **Tasks.** A cell is one task at one context length under one protocol (question asked before or after the
  compression), and a row is one setting measured on one cell. Where no text was read, tasks decide: *with 95 %
  confidence, the recommended setting loses fewer than `margin` points to exact on every audited cell*.

Many cells and settings are tested, and three rules keep the probability of a wrong claim at 5 %:

- **Cells.** A setting must pass its test on every cell, each at the full level. Several tests that must all reject need
  no correction (intersection-union test: Berger, Technometrics 24 (1982)).
- **Budgets.** A method's budgets are tested from the largest down. After the first budget whose verdict is not "holds",
  no smaller one is accepted. Bytes alone fix this order, before any score is known, so a method's budgets share one
  level (fixed-sequence test: Maurer, Hothorn and Lehmacher, 1995).
- **Methods.** The 5 % are divided by the number of tested methods (Bonferroni).

An audit with a time limit is a race: it judges after every text and after every round of a cell's samples (round 1 has
the first n, round 2 the next n), and undecided settings are measured further. There a fourth rule keeps the
probability:

- **Looks.** The k-th judgement of a setting on one cell, or on the texts, may err with the share 1 / (k (k + 1)) of the
  allowed error. The shares of all looks sum to 1, so a claim holds whenever the race stops.

`exact` is the reference and `random`, which keeps random tokens, the control; neither is recommended. A candidate must
be measured on every cell and must save bytes. A `Standard` has the limit, the margin and the confidence. By these it
judges a setting's rows: the verdict is "holds" (too large a loss is excluded), "falls" (a loss, or too large a
divergence, is certain) or "open".
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvfloor.audit.criterion import SEVERITY, Standard, Verdict
from kvfloor.audit.nats import Divergence, TextCell, TextRow
from kvfloor.audit.rows import Cell, Row

WEAK_EXACT_SCORE = 0.5
"""Score of exact below which a cell is called weak: little is left there for a method to lose."""

MARGIN = 0.15
"""Default of the largest tolerated loss on tasks, as a share of right answers."""

CONFIDENCE = 0.95
"""Default confidence of the whole recommendation."""

UNJUDGED = ("exact", "random")
"""Names of the methods that are never recommended: the reference and the control."""

KL_LIMIT = 0.01
"""Default of the largest tolerated divergence, nats per token.

On text that the exact model itself would write, a divergence of 0.01 raises the perplexity by 1 %.
"""


@dataclass(frozen=True)
class Judged:
    """Record the verdict on one candidate setting over all texts and cells.

    setting                   the setting as text, e.g. `h2o(recent=64)@256`
    method                    the setting without its budget, e.g. `h2o(recent=64)`
    verdict                   the worse of the verdicts on texts and on cells: "holds" (too large a loss is excluded),
                              "falls" (a loss, or too large a divergence, is certain) or "open" (neither is shown)
    believed                  True if the setting and every larger budget of its method hold
    state_bytes, exact_bytes  bytes of the setting and of exact at the end of the context: means over the texts, or over
                              the cells if no text was read. The means are over those texts or cells alone on which all
                              candidates were measured; if there are none, over all of the setting
    peak_state_bytes          maximum over the texts or cells
    weakest                   the row with the worst verdict; None if no task was run
    divergence                mean KL to exact on the texts, and related figures; None if no text was read. Its
                              interval has the confidence by which the setting is judged
    decided_by                "texts" or "tasks": which of them gave the verdict
    state_16_bit_bytes        bytes of the setting if the model's dtype had 16 bits; `exact_16_bit_bytes` is the same
                              for exact. None if no text was read
    """

    setting: str
    method: str
    verdict: Verdict
    believed: bool
    state_bytes: float
    peak_state_bytes: int
    exact_bytes: float
    weakest: Row | None
    divergence: Divergence | None = None
    decided_by: str = "tasks"
    state_16_bit_bytes: float | None = None
    exact_16_bit_bytes: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """Hold the recommended setting of an audit, and all candidates with their verdicts.

    A candidate is a setting that saves bytes and was measured on every text and cell (in a race, on at least one text,
    or on one cell if no text was read).

    method    text of the recommended setting; None if no setting is safe
    judged    the verdict on every candidate, from the fewest bytes up
    exact     the rows of the exact cache, one per cell
    standard  largest tolerated divergence and loss of score, and the confidence, by which candidates were judged
    texts     the rows of the exact cache, one per text and context length
    """

    method: str | None
    judged: tuple[Judged, ...]
    exact: tuple[Row, ...]
    standard: Standard
    texts: tuple[TextRow, ...] = ()

    @property
    def weak(self) -> tuple[Row, ...]:
        """Return the rows of the exact cache on weak cells, i.e. those with a score below WEAK_EXACT_SCORE."""
        return tuple(row for row in self.exact if row.score < WEAK_EXACT_SCORE)

    @property
    def chosen(self) -> Judged | None:
        """Return the verdict on the recommended setting, or None if none is recommended."""
        return next((one for one in self.judged if one.setting == self.method), None)


def recommend(
    rows: Sequence[Row],
    margin: float = MARGIN,
    confidence: float = CONFIDENCE,
    *,
    texts: Sequence[TextRow] = (),
    kl_limit: float = KL_LIMIT,
    racing: bool = False,
) -> Recommendation:
    """Return the safe setting of fewest bytes, with the verdict on every candidate.

    rows, texts  the rows of all settings on the cells, one per setting and cell (`audit/rounds.py` joins several rounds
                 of samples), and those on the texts
    margin       largest tolerated loss of score on tasks; used if no text was read
    confidence   confidence of the whole recommendation
    kl_limit     largest tolerated divergence, nats per token; used if texts were read
    racing       True if the rows are those of a race, i.e. an audit with a time limit, in which settings that clearly
                 lose stopped early and undecided ones had further passages and samples. Then a setting need not have
                 read every text or run on every cell, and the intervals allow for a judgement after every text and
                 every round of samples. One that holds but was not run on every cell is undecided

    If texts were read, a setting is safe if it and every larger budget of its method are shown to diverge by less than
    `kl_limit`, and no cell shows a loss. If no text was read, it is safe if it and every larger budget of its method
    are shown to lose less than `margin` on every cell; no setting is recommended if exact itself scores below
    WEAK_EXACT_SCORE on every cell. The default margin of 15 points suits a short audit: with n = 40 samples per cell
    and eight methods, a setting that loses no sample to exact is shown to lose less than 14 points. A tighter margin
    needs more samples.

    Raises ValueError if the rows hold no exact reference or a setting twice on one cell or text, or if margin,
    confidence or limit is out of range.
    """
    if not 0 < margin < 1 or not 0.5 < confidence < 1 or not kl_limit > 0:
        raise ValueError(
            f"margin {margin} must lie in (0, 1), confidence {confidence} in (0.5, 1), and the limit {kl_limit} above 0"
        )
    exact = {row.cell: row for row in rows if row.method == "exact"}
    exact_texts = {row.cell: row for row in texts if row.method == "exact"}
    if not exact and not exact_texts:
        raise ValueError("the rows hold no exact reference: audit with the method 'exact' too")
    candidates = _candidates(rows, texts, exact, exact_texts, racing)
    methods = len({one.method for one in candidates})
    standard = Standard(margin, confidence, methods, kl_limit if exact_texts else None, racing)
    judged = _judge(candidates, standard)
    safe = [one for one in judged if one.believed]
    answer = Recommendation(
        method=safe[0].setting if safe else None,
        judged=judged,
        exact=tuple(exact.values()),
        standard=standard,
        texts=tuple(exact_texts.values()),
    )
    if not exact_texts and len(answer.weak) == len(answer.exact):
        return Recommendation(None, judged, answer.exact, standard)
    return answer


@dataclass(frozen=True)
class _Candidate:
    """Hold a setting's rows: one per cell of the tasks, and one per text and context length.

    setting   the setting as text
    method    the setting without its budget
    rows      its rows on the cells
    texts     its rows on the texts
    is_whole  True if the setting was measured on every cell; if not, it is never called safe, whatever its texts show
    shared    the texts and cells on which all candidates were measured
    """

    setting: str
    method: str
    rows: tuple[Row, ...]
    texts: tuple[TextRow, ...]
    is_whole: bool
    shared: frozenset[Cell | TextCell] = frozenset()

    @property
    def sized(self) -> tuple[Row, ...] | tuple[TextRow, ...]:
        """Return the rows whose bytes are compared with exact's: those on texts; those on cells if no text was read."""
        return self.texts or self.rows

    def mean(self, name: str) -> float:
        """Return the mean of the field `name` over those rows of `sized` whose text or cell is in `shared`.

        If there are none, the mean is over all rows of `sized`.
        """
        rows = [row for row in self.sized if row.cell in self.shared] or self.sized
        return sum(getattr(row, name) for row in rows) / len(rows)


def _candidates(
    rows: Sequence[Row], texts: Sequence[TextRow], exact: dict[Cell, Row], exact_texts: dict, racing: bool
) -> list[_Candidate]:
    """Return the settings that may be recommended, with their rows.

    Such a setting is measured on every cell and text (with `racing`, on at least one text, or on one cell if no text
    was read), takes fewer bytes than exact, and is neither `exact` nor `random`.

    rows, texts         the rows of all settings on the cells, and those on the texts
    exact, exact_texts  the exact cache's rows by cell, and those by text
    racing              True if the audit was a race
    Raises ValueError if a setting has two rows on one cell or text.
    """
    settings: dict[str, dict] = defaultdict(dict)
    for row in (*rows, *texts):
        if row.cell in settings[row.method]:
            raise ValueError(f"the rows hold {row.method!r} on {row.cell} twice: give each cell once")
        settings[row.method][row.cell] = row
    found = []
    for setting, cells in settings.items():
        first = next(iter(cells.values()))
        one = _Candidate(
            setting,
            first.configuration,
            tuple(row for row in cells.values() if isinstance(row, Row)),
            tuple(row for row in cells.values() if isinstance(row, TextRow)),
            is_whole=exact.keys() <= cells.keys(),
        )
        measured = one.texts if exact_texts else one.rows
        enough = bool(measured) if racing else cells.keys() == exact.keys() | exact_texts.keys()
        if first.name not in UNJUDGED and enough and one.mean("state_bytes") < one.mean("exact_bytes"):
            found.append(one)
    read = [frozenset(row.cell for row in one.sized) for one in found]
    return [replace(one, shared=frozenset.intersection(*read)) for one in found]


def _judge(candidates: Sequence[_Candidate], standard: Standard) -> tuple[Judged, ...]:
    """Judge the candidates by `standard`, each method's largest budget first; return the verdicts by rising bytes.

    Each candidate's verdict comes from its own rows alone. A verdict "falls" or "open" ends its method's sequence: for
    it and all smaller budgets `believed` is False, also where a smaller budget's own verdict is "holds". A candidate
    that was not run on every cell gets "open" in place of "holds".
    """
    judged: list[Judged] = []
    stopped: set[str] = set()
    for one in sorted(candidates, key=lambda one: (-one.mean("state_bytes"), one.setting)):
        far, on_texts = standard.judge_texts(one.texts) if one.texts else (None, None)
        weakest = min(one.rows, key=lambda row: _strength(row, standard), default=None)
        verdict, decided_by = _verdict(on_texts, weakest, standard)
        if verdict == "holds" and not one.is_whole:
            verdict = "open"
        if verdict != "holds":
            stopped.add(one.method)
        judged.append(
            Judged(
                setting=one.setting,
                method=one.method,
                verdict=verdict,
                believed=one.method not in stopped,
                state_bytes=one.mean("state_bytes"),
                peak_state_bytes=max(row.peak_state_bytes for row in one.sized),
                exact_bytes=one.mean("exact_bytes"),
                weakest=weakest,
                divergence=far,
                decided_by=decided_by,
                state_16_bit_bytes=one.mean("state_16_bit_bytes") if one.texts else None,
                exact_16_bit_bytes=one.mean("exact_16_bit_bytes") if one.texts else None,
            )
        )
    return tuple(sorted(judged, key=lambda one: (one.state_bytes, one.peak_state_bytes, one.setting)))


def _strength(row: Row, standard: Standard) -> tuple[int, float, float, Cell]:
    """Return a sort key that puts the row with the worst verdict by `standard` first.

    Of several such rows, the one with the largest loss of score comes first.
    """
    return SEVERITY[standard.verdict(row)], row.score - row.exact_score, standard.lower_end(row), row.cell


def _verdict(on_texts: Verdict | None, weakest: Row | None, standard: Standard) -> tuple[Verdict, str]:
    """Return (verdict, source): the worse of a setting's verdicts on texts and on tasks, and "texts" or "tasks".

    If both are equally bad, the source is "texts".

    on_texts  the verdict on its divergence; None if no text was read: tasks alone decide
    weakest   its row with the worst verdict on a cell; None if no task was run
    standard  what `weakest` is judged by; if texts were read, only a certain loss on it counts against the setting
    """
    if on_texts is None:
        assert weakest is not None
        return standard.verdict(weakest), "tasks"
    on_tasks: Verdict = "holds" if weakest is None else standard.shown_worse(weakest)
    return (on_tasks, "tasks") if SEVERITY[on_tasks] < SEVERITY[on_texts] else (on_texts, "texts")
