"""Render the page of `kvfloor break --out`: every game played against a method, and sweeps of harder games.

A state is the cache of a method (KV-cache compressor). A game hides random bits in the tokens that are appended to the
state, rebuilds the state from its saved bytes, and decodes the bits from the attention outputs for queries. The
certified bits are those that the outputs prove to be in the state. A barrier is one kind of game, such as "spike"; a
theorem says how many bytes any method needs so that the bits can be decoded. A sweep is a series of games of one
barrier, from easy to hard; its figure shows the difficulty at which the certified bits fall below the hidden bits, or
below the bits that the theorem demands.
"""

from collections.abc import Sequence
from pathlib import Path

from kvfloor.files import replace_file
from kvfloor.game import BARRIERS, Result
from kvfloor.game.engine.probing_readers import success_bound
from kvfloor.game.sweep import packings, precision
from kvfloor.report.chart import Chart, line, line_chart
from kvfloor.report.environment import environment
from kvfloor.report.marks import bound_mark, nth_mark
from kvfloor.version import __version__

_PLAIN = (str, int, float, bool)


def render(results: Sequence[Result], command: str, path: Path) -> None:
    """Write the HTML page on the games `results`, all of one method, to `path`.

    The call first plays the sweeps. `command` is the command line that the page shows. If writing fails, an existing
    file stays as it was.
    Raises ValueError where there is no result or the file cannot be written.
    """
    replace_file(path, page(results, command))


def page(results: Sequence[Result], command: str) -> str:
    """Play the sweeps, and return the page on the games `results`, all of one method, as HTML text.

    `command` is the command line that the page shows. Raises ValueError if `results` is empty.
    """
    if not results:
        raise ValueError("there is nothing to report: play at least one barrier")
    worst = min(results, key=lambda result: ("cheats", "breaks", "holds").index(result.verdict))
    return (
        environment()
        .get_template("barriers.html")
        .render(
            method=results[0].method,
            worst=worst,
            results=results,
            about={name: barrier.about for name, barrier in BARRIERS.items()},
            details={
                result.barrier: {k: v for k, v in result.details.items() if isinstance(v, _PLAIN)} for result in results
            },
            plots=plots(results),
            command=command,
            version=__version__,
        )
    )


def plots(results: Sequence[Result]) -> list[Chart]:
    """Return one figure for each game that is a "spike", "packing" or "probing" game; other games have none.

    spike    certified bits against hidden bits, per value; the values are hidden under keys that are queried one by one
    packing  certified bits against the largest logit allowed, for several widths of a key
    probing  share of runs with a right answer against the number of logits q.k that were read for it
    For "spike" and "packing" the call plays a sweep against the method. For "probing" it takes all numbers from the
    result.
    """
    drawn = []
    for result in results:
        if result.barrier == "spike":
            drawn.append(_precision(result))
        elif result.barrier == "packing":
            drawn.append(_packing(result))
        elif result.barrier == "probing":
            drawn.append(_probing(result))
    return drawn


def _precision(result: Result) -> Chart:
    found = precision(result.method, result.seed)
    hidden = line(bound_mark(7, "hidden"), [(one.hidden, one.hidden) for one in found])
    kept = line(nth_mark(0, "certified"), [(one.hidden, one.certified) for one in found])
    cheats = [one.hidden for one in found if one.verdict == "cheats"]
    told = f" Cheats from {min(cheats)} bits on: more came back than the bytes have room for." if cheats else ""
    title, below = "Precision that survives (spike)", f"Bits certified per value.{told}"
    return line_chart(title, "bits hidden per value", below, [hidden, kept])


def _packing(result: Result) -> Chart:
    found = packings(result.method, result.seed)
    series = []
    for colour, d in enumerate(dict.fromkeys(one.d for one in found)):
        games = [one for one in found if one.d == d]
        certified = [(one.radius, one.certified_bits) for one in games if one.certified_bits > 0]
        floor = [(one.radius, one.floor_bits) for one in games if one.floor_bits > 0]
        if certified:
            series.append(line(nth_mark(colour, f"certified, d = {d}"), certified))
        if floor:
            series.append(line(bound_mark(colour, f"floor, d = {d}"), floor))
    return line_chart(
        "Few dimensions, bounded logits (packing)",
        "logit radius (log scale)",
        "Bits, log scale, at most 512 keys of 64 values. The floor is the closed form at p = 0.9; more may be built.",
        series,
        log_x=True,
        log_y=True,
    )


def _probing(result: Result) -> Chart:
    details, n = result.details, result.details["tokens"]
    grid = [k * (n - 1) / 32 for k in range(33)]
    series = [line(bound_mark(7, "bound"), [(t, success_bound(n, t)) for t in grid])]
    for colour, name in enumerate(dict.fromkeys(one["reader"] for one in details["readers"])):
        points = [(one["probes"], one["success"]) for one in details["readers"] if one["reader"] == name]
        series.append(line(nth_mark(colour + 1, name), points))
    series.append(line(nth_mark(0, result.method), [(details["probes_per_query"], result.row_success)]))
    return line_chart(
        "Success against probes (probing)",
        "scores read for the last answer",
        f"Share of runs answered right, n = {n:,}. Above the bound: keys were looked at on arrival.",
        series,
    )
