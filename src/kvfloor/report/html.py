"""Render the report page of an audit, a comparison of KV-cache compressors (methods) on one model.

The page is one file without scripts or fetched parts; every field is escaped. A setting is a method with its budget. A
row is one setting measured on one cell, i.e. a task at a context length under a protocol (question asked before or
after the compression). `exact` is the cache that keeps every token. A candidate is a setting that takes fewer bytes
than `exact`. Its verdict says whether its loss of quality against `exact` is shown to be tolerable ("holds"), shown to
be too large ("falls"), or neither ("open"). The recommended setting is the candidate of fewest bytes that the audit
shows to be safe.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfloor.audit.examples import SideBySide
from kvfloor.audit.explain import cautions, what_breaks, why
from kvfloor.audit.fact_rows import FactRow
from kvfloor.audit.heads import GOOD, Head, summary
from kvfloor.audit.meta import Meta
from kvfloor.audit.nats import TextRow
from kvfloor.audit.output_errors import ErrorMap
from kvfloor.audit.plan import BASELINES
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.rows import Row
from kvfloor.files import replace_file
from kvfloor.report import divergence, heatmap, ladder, multiples, plane, tables
from kvfloor.report.chart import Chart
from kvfloor.report.decision import decision_chart
from kvfloor.report.environment import environment
from kvfloor.report.facts import returned_by_setting
from kvfloor.report.marks import marks
from kvfloor.report.parts import part_tables
from kvfloor.statistics import MIN_SAMPLES


def render(
    rows: Sequence[Row],
    answer: Recommendation,
    meta: Meta,
    path: Path,
    by_head: Sequence[Head] = (),
    texts: Sequence[TextRow] = (),
    error_maps: Sequence[ErrorMap] = (),
    examples: Sequence[SideBySide] = (),
    facts: Sequence[FactRow] = (),
    facts_note: str = "",
) -> None:
    """Write the report of an audit to `path` as one HTML page. If this fails, an existing file stays as it was.

    rows        one per setting and cell, with the setting's score, bytes and times
    answer      the recommended setting, with the verdict on every candidate
    meta        the source of the numbers: model, command, versions, machine
    by_head     floor (lower bound on any method's bytes) and cheapest good setting of each kv head, if measured
    texts       one row per setting and text, with the setting's divergence from exact (KL of next-token distributions)
    error_maps  the output error per layer and kv head of each setting on one text
    examples    answers of exact and of the recommended setting
    facts       one per setting and context, with the hidden facts that came back through the setting's cache
    facts_note  a sentence on facts that even exact does not return; "" for none
    Raises ValueError if both `rows` and `texts` are empty, if the rows mix models, and if the file cannot be written.
    """
    replace_file(path, page(rows, answer, meta, by_head, texts, error_maps, examples, facts, facts_note))


def page(
    rows: Sequence[Row],
    answer: Recommendation,
    meta: Meta,
    by_head: Sequence[Head] = (),
    texts: Sequence[TextRow] = (),
    error_maps: Sequence[ErrorMap] = (),
    examples: Sequence[SideBySide] = (),
    facts: Sequence[FactRow] = (),
    facts_note: str = "",
) -> str:
    """Return the report of an audit as HTML text.

    rows        one per setting and cell, with the setting's score, bytes and times
    answer      the recommended setting, with the verdict on every candidate
    meta        the source of the numbers: model, command, versions, machine
    by_head     floor (lower bound on any method's bytes) and cheapest good setting of each kv head, if measured
    texts       one row per setting and text, with the setting's divergence from exact (KL of next-token distributions)
    error_maps  the output error per layer and kv head of each setting on one text
    examples    answers of exact and of the recommended setting
    facts       one per setting and context, with the hidden facts that came back through the setting's cache
    facts_note  a sentence on facts that even exact does not return; "" for none
    Raises ValueError if both `rows` and `texts` are empty.
    """
    if not rows and not texts:
        raise ValueError("there is nothing to report: give at least the rows of 'exact'")
    drawn = marks([*rows, *texts])
    limit = answer.standard.kl_limit
    cells, lines = tables.scoreboard(rows, answer.standard)
    figures: dict[str, list[Chart]] = {}
    for cell in sorted(cells, key=lambda cell: (cell.task, cell.context, cell.protocol != "visible")):
        figures.setdefault(cell.task, []).append(decision_chart([r for r in rows if r.cell == cell], drawn))
    return (
        environment()
        .get_template("page.html")
        .render(
            meta=meta,
            model_name=_last_component(meta.model),
            answer=answer,
            why=why(answer),
            what_breaks=what_breaks(answer),
            cautions=cautions(answer),
            paste=_pasted_setting([*rows, *texts], answer),
            rows=tables.ordered(rows),
            nats_charts=[] if limit is None else divergence.charts(texts, drawn, limit),
            nats=[] if limit is None else divergence.judged_lines(texts, answer.standard),
            exact_bytes=max(row.exact_bytes for row in (*rows, *texts)),
            floor_bytes=max(row.floor_bytes for row in (*rows, *texts)),
            settings=len({row.method for row in (*rows, *texts)}),
            cells=cells,
            scores=lines,
            parts=part_tables(rows),
            sizes=tables.sizes(rows),
            speeds=tables.speeds(rows),
            figures=figures,
            marks=drawn,
            multiples=multiples.multiples(rows, drawn),
            multiples_frame=multiples,
            heatmaps=_recommended_first(heatmap.heatmaps([*rows, *error_maps]), answer),
            error_maps=error_maps,
            texts_context=max(
                (row.context for row in texts if row.text in {one.text for one in error_maps}), default=0
            ),
            examples=examples,
            facts=facts,
            facts_note=facts_note,
            returned=returned_by_setting(facts),
            planes=plane.planes(rows, texts, error_maps, drawn),
            ladders=ladder.ladders(by_head),
            ladder_frame=ladder,
            heads=by_head,
            heads_summary=summary(by_head),
            head_limits={"good": GOOD},
            baselines=BASELINES,
            min_samples=MIN_SAMPLES,
        )
    )


def _recommended_first(maps: Sequence[heatmap.Heatmap], answer: Recommendation) -> list[heatmap.Heatmap]:
    """Sort the maps of errors per layer and kv head: the recommended setting's first, the others by rising error.

    answer: the recommendation. If it has no setting, all maps are sorted by error.
    """
    return sorted(maps, key=lambda one: (one.setting != answer.method, one.overall))


def _last_component(model: str) -> str:
    """Return the last component of a model's path or hub name, without a slash at its end."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] or model


def _pasted_setting(rows: Sequence[Row | TextRow], answer: Recommendation) -> dict[str, Any] | None:
    """Return a dict with the recommended setting, to paste into Python; None where no setting is recommended.

    rows: all rows of the audit, on tasks and on texts. answer: the recommendation, whose `method` is the setting or
    None. The keys of the dict:
    literal  the setting as a quoted string, such as '"h2o@512"'. A budget that is a share of the context is replaced by
             the largest number of tokens that it came to in the audit, because a cache for a stream of unknown length
             cannot take a share
    share    the budget that was replaced, such as "25%"; None if none was
    """
    chosen = [row for row in rows if row.method == answer.method]
    if answer.method is None or not chosen:
        return None
    one = chosen[0]
    if one.budget is None or not one.budget.endswith("%"):
        return {"literal": json.dumps(answer.method), "share": None}
    tokens = max(row.budget_tokens or 0 for row in chosen)
    return {"literal": json.dumps(f"{one.configuration}@{tokens}"), "share": one.budget}
