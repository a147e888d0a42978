"""Print the results of an audit, and of games played against a method, as tables in the terminal.

Control characters in names are escaped, so that they cannot colour or steer the terminal. A setting is a method
(KV-cache compressor) with its budget. A row is one setting measured on one task at a context length under a protocol
(question asked before or after the compression). `exact` is the cache that keeps every token. A divergence is a mean KL
to exact in nats per token. A candidate is a setting that takes fewer bytes than exact; its verdict says whether its
loss of quality against exact is shown to be tolerable ("holds"), shown to be too large ("falls"), or neither ("open").
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvfloor.audit.examples import SideBySide
from kvfloor.audit.explain import cautions, what_breaks, why
from kvfloor.audit.fact_rows import FactRow
from kvfloor.audit.format import bytes_text, counted, number_of_nats, percent_text, points_text, smaller_text
from kvfloor.audit.nats import TextRow
from kvfloor.audit.recommend import Recommendation
from kvfloor.audit.rows import Row
from kvfloor.game.engine.result import Result
from kvfloor.report.divergence import judged_lines
from kvfloor.report.facts import hiding_lines
from kvfloor.report.parts import PartTable, part_tables
from kvfloor.report.tables import CellScore, scoreboard
from kvfloor.report.text import visible

_VERDICTS = {"holds": "green", "breaks": "yellow", "cheats": "red"}
_COLOURS = {"holds": "green", "open": "yellow", "falls": "red", None: "dim"}


def print_report(
    rows: Sequence[Row],
    answer: Recommendation,
    console: Console,
    texts: Sequence[TextRow] = (),
    examples: Sequence[SideBySide] = (),
    facts: Sequence[FactRow] = (),
    facts_note: str = "",
) -> None:
    """Print a table of divergences on the texts, tables of scores on the tasks, and the recommendation.

    rows      one per setting, task, context length and protocol; one table per context length and protocol
    answer    the recommended setting, with the verdict on every candidate
    console   the terminal to print to
    texts     one row per setting and text; none: no table of divergences
    examples  answers of exact and of other settings to one prompt; the first is printed, cut to a line per answer
    facts     one per setting and context length, with the hidden facts that came back through the setting's cache
    facts_note  a sentence on facts that even exact does not return; "" for none
    """
    if texts and answer.standard.kl_limit is not None:
        console.print(_nats_table(texts, answer))
        limit = answer.standard.kl_limit
        console.print(Text(f"✓ within {limit:g} nats of exact   ? not shown   ✗ above", style="dim"))
        console.print()
    tables = sorted({(row.context, row.protocol) for row in rows}, key=lambda one: (one[0], one[1] != "visible"))
    for context, protocol in tables:
        some = [row for row in rows if (row.context, row.protocol) == (context, protocol)]
        console.print(_table(some, answer))
    for one in part_tables(rows):
        console.print(_parts_table(one))
    if rows:
        margin = points_text(answer.standard.margin)
        console.print(
            Text(f"✓ loses less than {margin} to exact   ? not shown   ✗ loses, with 95 % confidence", style="dim")
        )
        console.print()
    for context in sorted({row.context for row in facts}):
        console.print(_facts_table([row for row in facts if row.context == context]))
    for sentence in (*hiding_lines(facts), *filter(None, (facts_note,))):
        console.print(_line("- ", sentence))
    for row in rows:
        if row.checked:
            console.print(_line(f"{row.method} on {row.task}: ", bounds_text(row)))
    console.print(_line("Use: ", answer.method or "nothing here", style="bold"))
    console.print(_line("", why(answer)))
    for sentence in (*what_breaks(answer), *cautions(answer)):
        console.print(_line("- ", sentence))
    for one in examples[:1]:
        _print_example(one, console)


def bounds_text(row: Row) -> str:
    """Return what the check of a certified method's error bounds found, and its hot and cold bytes, in one line."""
    bound = "none" if row.largest_bound is None else f"{row.largest_bound:.2g}"
    return (
        f"{row.checked:,} answers checked, largest bound {bound}, largest error {row.largest_error or 0.0:.2g}, "
        f"{row.violations:,} violations; hot {bytes_text(row.state_bytes)}, cold {bytes_text(row.cold_bytes)}, "
        f"read per token {bytes_text(row.bytes_read_per_token)}"
    )


def _print_example(one: SideBySide, console: Console) -> None:
    """Print the end of an example's prompt, the right answer if there is one, exact's answer, and the other settings'.

    `one` is the example, `console` the terminal to print to. Another setting's answer is printed from the first token
    on that differs from exact's answer. Each text is cut to 60 characters.
    """
    console.print()
    console.print(_line(f"Example, {one.name} after {one.context:,} tokens: ", f"…{_brief(one.prompt_end, -60)}"))
    if one.truth is not None:
        console.print(_line("  right: " if one.kind == "task" else "  text: ", _brief(one.truth)))
    console.print(_line("  exact: ", _brief(one.exact.agrees)))
    for other in one.others:
        count = len(one.exact.tokens)
        if other.is_same:
            console.print(_line(f"  {visible(other.setting)}: ", f"the same {counted(count, 'token')}"))
        else:
            said = _brief(other.differs + other.rest)
            console.print(
                _line(f"  {visible(other.setting)}: ", f"the same for {other.same} of {count}, then “{said}”")
            )


def _brief(text: str, most: int = 60) -> str:
    """Return a text in one line, cut to its first `most` characters; if `most` is negative, to its last |most|."""
    line = " ".join(text.split())
    if len(line) <= abs(most):
        return line
    return f"{line[:most]}…" if most > 0 else line[most:]


def print_notes(notes: Sequence[str], console: Console) -> None:
    """Print to `console` what an audit left out, and other notes on it, one per line."""
    for note in notes:
        console.print(_line("- ", note))


def print_barriers(results: Sequence[Result]) -> None:
    """Print a table with one line per game played against a method, then each game's verdict in words.

    A game hides random bits in the tokens of a method's state (its cache), and decodes them from attention outputs. By
    a theorem, a state that lets all bits be decoded needs many bytes. A game's verdict is "holds" (enough outputs were
    right), "breaks" (too few were right) or "cheats" (the outputs told more bits than the state's bytes can hold). A
    barrier is one kind of game. The numbers that only games of one barrier have, such as the width of a window, follow
    the verdict, and then the unseen room: the bits of the message that no game filled, as many as could be hidden
    elsewhere unnoticed.
    """
    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("barrier", "verdict", "rows", "hidden", "certified", "floor", "message", "state"):
        table.add_column(name, justify="left" if name in ("barrier", "verdict") else "right", no_wrap=True)
    for one in results:
        sizes = (one.hidden_bits, one.certified_bits, one.floor_bits, 8 * one.message_bytes, 8 * one.state_bytes)
        table.add_row(
            one.barrier, Text(one.verdict, style=_VERDICTS[one.verdict]), percent_text(one.row_success),
            *(f"{size:,.0f}" for size in sizes),
        )  # fmt: skip
    console.print(_line("", results[0].method, style="bold"))
    console.print(table)
    console.print(Text("sizes in bits; rows: answered within 1±eta; floor at p = 0.9", style="dim"))
    for one in results:
        unseen = f"unseen room {one.unseen_bits:,.0f} bits"
        console.print(_line(f"{one.barrier}: ", f"{one.why}; {details_text(one.details)}; {unseen}"))


def details_text(details: Mapping[str, Any]) -> str:
    """Return the facts `details` of a game as one line, "name value, name value", of numbers and texts only.

    Lists are left out; the JSON document has them.
    """
    shown = {name: value for name, value in details.items() if isinstance(value, (str, int, float))}
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:,.4g}' if isinstance(value, float) else value}"
        for name, value in shown.items()
    )


def _nats_table(texts: Sequence[TextRow], answer: Recommendation) -> Table:
    count = counted(len({row.text for row in texts}), "text")
    title = f"{count}, {texts[0].context:,} tokens of context, {texts[0].continuation:,} scored"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("setting", no_wrap=True)
    racing = answer.standard.racing
    for name in ("state", "smaller", "(16 bit)", "KL, nats", "95 %", "texts" if racing else "same top"):
        table.add_column(name, justify="right", no_wrap=True)
    for one, verdict, sign in judged_lines(texts, answer.standard):
        found = one.figures
        table.add_row(
            Text(visible(one.setting), style="dim" if one.baseline else ""),
            bytes_text(one.state_bytes),
            smaller_text(one.exact_bytes, one.state_bytes),
            smaller_text(one.exact_16_bit_bytes, one.state_16_bit_bytes),
            Text(f"{number_of_nats(found.kl)} {sign}", style=_COLOURS[verdict]),
            f"{number_of_nats(found.kl_low)}..{number_of_nats(found.kl_high)}",
            str(one.texts) if racing else f"{100 * found.same_top:.1f} %",
        )
    return table


def _facts_table(facts: Sequence[FactRow]) -> Table:
    """Return a table of the facts that came back through each setting's caches, of one context length."""
    first = facts[0]
    title = f"hidden facts, {first.context:,} tokens: {first.facts} facts of {first.hidden_bits:,.0f} bits"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("setting", no_wrap=True)
    for name in ("caches", "could hold", "returned", "95 %", "bits certified"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in facts:
        low, high = row.right_interval
        table.add_row(
            Text(visible(row.method), style="dim" if row.baseline else ""),
            bytes_text(row.cache_bytes),
            f"{int(row.most_facts):,}",
            f"{row.right} of {row.facts}",
            f"{percent_text(low)}..{percent_text(high)}",
            f"{int(row.certified_bits):,}",
        )
    return table


def _table(rows: Sequence[Row], answer: Recommendation) -> Table:
    cells, lines = scoreboard(rows, answer.standard)
    asked = "question visible" if cells[0].protocol == "visible" else "question after"
    least, most = min(row.n for row in rows), max(row.n for row in rows)
    samples = f"{least}" if least == most else f"{least} to {most}"
    title = Text(f"{asked}, {cells[0].context:,} tokens, n = {samples} per score")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("setting", no_wrap=True)
    table.add_column("state", justify="right", no_wrap=True)
    table.add_column("smaller", justify="right", no_wrap=True)
    for cell in cells:
        table.add_column(Text(visible(cell.task)), justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            Text(visible(line.setting), style="dim" if line.baseline else ""),
            bytes_text(line.state_bytes),
            smaller_text(line.exact_bytes, line.state_bytes),
            *(_score(score) for score in line.scores),
        )
    return table


def _parts_table(one: PartTable) -> Table:
    title = Text(f"{visible(str(one.cell))}: mean share of each part")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("setting", no_wrap=True)
    for name in one.names:
        table.add_column(Text(visible(name)), justify="right")
    for setting, shares in one.lines:
        table.add_row(Text(visible(setting)), *(percent_text(share) for share in shares))
    return table


def _score(score: CellScore) -> Text:
    if score.row is None:
        return Text("-", style="dim")
    return Text(f"{percent_text(score.row.score)} {score.sign}", style=_COLOURS[score.verdict])


def _line(lead: str, words: str, style: str = "") -> Text:
    return Text(lead + visible(words), style=style)
