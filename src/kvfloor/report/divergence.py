"""Draw each setting's divergence from the exact cache against its bytes, and list it, for the texts of an audit.

A setting is a method (KV-cache compressor) with its budget. Its divergence is the mean KL(p || q) in nats per token,
where q is the setting's next-token distribution and p that of the exact cache, which keeps every token. A row is one
setting on one text: the model reads the first part of the text (the context), and the tokens of the rest are scored.
"""

from collections.abc import Mapping, Sequence

from kvfloor.audit.criterion import Standard, Verdict
from kvfloor.audit.format import bytes_text, nats_text, number_of_nats
from kvfloor.audit.nats import TextRow, TextSummary, summaries
from kvfloor.report.chart import BOTTOM, LEFT, RIGHT, TOP, Axis, Chart, Datum, Rule, Series, power_text
from kvfloor.report.marks import Mark
from kvfloor.report.tables import VERDICT_SIGNS

_NAMED = 3  # texts that a figure names; more are counted
LEAST = 1e-6
"""Divergences below this are drawn at the lower edge: they are rounding."""


def divergence_chart(lines: Sequence[TextSummary], marks: Mapping[str, Mark], limit: float, title: str) -> Chart:
    """Make the figure of divergence (y, log scale) against bytes (x, log scale).

    lines  one summary (mean divergence and bytes) per setting; `exact` may be among them and is not drawn
    marks  maps each method (a setting without its budget) to its colour and shape; each method is one curve
    limit  the largest tolerated divergence, drawn as a line across the figure
    title  text above the figure
    """
    shown = sorted((one for one in lines if one.setting != "exact"), key=lambda one: one.state_bytes)
    any_line = lines[0]
    rules = {
        any_line.exact_bytes: "exact, the model's dtype",
        any_line.exact_16_bit_bytes: "exact, 16 bits",
        any_line.floor_bytes: "floor, worst case",
    }
    across = Axis([*(one.state_bytes for one in shown), *rules], LEFT, RIGHT, log=True, room=0.06, write=power_text)
    ends = [max(LEAST, x) for one in shown for x in (one.figures.kl, one.figures.kl_high)]
    up = Axis([*ends, limit], BOTTOM, TOP, log=True, base=10.0, room=0.06, write=number_of_nats)
    curves: dict[str, list[Datum]] = {}
    for one in shown:
        curves.setdefault(one.configuration, []).append(_datum(one))
    return Chart(
        title=title,
        label=f"Divergence from exact against state bytes, {title}",
        x_name="bytes of state at the end of the context (log scale)",
        across=across,
        up=up,
        series=tuple(Series(mark, tuple(curves[name])) for name, mark in marks.items() if name in curves),
        captions=(f"Nats per token, log scale; down and to the left is better. Dotted: the limit of {limit:g} nats.",),
        rules=tuple(
            Rule(size, (f"{words}, {bytes_text(size)}",), "floor" if "floor" in words else "tokenids", top=16 + 18 * i)
            for i, (size, words) in enumerate(rules.items())
        ),
        level=Datum(any_line.exact_bytes, limit, "limit", (limit, limit)),
    )


def charts(rows: Sequence[TextRow], marks: Mapping[str, Mark], limit: float) -> list[Chart]:
    """Return one figure of divergence against bytes for each context length of the texts, the shortest first.

    rows   one per setting and text; a figure has those of its context length
    marks  maps each method (a setting without its budget) to its colour and shape
    limit  the largest tolerated divergence
    """
    found = []
    for context in sorted({row.context for row in rows}):
        some = [row for row in rows if row.context == context]
        names = list(dict.fromkeys(row.text for row in some))
        texts = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} texts"
        title = f"{texts}: {context:,} tokens of context, {some[0].continuation:,} scored"
        found.append(divergence_chart(summaries(some), marks, limit, title))
    return found


def judged_lines(rows: Sequence[TextRow], standard: Standard) -> list[tuple[TextSummary, Verdict | None, str]]:
    """Return the lines of the divergence table, from the smallest divergence up: (summary, verdict, sign) per setting.

    rows      one per setting and text
    standard  the largest tolerated divergence (the limit), and the confidence of the verdicts
    The summary has the setting's mean divergence and bytes. The verdict is "holds" if the divergence is shown to be
    within the limit, "falls" if it is shown to exceed the limit, else "open". The sign is the verdict's: ✓, ✗ or ?. The
    line of `exact` is (summary, None, "").
    """
    lines = []
    for one in sorted(summaries(rows, standard.racing), key=lambda one: one.figures.kl):
        some = [row for row in rows if row.method == one.setting]
        if one.setting == "exact":
            lines.append((one, None, ""))
        else:
            verdict = standard.judge_texts(some)[1]
            lines.append((one, verdict, VERDICT_SIGNS[verdict]))
    return lines


def _datum(one: TextSummary) -> Datum:
    found = one.figures
    words = (
        f"{one.setting}: {nats_text(found.kl)} ({number_of_nats(found.kl_low)} to {number_of_nats(found.kl_high)}) in "
        f"{one.state_bytes:,.0f} bytes; same likeliest token {100 * found.same_top:.1f} %"
    )
    return Datum(one.state_bytes, max(LEAST, found.kl), words, (found.kl_low, max(LEAST, found.kl_high)))
