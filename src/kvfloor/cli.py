"""The command line. Every command imports what it needs when it runs, so that `--help` is quick.

Exit codes: 0 fine; 1 the thing checked falls short; 2 bad input, told in one line on stderr.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfloor.version import __version__

app = typer.Typer(
    name="kvfloor",
    help="Streaming attention in bounded memory, beside the proof of how little memory is possible.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else.")]


def main() -> None:
    """Entry point: bad input becomes one line on stderr and exit code 2."""
    sys.path.insert(0, os.getcwd())  # so that module:Class finds the user's own files
    try:
        app()
    except (ValueError, TypeError) as error:
        message = str(error) if os.environ.get("KVFLOOR_DEBUG") is None else repr(error)
        print(f"kvfloor: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvfloor {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, allow_nan=False))


@app.command()
def audit(
    model: Annotated[str, typer.Option(help="builtin, or the folder of a transformers model.")] = "builtin",
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods; the baselines run beside them in any case.")
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="Comma-separated budgets: 64, 25%, 8MiB.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Comma-separated built-in tasks, or all.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt and answer (or context, question, answer).")
    ] = None,
    contexts: Annotated[str | None, typer.Option(help="Comma-separated context lengths in tokens.")] = None,
    protocols: Annotated[
        str, typer.Option(help="after: the question follows the compression; visible: it is compressed too.")
    ] = "after",
    n: Annotated[int, typer.Option("--n", help="Samples per row, at least 32.")] = 40,
    seed: Annotated[int, typer.Option(help="Seeds the samples and the methods.")] = 0,
    require: Annotated[
        str | None, typer.Option(help="Exit 1 unless this holds, e.g. 'h2o@192:recall.score>=0.9'.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for rows.jsonl and report.html.")] = Path("out/audit"),
    as_json: Json = False,
) -> None:
    """What each method costs and breaks at each budget, on a real model, beside the provable floor."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvfloor.audit.plan import split_list
    from kvfloor.audit.require import parse_requirement, shortfalls
    from kvfloor.audit.run import Question, run
    from kvfloor.report.html import render
    from kvfloor.report.terminal import print_report
    from kvfloor.report.text import visible

    clauses = parse_requirement(require) if require else ()
    chosen: dict[str, Any] = {}
    for name, text in (("methods", methods), ("budgets", budgets), ("tasks", tasks), ("protocols", protocols)):
        if text is not None:
            chosen[name] = tuple(split_list(text))
    if chosen.get("tasks") == ("all",):
        from kvfloor.tasks import TASKS

        chosen["tasks"] = tuple(TASKS)
    if contexts is not None:
        if not all(part.isdigit() and int(part) > 0 for part in split_list(contexts)):
            raise ValueError(f"--contexts {contexts!r}: give numbers of tokens joined by commas, such as 1024,2048")
        chosen["contexts"] = tuple(int(part) for part in split_list(contexts))
    question = Question(model=model, prompts=prompts, n=n, seed=seed, out=out, command=_command_line(), **chosen)
    _quiet_transformers()
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        bar = progress.add_task("loading the model", total=None)

        def track(total: int, text: str) -> None:
            started = progress.tasks[0].total is not None
            progress.update(bar, total=total, advance=1 if started else 0, description=visible(text))

        answer = run(question, track)
        render(answer.rows, answer.recommendation, answer.meta, answer.report, answer.heads)
    if as_json:
        _print_json(answer.as_dict())
    else:
        print_report(answer.rows, answer.recommendation, Console())
        print(f"\nreport: {answer.report}")
    if clauses:
        missed = shortfalls(clauses, answer.rows, answer.asked)
        for line in missed:
            stderr.print(f"kvfloor: not met: {line}", markup=False, highlight=False)
        if missed:
            raise typer.Exit(1)


def _quiet_transformers() -> None:
    """Its own progress bars would break ours, and the promise of one line on stderr."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _command_line() -> str:
    return shlex.join(["kvfloor", *sys.argv[1:]])


@app.command()
def floors(
    n: Annotated[int, typer.Option("--n", help="Tokens in the stream; visual: side of the last map.")],
    d: Annotated[int, typer.Option("--d", help="Width of a key.")],
    dv: Annotated[int | None, typer.Option("--dv", help="Width of a value; d unless given.")] = None,
    attention: Annotated[str, typer.Option(help="standard, window, tensor or visual.")] = "standard",
    metric: Annotated[
        str, typer.Option(help="entrywise (takes --eta), or max, frobenius, operator (take --epsilon).")
    ] = "entrywise",
    epsilon: Annotated[
        float | None, typer.Option(help="L2 error of max, frobenius, operator, relative to the values' norm.")
    ] = None,
    eta: Annotated[float, typer.Option(help="Relative error that answers may have, in [0, 1).")] = 0.5,
    p: Annotated[float, typer.Option("--p", help="Probability that a whole answer is right, in (0, 1].")] = 0.9,
    radius: Annotated[float | None, typer.Option(help="Bound on the logits: scale * max|q| * max|k|.")] = None,
    window: Annotated[int | None, typer.Option(help="Sliding window, in tokens.")] = None,
    caches: Annotated[int | None, typer.Option(help="tensor: 4 (tokens arrive; the default) or 2 (pairs do).")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="visual: how much smaller the map before is; 2 if not given.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Kv heads.")] = 1,
    layers: Annotated[int, typer.Option(help="Layers.")] = 1,
    as_json: Json = False,
) -> None:
    """Bits of memory that attention needs in the worst case, by theorem, beside what is known to suffice."""
    from kvfloor.floors import space

    floor = space(
        n, d, dv, attention=attention, metric=metric, epsilon=epsilon, eta=eta, p=p, radius=radius, window=window,
        caches=caches, ratio=ratio, heads=heads, layers=layers,
    )  # fmt: skip
    document = floor.as_dict()
    if as_json:
        _print_json({"schema": 1, **document})
        return
    possible = document.pop("possible")
    _print_pairs(document)
    _print_possible(floor.bytes, possible)


def _print_possible(size: int, possible: list[dict[str, Any]]) -> None:
    """The floor and every memory that suffices, in bytes, and how many times the floor it is."""
    from rich.console import Console
    from rich.table import Table

    def short(number: float | None) -> str:
        return "-" if number is None else _number(number) if number < 1e12 else f"{number:.3g}"

    table = Table(box=None, pad_edge=False)
    for name in ("memory", "bytes", "x floor", "when"):
        numeric = name in ("bytes", "x floor")
        table.add_column(
            name, justify="right" if numeric else "left", no_wrap=numeric, min_width=None if numeric else 16
        )
    table.add_row("impossible below", short(size), "1" if size else "-", "the worst case")
    for memory in possible:
        vacuous = "vacuous; " if memory["vacuous"] and "vacuous" not in memory["condition"] else ""
        ratio = memory["ratio"]
        ratio = ratio if ratio is None or ratio >= 1e12 else float(f"{ratio:.4g}")
        table.add_row(
            f"possible: {memory['name']}", short(memory["bytes"]), short(ratio), vacuous + memory["condition"]
        )
    Console().print()
    Console().print(table, markup=False, highlight=False)


def _print_pairs(pairs: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        if isinstance(value, dict):
            for inner, number in value.items():
                table.add_row(f"  {inner}", _number(number))
        else:
            table.add_row(name, _number(value))
    Console().print(table, markup=False, highlight=False)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@app.command("break")
def break_(
    method: Annotated[str, typer.Argument(help="A method, e.g. 'window@256', module:Class, or optimum.")],
    barrier: Annotated[
        str, typer.Option(help="spike, packing, sparse, window, probing, tensor, visual, or all.")
    ] = "spike",
    n: Annotated[int | None, typer.Option("--n", help="Tokens of the stream; 1024 unless given.")] = None,
    d: Annotated[int | None, typer.Option("--d", help="Width of a key; 64 (packing: 8) unless given.")] = None,
    dv: Annotated[int | None, typer.Option("--dv", help="Width of a value; d (packing: 64) unless given.")] = None,
    bits: Annotated[int | None, typer.Option(help="Hidden bits per value coordinate, 1 to 24.")] = None,
    eta: Annotated[float | None, typer.Option(help="Relative error that answers may have, in [0, 1).")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the public keys and the method, never the hidden bits.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    heads: Annotated[int | None, typer.Option(help="spike: kv heads, independent instances in one state.")] = None,
    layers: Annotated[int | None, typer.Option(help="spike: layers, likewise.")] = None,
    codebook: Annotated[int | None, typer.Option(help="spike: hide which n of so many public keys come.")] = None,
    radius: Annotated[float | None, typer.Option(help="packing: the largest logit.")] = None,
    window: Annotated[int | None, typer.Option(help="window: coded tokens at the end.")] = None,
    caches: Annotated[int | None, typer.Option(help="tensor: 4 (tokens are kept) or 2 (pairs are).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json and barriers.html with its sweeps.")] = None,
    as_json: Json = False,
) -> None:
    """Play lower bounds' hard instances against a method: what it certifies against what it spends."""
    from kvfloor.files import open_folder, replace_file
    from kvfloor.game import play, play_all

    given = {
        "n": n, "d": d, "dv": dv, "bits": bits, "eta": eta, "dtype": dtype, "heads": heads, "layers": layers,
        "codebook": codebook, "radius": radius, "window": window, "caches": caches,
    }  # fmt: skip
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if out is not None:
        open_folder(out)
    if barrier == "all":
        results = play_all(method, seed=seed, **arguments)
    else:
        results = [play(method, barrier=barrier, seed=seed, **arguments)]
    plain = [result.as_dict() for result in results]
    document = {"schema": 1, "rows": plain} if barrier == "all" else {"schema": 1, **plain[0]}
    if out is not None:
        from kvfloor.report.barriers import render

        render(results, _command_line(), out / "barriers.html")
        replace_file(out / "result.json", json.dumps(document, indent=1) + "\n")
    if as_json:
        _print_json(document)
        return
    from kvfloor.report.terminal import print_barriers

    print_barriers(results)
    if out is not None:
        print(f"\nreport: {out / 'barriers.html'}")


@app.command()
def check(
    method: Annotated[str, typer.Argument(help="A method, e.g. 'h2o@64', or module:Class.")],
    as_json: Json = False,
) -> None:
    """Run the conformance suite on a method; exit code 1 if a law is broken."""
    from kvfloor.check import run_checks
    from kvfloor.methods.registry import parse

    outcome = run_checks(parse(method))
    if as_json:
        _print_json({"schema": 1, **outcome.as_dict()})
    else:
        print(f"{outcome.method}: {len(outcome.passed)} laws hold, {len(outcome.failed)} broken")
        for failure in outcome.failed:
            print(f"  broken: {failure['check']}: {failure['why']}")
        for skip in outcome.skipped:
            print(f"  not claimed: {skip['check']}: {skip['why']}")
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def methods(as_json: Json = False) -> None:
    """The table of methods: policies, summaries, selectors and whole methods; --json has all columns."""
    from kvfloor.methods.catalogue import rows

    table = rows()
    if as_json:
        _print_json({"schema": 1, "rows": table})
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for name in ("name", "kind", "memory", "about"):
        shown.add_column(name, overflow="fold", no_wrap=name in ("name", "kind"))
    for row in table:
        shown.add_row(*(row[name] for name in ("name", "kind", "memory", "about")))
    Console().print(shown, markup=False, highlight=False)
