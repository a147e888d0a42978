"""Define the subcommands of `kvfloor`. Each subcommand imports its modules when it runs, so that `--help` is quick.

A method is the configuration of a KV-cache compressor. The floor is the memory that any method needs in the worst case,
by theorem. A law is a property that a method must keep; the conformance suite (`kvfloor check`) tests the laws.
Exit codes: 0 success; 1 a requirement (`--require`) or a law does not hold; 2 bad input, reported in one line on
stderr.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from kvfloor.audit.protocols import PROTOCOLS
from kvfloor.cli.options import JSON, real, whole
from kvfloor.floors import ATTENTIONS, METRICS, VALUES
from kvfloor.models.load import BUILTIN
from kvfloor.models.packaged import PACKAGED
from kvfloor.splitting import shortened, split_list
from kvfloor.version import __version__

_LONGEST = 2000  # characters of an error's line
_SPINS = "3000"
_MOST_SAMPLES = 100_000
_MOST_CONTEXT = 2**20
# Of the click that this typer uses, its own or the installed one.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class _Commands(TyperGroup):
    """Find the subcommand that was called; build the options of `kvfloor break` only if it was called.

    These options come from the table of barriers (lower-bound games), whose import is slow.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the subcommand's name, its click command, and the remaining arguments.

        `ctx` is click's context of the call, `args` the words of the command line after `kvfloor`.
        """
        name, command, rest = super().resolve_command(ctx, args)
        if name == "break":
            from kvfloor.cli.break_options import with_options

            alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
            alone.command(name, help=break_.__doc__)(with_options(_play))
            command = typer.main.get_command(alone)
        return name, command, rest


app = typer.Typer(
    name="kvfloor",
    cls=_Commands,
    help="Streaming attention in bounded memory, beside the proof of how little memory is possible.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, JSON]


def main() -> None:
    """Run the command line and exit. Bad input becomes one line on stderr and exit code 2.

    With the environment variable KVFLOOR_DEBUG, that line shows the type of the exception too.
    """
    _wait_briefly()
    sys.path.insert(0, os.getcwd())  # so that module:Class finds the user's own files
    try:
        status = app(prog_name="kvfloor", standalone_mode=False)
    except typer.Abort:
        _refuse("stopped", 130)
    except _UsageError as error:
        _refuse(error.format_message())  # type: ignore[attr-defined]
    except (ValueError, TypeError, OSError) as error:
        _refuse(str(error) if os.environ.get("KVFLOOR_DEBUG") is None else repr(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        _refuse(f"there is not enough memory for this; ask for less ({error})")
    else:
        sys.exit(status or 0)


def _wait_briefly() -> None:
    """Set GOMP_SPINCOUNT, so that torch's waiting threads sleep after microseconds of spinning; keep a user's setting.

    If other programs run, a spinning thread takes the core from the thread that it waits for: beside two such programs
    an audit took three times as long. Call this function before torch is imported. The variable is read by the OpenMP
    runtime of torch's wheels.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def _refuse(message: str, status: int = 2) -> NoReturn:
    """Print the error message as one line on stderr, without control characters, and exit with code `status`."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    print(f"kvfloor: {line}", file=sys.stderr)
    if _is_rank():  # its end ends the others, which would wait for it; a usual exit waits for them
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _is_rank() -> bool:
    """Return True if this process is connected with other processes over which a model is sharded."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvfloor {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, allow_nan=False))


@app.command()
def audit(
    model: Annotated[
        str, typer.Option(help=f"{', '.join((BUILTIN, *PACKAGED))}, a .gguf file, or a model's folder.")
    ] = BUILTIN,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods; the baselines run beside them in any case.")
    ] = None,
    mixed: Annotated[
        str | None,
        typer.Option(help="Also audit one method per layer, after measuring costs: limit (fewest bytes), or 8MiB."),
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="Comma-separated budgets: 64, 25%, 8MiB.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Comma-separated tasks or groups (see kvfloor tasks), or module:TASK.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt and answer (or context, question, answer).")
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="Comma-separated texts to compare predictions on: names, files, or none.")
    ] = None,
    contexts: Annotated[str | None, typer.Option(help="Comma-separated context lengths in tokens.")] = None,
    continuation: Annotated[
        int | None,
        typer.Option(
            help="Tokens predicted after each text's context; as many unless given.", **whole(1, _MOST_CONTEXT)
        ),
    ] = None,
    facts: Annotated[
        int | None,
        typer.Option(
            help="Prompts with 32 hidden facts per context, to count those that each cache returns; 2 where texts are "
            "read unless given, 0 for none.",
            **whole(0, _MOST_SAMPLES),
        ),
    ] = None,
    kl_limit: Annotated[
        float, typer.Option(help="Largest safe divergence from exact, nats per token.", **real())
    ] = 0.01,
    protocols: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {words}" for name, words in PROTOCOLS.items()) + ".")
    ] = next(iter(PROTOCOLS)),
    n: Annotated[int, typer.Option("--n", help="Samples per row, at least 32.", **whole(0, _MOST_SAMPLES))] = 40,
    seed: Annotated[int, typer.Option(help="Seeds the samples and the methods.", **whole())] = 0,
    require: Annotated[
        str | None, typer.Option(help="Exit 1 unless this holds, e.g. 'h2o@192:recall.score>=0.9'.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time limit; texts and cells that do not fit are left out.", **real())
    ] = None,
    chat: Annotated[
        str, typer.Option(help="Ask in the model's chat template: on, off, or auto (tasks made for it).")
    ] = "auto",
    least_exact: Annotated[
        float, typer.Option(help="Leave out a cell where exact scores below this; 0: none.", **real())
    ] = 0.5,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the terms of use of a published model.")
    ] = False,
    allow_beyond: Annotated[
        bool, typer.Option("--allow-beyond", help="Allow contexts longer than the model's trained positions.")
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the rows and report.html; a stopped audit goes on there.")
    ] = Path("out/audit"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the folder has measured already.")] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Measure the I-th of N parts only, for kvfloor merge.")
    ] = None,
    tp: Annotated[
        str | None, typer.Option(help="Shard the model over N processes (tensor parallelism); auto: one per GPU.")
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Spread the model's layers over devices, as transformers does: auto.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local: in this process; ray: on a Ray cluster.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Ray workers; one per processor unless given.", **whole(1, 100_000))
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster; RAY_ADDRESS, or one started here, unless given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure each method's memory and right answers on a model, at each budget, beside the provable memory floor.

    A task is a kind of question about a context; a sample is one such question. A protocol says whether the question
    comes after the context was compressed, or is compressed with it. A cell is a task at a context length under a
    protocol; a row is the result of one method under one budget on one cell or text. On a text, the model's next-token
    predictions are compared with those under the exact cache (all tokens); a method is called safe only if they diverge
    by at most --kl-limit.

    The baselines are the exact cache, all tokens at 8 and at 4 bits, and three simple evictions: random, window and
    sinks.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from kvfloor.audit.ranks import dismiss, follow, join, ranks_started
    from kvfloor.audit.request import AuditRequest
    from kvfloor.audit.run import measure_part, run
    from kvfloor.report.text import visible

    chosen: dict[str, Any] = {}
    lists = {"methods": methods, "mixed": mixed, "budgets": budgets, "tasks": tasks, "protocols": protocols}
    for name, text in lists.items():
        if text is not None:
            chosen[name] = tuple(split_list(text))
    if texts is not None:
        chosen["texts"] = () if texts == "none" else tuple(split_list(texts))
    if contexts is not None:
        chosen["contexts"] = _contexts(contexts)
    question = AuditRequest(
        model=model,
        prompts=prompts,
        n=n,
        seed=seed,
        require=require,
        out=out,
        command=_command_line(),
        continuation=continuation,
        facts=facts,
        kl_limit=kl_limit,
        accept_terms=accept_terms,
        allow_beyond=allow_beyond,
        minutes=minutes,
        fresh=fresh,
        shard=None if shard is None else _shard(shard),
        engine=engine,
        workers=workers,
        ray_address=ray_address,
        tp=None if tp is None else _ranks(tp),
        device_map=device_map,
        chat=chat,  # type: ignore[arg-type]
        least_exact=least_exact,
        **chosen,
    )
    _quiet_transformers()
    started = ranks_started()
    if question.tp is not None:
        question.check()
        if started is None:
            from kvfloor.cli.launch import launch

            raise typer.Exit(launch(question.tp))
        join()
        if started[0] > 0:
            follow(question)
            return
    elif started is not None and started[1] > 1:
        raise ValueError(f"torchrun has started {started[1]} processes: add --tp auto, so that they share one model")
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        bar = progress.add_task("loading the model", total=None)

        def track(total: int, text: str) -> None:
            if total and total != progress.tasks[0].total:  # the costs by layer, or the audit, begin
                progress.reset(bar, total=total, description=visible(text))
            else:
                progress.update(bar, advance=1 if total else 0, description=visible(text))

        def announce(text: str) -> None:
            stderr.print(text, markup=False, highlight=False, soft_wrap=True)

        if question.shard is None:
            answer = run(question, track, announce)
        else:
            count = measure_part(question, track, announce)
    if question.tp is not None:
        dismiss()
    if question.shard is None:
        _show(answer, as_json)
    elif as_json:
        i, n = question.shard
        _print_json({"schema": 1, "part": i, "parts": n, "measurements": count, "out": str(out)})
    else:
        print(f"part {shard}: {count} measurements in {out}; when all are measured: kvfloor merge FOLDERS --out FOLDER")


def _ranks(text: str) -> int:
    """Return the number of processes that the value `text` of --tp asks for.

    "auto" asks for as many as torchrun has started, or for one per GPU without torchrun. Raises ValueError for any
    other text than auto or a number, for auto without torchrun and with fewer than two GPUs, and if torchrun has
    started another number.
    """
    import torch

    from kvfloor.audit.ranks import ranks_started

    started = ranks_started()
    if text == "auto":
        if started is None and torch.cuda.device_count() < 2:
            raise ValueError(
                f"--tp auto: this machine has {torch.cuda.device_count()} GPUs; give a number of processes"
            )
        return torch.cuda.device_count() if started is None else started[1]
    if re.fullmatch(r"[1-9][0-9]{0,3}", text) is None:
        raise ValueError(f"--tp {shortened(text)}: give a number of processes, such as 2, or auto")
    if started is not None and started[1] != int(text):
        raise ValueError(f"--tp {text}: torchrun has started {started[1]} processes; give --tp auto")
    return int(text)


def _show(answer: Any, as_json: bool) -> None:
    """Write the HTML report of an audit, print its results, and exit with code 1 if a requirement is not met.

    answer: the results, an `Answer` of `kvfloor.audit.run`. as_json: print them as one JSON document instead of tables.
    """
    from rich.console import Console

    from kvfloor.report.html import render
    from kvfloor.report.terminal import print_notes, print_report

    closer = answer.closer
    render(
        answer.rows, answer.recommendation, answer.meta, answer.report, answer.heads, answer.texts,
        closer.error_maps, closer.examples, answer.facts, answer.facts_note,
    )  # fmt: skip
    if as_json:
        _print_json(answer.as_dict())
    else:
        told = answer.texts, closer.examples, answer.facts, answer.facts_note
        print_report(answer.rows, answer.recommendation, Console(), *told)
        print_notes(answer.meta.notes, Console())
        print(f"\nreport: {answer.report}")
    for line in answer.shortfalls:
        print(f"kvfloor: not met: {line}", file=sys.stderr)
    if answer.shortfalls:
        raise typer.Exit(1)


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None:
        raise ValueError(f"--shard {shortened(text)}: give I/N with I from 1 to N, such as 1/4")
    return int(found[1]), int(found[2])


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="The --out folders of all parts of one audit.")],
    out: Annotated[Path, typer.Option(help="Folder for all rows and report.html.")],
    kl_limit: Annotated[
        float, typer.Option(help="Largest safe divergence from exact, nats per token.", **real())
    ] = 0.01,
    require: Annotated[
        str | None, typer.Option(help="Exit 1 unless this holds, e.g. 'h2o@192:recall.score>=0.9'.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge the parts of an audit that `kvfloor audit --shard` measured, and write the report of the whole audit.

    The exact cache keeps all tokens. --kl-limit is the largest divergence from it at which a method counts as safe: the
    KL divergence of the model's next-token predictions. A row is the result of one method under one budget.
    """
    from kvfloor.audit.merge import merge as merged

    def announce(text: str) -> None:
        print(text, file=sys.stderr)

    answer = merged(folders, out, kl_limit=kl_limit, require=require, command=_command_line(), announce=announce)
    _show(answer, as_json)


def _contexts(text: str) -> tuple[int, ...]:
    one = whole(1, _MOST_CONTEXT)["parser"]
    try:
        lengths = tuple(one(part) for part in split_list(text))
    except typer.BadParameter as error:
        raise ValueError(f"--contexts: {error.message}; join lengths by commas, such as 1024,2048") from None
    if not lengths:
        raise ValueError(f"--contexts {text!r}: give numbers of tokens joined by commas, such as 1024,2048")
    return lengths


def _quiet_transformers() -> None:
    """Turn off transformers' progress bars and logs, so that an error stays the only line on stderr."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _command_line() -> str:
    return shlex.join(["kvfloor", *sys.argv[1:]])


@app.command()
def floors(
    n: Annotated[int, typer.Option("--n", help="Tokens in the stream; visual: side of the last map.", **whole())],
    d: Annotated[int, typer.Option("--d", help="Width of a key.", **whole())],
    dv: Annotated[int | None, typer.Option("--dv", help="Width of a value; d unless given.", **whole())] = None,
    attention: Annotated[str, typer.Option(help=f"{', '.join(ATTENTIONS)}.")] = ATTENTIONS[0],
    metric: Annotated[
        str, typer.Option(help=f"{METRICS[0]} (takes --eta), or {', '.join(METRICS[1:])} (take --epsilon).")
    ] = METRICS[0],
    epsilon: Annotated[
        float | None,
        typer.Option(help=f"Error of {', '.join(METRICS[1:])}, relative to the values' size.", **real()),
    ] = None,
    eta: Annotated[float, typer.Option(help="Relative error that answers may have, in [0, 1).", **real())] = 0.5,
    p: Annotated[float, typer.Option("--p", help="Probability that an answer is right, in (0, 1].", **real())] = 0.9,
    radius: Annotated[float | None, typer.Option(help="Bound on logits: scale * max|q| * max|k|.", **real())] = None,
    window: Annotated[int | None, typer.Option(help="Sliding window, in tokens.", **whole())] = None,
    caches: Annotated[
        int | None, typer.Option(help="tensor: 4 (tokens arrive; the default) or 2 (pairs do).", **whole())
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="visual: how much smaller the map before is; 2 if not given.", **real())
    ] = None,
    heads: Annotated[int, typer.Option(help="Kv heads.", **whole())] = 1,
    layers: Annotated[int, typer.Option(help="Layers.", **whole())] = 1,
    values: Annotated[str, typer.Option(help=f"Number format of the values: {', '.join(VALUES)}.")] = "fp16",
    as_json: Json = False,
) -> None:
    """Compute the memory that attention needs in the worst case, by theorem, beside the memory known to suffice.

    --attention: standard; window, over the last --window tokens; tensor, softmax over pairs of tokens, where --caches
    is 4 (tokens arrive, each with two keys and two values) or 2 (pairs arrive, each with a value of its own); visual,
    which predicts an image as a pyramid of square maps, their sides --ratio times as long as those of the map before.

    --metric, the error that answers may have: entrywise, each number of an answer has a relative error of at most eta;
    max, an answer's L2 error is at most epsilon times the norm of the largest value; frobenius or operator, it is at
    most epsilon times this norm of the matrix of values, times the L2 norm of the softmax weights; additive, each
    number errs by at most epsilon times the largest number of all values.

    The smaller the error, the more values answers tell apart, and the larger the floor. --values: the number format of
    the values. Of the two formats of a 16-bit cache, fp16 has the smaller floor for entrywise, bf16 for the others.
    binary hides single bits: its floor holds for every format and every eta below 1.
    """
    from kvfloor.floors import space

    floor = space(
        n, d, dv, attention=attention, metric=metric, epsilon=epsilon, eta=eta, p=p, radius=radius, window=window,
        caches=caches, ratio=ratio, heads=heads, layers=layers, values=values,
    )  # fmt: skip
    document = floor.as_dict()
    if as_json:
        _print_json({"schema": 1, **document})
        return
    possible = document.pop("possible")
    _print_pairs(document)
    _print_possible(floor.bytes, possible)


def _print_possible(size: int, possible: list[dict[str, Any]]) -> None:
    """Print a table: the floor (least possible memory) of `size` bytes, then every memory known to suffice.

    Each row has a memory's bytes and their multiple of the floor. possible: one dict per memory known to suffice, with
    name, bytes, ratio (bytes / floor), condition (when it suffices) and vacuous (True if nothing is saved).
    """
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
    table.add_row("floor", short(size), "1" if size else "-", "needed by some keys, values and queries: the worst case")
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
def break_() -> None:
    """Play lower-bound games against a method: count the hidden bits that its memory gives back, beside its size.

    A game hides random bits in the values of a token stream, and queries the method's memory to read them back. By a
    theorem, a memory that gives back enough of them must be large.
    """
    raise AssertionError("made with its options where it is called")


def _play(method: str, barrier: str, arguments: dict[str, Any], out: Path | None, as_json: bool) -> None:
    from kvfloor.files import open_folder, replace_file
    from kvfloor.game import play, play_all

    if out is not None:
        open_folder(out)
    results = play_all(method, **arguments) if barrier == "all" else [play(method, barrier=barrier, **arguments)]
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
    """Check that a method keeps the laws that it claims (conformance suite); exit code 1 if a law is broken."""
    from kvfloor.check import run_checks
    from kvfloor.methods.grammar import parse

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
    """List the built-in policies (what to evict), summaries, selectors (what to read), stores and whole methods.

    The table shows each one's name, kind, memory and purpose; --json adds paper, guarantee, traits and aliases.
    """
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


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the tasks that `kvfloor audit` can ask a model, by group.

    A task is a kind of question about a context. --tasks of `kvfloor audit` takes the names of tasks and of groups.
    """
    from kvfloor.tasks import GROUPS

    rows = [
        {"group": group, "task": task.name, "about": task.about, "chat": task.chat}
        for group, members in GROUPS.items()
        for task in members
    ]
    if as_json:
        _print_json({"schema": 1, "rows": rows})
        return
    for group, members in GROUPS.items():
        print(f"{group}:")
        for task in members:
            print(f"  {task.name:<16} {task.about}")


@app.command("plan")
def plan_(
    context: Annotated[int, typer.Option(help="Tokens of each request.", **whole(1, _MOST_CONTEXT))],
    model: Annotated[
        str, typer.Option(help=f"{', '.join((BUILTIN, *PACKAGED))}, a model's folder, or a config.json file.")
    ] = BUILTIN,
    batch: Annotated[int, typer.Option(help="Requests in one cache.", **whole(1, _MOST_SAMPLES))] = 1,
    memory: Annotated[str | None, typer.Option(help="Memory for weights and caches, such as 24GiB.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods; exact, 8 and 4 bits are planned in any case.")
    ] = None,
    budgets: Annotated[str | None, typer.Option(help="Comma-separated budgets: 64, 25%, 8MiB.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights, keys and values: bfloat16, float16 or float32.")] = "bfloat16",
    eta: Annotated[
        float | None, typer.Option(help="Relative error of the floor, in [0, 1); any below 1 unless given.", **real())
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan a model's memory before it runs: weights, exact cache, methods under budgets, requests that fit, floor.

    For each method and budget it prints the bytes of the cache and, given --memory, how many requests fit beside the
    weights. The exact cache keeps all tokens.
    """
    from kvfloor.planning import plan

    _quiet_transformers()
    chosen: dict[str, Any] = {}
    for name, text in (("methods", methods), ("budgets", budgets)):
        if text is not None:
            chosen[name] = tuple(split_list(text))
    planned = plan(model, context, batch=batch, memory=memory, dtype=dtype, eta=eta, **chosen)
    if as_json:
        _print_json(planned.as_dict())
        return
    from rich.console import Console

    from kvfloor.report.planning import print_plan

    print_plan(planned, Console())


def _numbered_steps() -> Callable[[int, str], None]:
    """Return a function that is called with the number of all steps and a line of text, and prints "STEP/ALL TEXT"."""
    steps = itertools.count(1)

    def say(total: int, text: str) -> None:
        print(f"{next(steps)}/{total} {text}", file=sys.stderr, flush=True)

    return say


@app.command("bench")
def bench_(
    parts: Annotated[
        str | None,
        typer.Option(help="Comma-separated parts: read, token, prefill, append, start, kvpress, or letters a to f."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: fewer contexts, models and turns.")] = False,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Also write all rows to this JSON file; - prints them on stdout.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Most turns of each comparison; 60 unless given, 20 with --quick.", **whole(6, 10_000)),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="torch's threads where a target does not name one thread.", **whole(1, 1024))
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show which operators a decoded token's time goes to.")
    ] = False,
) -> None:
    """Time kvfloor beside torch, transformers, vLLM's CPU kernel and kvpress, and judge the times by stated targets.

    Versions take turns in one process; a line gives the median and the ratio with a 95 % interval. Other libraries are
    timed where they are installed, SmolLM2 where it was fetched. Exit code 1, and no figures, if a test of the timed
    code fails.
    """
    printed = json_ is not None and str(json_) == "-"
    from kvfloor.bench.request import PARTS, BenchRequest

    request = BenchRequest(
        parts=tuple(PARTS) if parts is None else tuple(split_list(parts)),
        quick=quick,
        repeats=repeats,
        threads=threads,
        profile=profile,
        path=None if printed else json_,
        command=_command_line(),
    )
    request.check()
    from kvfloor.bench.gate import Red
    from kvfloor.bench.run import run

    _quiet_transformers()
    try:
        document = run(request, lambda text: print(text, file=sys.stderr if printed else sys.stdout, flush=True))
    except Red as error:
        _refuse(str(error), 1)
    if printed:
        print(document.text(), end="")


@app.command("measure-layers")
def measure_layers(
    out: Annotated[Path, typer.Option(help="File for the costs (.json), which auto(rows='FILE')@64MiB reads.")],
    model: Annotated[
        str, typer.Option(help=f"{', '.join((BUILTIN, *PACKAGED))}, a .gguf file, or a model's folder.")
    ] = BUILTIN,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods with their budgets: exact:k5v4, snapkv:k4v3@25%.")
    ] = None,
    texts: Annotated[str, typer.Option(help="Comma-separated texts: names or files.")] = "",
    context: Annotated[int, typer.Option(help="Tokens taken in of each text.", **whole(1, _MOST_CONTEXT))] = 1024,
    continuation: Annotated[
        int, typer.Option(help="Tokens predicted after each text's context.", **whole(1, _MOST_CONTEXT))
    ] = 512,
    together: Annotated[
        int, typer.Option(help="Adjacent layers that get one method together.", **whole(1, 100_000))
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seeds the methods.", **whole())] = 0,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the terms of use of a published model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what each method costs in each layer of a model, in nats, while all other layers keep every token.

    The cost is the KL divergence of the model's next-token predictions from exact ones. `auto(rows='FILE')@64MiB` then
    is a method for `kvfloor audit --methods` and `CompressedCache`: it chooses one of these methods for each layer, so
    that the sum of the costs is least in 64 MiB per request.
    """
    from kvfloor.audit.layer_costs import METHODS, measure_layers
    from kvfloor.audit.texts import GENERATED
    from kvfloor.files import open_folder
    from kvfloor.hf import prepare
    from kvfloor.methods.mixed.costs import write_costs
    from kvfloor.models import load
    from kvfloor.report.layer_costs import cost_lines

    _quiet_transformers()
    open_folder(out.absolute().parent)
    loaded, tokenizer = load(model, accept_terms)
    table = measure_layers(
        prepare(loaded),
        lambda text: tokenizer(text, verbose=False).input_ids,
        METHODS if methods is None else tuple(split_list(methods)),
        texts=tuple(split_list(texts)) or (GENERATED[:1] if model == BUILTIN else ("novel",)),
        context=context,
        scored=continuation,
        together=together,
        seed=seed,
        track=_numbered_steps(),
    )
    write_costs(out, table)
    if as_json:
        _print_json({"schema": 1, "out": str(out), **table.as_dict()})
    else:
        print("\n".join(cost_lines(table)))
        print(f"\ncosts: {out}; then, for example: kvfloor audit --model {model} --methods \"auto(rows='{out}')@2MiB\"")


@app.command("facts")
def facts(
    model: Annotated[
        str, typer.Option(help=f"{', '.join((BUILTIN, *PACKAGED))}, a .gguf file, or a model's folder.")
    ] = BUILTIN,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods with their budgets: exact:k4v4, snapkv@25%.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of each prompt, at most.", **whole(1, _MOST_CONTEXT))] = 1024,
    facts: Annotated[int, typer.Option(help="Facts in each prompt.", **whole(1, _MOST_SAMPLES))] = 32,
    sheets: Annotated[int, typer.Option(help="Prompts.", **whole(1, _MOST_SAMPLES))] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the facts and of the methods.", **whole())] = 0,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the terms of use of a published model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Certify how many bits of hidden facts each method's cache returns, from the model's own predictions.

    A fact is a word with a random two-digit number. The model reads facts among filler sentences, the cache is
    compressed, and each fact is asked by itself. What comes back is proven to have been in the cache's bytes.
    """
    from kvfloor.audit.facts import METHODS, measure_facts
    from kvfloor.hf import prepare
    from kvfloor.models import load
    from kvfloor.report.facts import fact_lines

    _quiet_transformers()
    loaded, tokenizer = load(model, accept_terms)
    rows = measure_facts(
        prepare(loaded),
        tokenizer,
        METHODS if methods is None else tuple(split_list(methods)),
        context=context,
        facts=facts,
        sheets=sheets,
        seed=seed,
        track=_numbered_steps(),
    )
    if as_json:
        _print_json({"schema": 1, "model": model, "rows": [row.as_dict() for row in rows]})
    else:
        print("\n".join(fact_lines(rows)))


@app.command("train-less")
def train_less(
    policy: Annotated[str, typer.Option(help="Eviction policy and budget in tokens, such as 'sinks(4)@64'.")],
    out: Annotated[Path, typer.Option(help="File for the kernels (.safetensors).")],
    model: Annotated[str, typer.Option(help="builtin, or the folder of a transformers model.")] = "builtin",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines as for `kvfloor audit`; samples of the built-in tasks if not given.")
    ] = None,
    compare: Annotated[int, typer.Option(help="Fresh samples to compare on; 0: none.", **whole(0, _MOST_SAMPLES))] = 18,
    rank: Annotated[int, typer.Option(help="Rank R of the kernels.", **whole(1, 4096))] = 8,
    hidden: Annotated[int, typer.Option(help="Hidden units of each network.", **whole(1, 65536))] = 128,
    samples: Annotated[
        int,
        typer.Option(help="Texts to learn from.", **whole(2, _MOST_SAMPLES)),
    ] = 72,
    length: Annotated[int, typer.Option(help="Tokens of context per text.", **whole(1, _MOST_CONTEXT))] = 512,
    epochs: Annotated[int, typer.Option(help="Passes over the texts.", **whole(1, 100000))] = 40,
    batch: Annotated[int, typer.Option(help="Texts per step.", **whole(1, _MOST_SAMPLES))] = 2,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.", **real())] = 1e-3,
    dropout: Annotated[float, typer.Option(help="Share of hidden units that are off in training.", **real())] = 0.3,
    seed: Annotated[int, typer.Option(help="Seed of samples, first weights and order.", **whole(0))] = 0,
) -> None:
    """Train the kernels (small networks) of LESS, a low-rank summary of evicted tokens, for a model and a policy.

    The policy decides which tokens are evicted. Then compare three methods on other texts by the error of their
    attention outputs: the policy alone, the policy with a larger budget, and the policy with LESS. The last two take
    equal memory.
    """
    from kvfloor.training.fit import Recipe
    from kvfloor.training.less import run

    recipe = Recipe(rank, hidden, samples, length, epochs, batch, lr, dropout, seed)
    _quiet_transformers()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    for text, size, errors in run(model, policy, out, prompts, compare, recipe, say):
        layers = " ".join(f"{error:.4f}" for error in errors)
        print(f"{text:<60} {size:>8,} bytes per kv head   output error by layer {layers}")
