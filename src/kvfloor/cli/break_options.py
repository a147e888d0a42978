"""Derive the command-line options of `kvfloor break` from the games that it can play.

A barrier is a lower-bound theorem whose hard instance is played as a game against a KV-cache method. Each barrier has a
function `play`. An option is made for every argument of these functions that is in the table `kvfloor.game.ARGUMENTS`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from kvfloor.cli.options import JSON, real, whole
from kvfloor.game import ARGUMENTS, BARRIERS


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a wrapper of `command` whose signature has one command-line option per argument of a barrier.

    The arguments and their help texts come from the table `kvfloor.game.ARGUMENTS`. The wrapper also takes a method,
    `--barrier`, `--out` and `--json`. It calls `command` with the keyword arguments `method`, `barrier`, `out`,
    `as_json` and `arguments`, a dict of the barriers' options that the user gave.
    """
    names = [name for name in ARGUMENTS if any(name in barrier.arguments for barrier in BARRIERS.values())]
    parameters = [
        _parameter("method", str, typer.Argument(help="A method, e.g. 'window@256', module:Class, or optimum.")),
        _parameter("barrier", str, typer.Option(help=f"{', '.join(BARRIERS)}, or all."), next(iter(BARRIERS))),
        *(_option(name) for name in names),
        _parameter(
            "out",
            Path | None,
            typer.Option(help="Folder for result.json and barriers.html with its sweeps."),
            None,
        ),
        _parameter("as_json", bool, JSON, False),
    ]

    def made(**given: Any) -> None:
        arguments = {name: given.pop(name) for name in names}
        command(arguments={name: value for name, value in arguments.items() if value is not None}, **given)

    made.__doc__ = command.__doc__
    made.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    made.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return made


def _option(name: str) -> inspect.Parameter:
    takers = {key: barrier.play for key, barrier in BARRIERS.items() if name in barrier.arguments}
    kind = _kind(get_type_hints(next(iter(takers.values())))[name])
    about = ARGUMENTS[name]
    if 2 * len(takers) < len(BARRIERS):
        about = f"{', '.join(takers)}: {about[0].lower()}{about[1:]}"
    usual = {key: inspect.signature(play).parameters[name].default for key, play in takers.items()}
    if kind is not bool and None not in usual.values():
        about += f"; {_usual(usual)} unless given"
    flag = f"--{name.replace('_', '-')}"
    how = {int: whole(), float: real()}.get(kind, {})
    return _parameter(name, kind | None, typer.Option(flag, help=f"{about}.", **how), None)


def _kind(annotation: Any) -> Any:
    """Return the type of an option's value from its annotation: int for `int | None`, str for a Literal of strings."""
    first = next(one for one in get_args(annotation) or (annotation,) if one is not type(None))
    return type(get_args(first)[0]) if get_origin(first) is Literal else first


def _usual(values: dict[str, Any]) -> str:
    """Return help text for an option's default: the commonest value, then every barrier that has another value.

    values: {barrier: default}. Example: "4096 (tensor: 64)".
    """
    common = Counter(values.values()).most_common(1)[0][0]
    others = ", ".join(f"{name}: {value}" for name, value in values.items() if value != common)
    return f"{common} ({others})" if others else str(common)


def _parameter(name: str, kind: Any, how: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how])
