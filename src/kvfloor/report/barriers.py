"""Render the page of `kvfloor break --out`: every game played, and sweeps to where a method leaves the bound."""

from collections.abc import Sequence
from pathlib import Path

from kvfloor.files import replace_file
from kvfloor.game import BARRIERS, Result
from kvfloor.game.engine.probing_readers import success_bound
from kvfloor.game.sweep import packings, precision
from kvfloor.report import plot
from kvfloor.report.environment import environment
from kvfloor.report.plot import Plot, Series
from kvfloor.version import __version__

_PLAIN = (str, int, float, bool)


def render(results: Sequence[Result], command: str, path: Path) -> None:
    """Write the page of these games, all of one method, to `path`, whole or not at all; plays the sweeps first.

    Raises ValueError where there is no result or the file cannot be written.
    """
    replace_file(path, page(results, command))


def page(results: Sequence[Result], command: str) -> str:
    """Return the page as HTML text."""
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
            frame=plot,
            command=command,
            version=__version__,
        )
    )


def plots(results: Sequence[Result]) -> list[Plot]:
    """Draw one figure per barrier that has a parameter to sweep."""
    drawn = []
    for result in results:
        if result.barrier == "spike":
            drawn.append(_precision(result))
        elif result.barrier == "packing":
            drawn.append(_packing(result))
        elif result.barrier == "probing":
            drawn.append(_probing(result))
    return drawn


def _precision(result: Result) -> Plot:
    found = precision(result.method, result.seed)
    hidden = Series("hidden", [(one.hidden, one.hidden) for one in found], "s7", dashed=True, marked=False)
    kept = Series("certified", [(one.hidden, one.certified) for one in found], "s0")
    return plot.plot(
        "Precision that survives (spike)", "bits hidden per value", "Bits certified per value.", [hidden, kept]
    )


def _packing(result: Result) -> Plot:
    found = packings(result.method, result.seed)
    series = []
    for colour, d in enumerate(dict.fromkeys(one.d for one in found)):
        games = [one for one in found if one.d == d]
        certified = [(one.radius, one.certified_bits) for one in games if one.certified_bits > 0]
        floor = [(one.radius, one.floor_bits) for one in games if one.floor_bits > 0]
        if certified:
            series.append(Series(f"certified, d = {d}", certified, f"s{colour}"))
        if floor:
            series.append(Series(f"floor, d = {d}", floor, f"s{colour}", dashed=True, marked=False))
    return plot.plot(
        "Few dimensions, bounded logits (packing)",
        "logit radius (log scale)",
        "Bits, log scale, at most 512 keys of 64 values. The floor is the closed form at p = 0.9; more may be built.",
        series,
        log_x=True,
        log_y=True,
    )


def _probing(result: Result) -> Plot:
    details, n = result.details, result.details["tokens"]
    grid = [k * (n - 1) / 32 for k in range(33)]
    series = [Series("bound", [(t, success_bound(n, t)) for t in grid], "s7", dashed=True, marked=False)]
    for colour, name in enumerate(dict.fromkeys(one["reader"] for one in details["readers"])):
        points = [(one["probes"], one["success"]) for one in details["readers"] if one["reader"] == name]
        series.append(Series(name, points, f"s{colour + 1}"))
    series.append(Series(result.method, [(details["probes_per_query"], result.row_success)], "s0"))
    return plot.plot(
        "Success against probes (probing)",
        "scores read for the last answer",
        f"Share of runs answered right, n = {n:,}. Above the bound: keys were looked at on arrival.",
        series,
    )
