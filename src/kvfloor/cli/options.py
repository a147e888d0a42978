"""Declare command-line options whose numbers are checked: plain ASCII digits, within a stated range."""

from __future__ import annotations

import math
import re
from typing import Any

import typer

from kvfloor.splitting import shortened
from kvfloor.validation import MOST_WHOLE

JSON: Any = typer.Option("--json", help="One JSON document on stdout and nothing else.")


def whole(least: int = 0, most: int = MOST_WHOLE) -> Any:
    """Return keyword arguments for `typer.Option` that accept a whole number from `least` to `most` only."""

    def parse(given: str) -> int:
        text = str(given)  # a default may come as a number
        digits = re.fullmatch(r"[+-]?0*([0-9]{1,20})", text)
        if digits is None or not least <= (number := int(text[0].strip("0123456789") + digits[1])) <= most:
            raise typer.BadParameter(f"give a whole number from {least:,} to {most:,}, got {shortened(text)}")
        return number

    return {"parser": parse, "metavar": "<int>"}


def real() -> Any:
    """Return keyword arguments for `typer.Option` that accept a finite decimal number only."""

    def parse(given: str) -> float:
        text = str(given)
        plain = len(text) <= 100 and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", text, re.I)
        if not plain or not math.isfinite(float(text)):
            raise typer.BadParameter(f"give a finite number such as 0.5 or 1e-3, got {shortened(text)}")
        return float(text)

    return {"parser": parse, "metavar": "<float>"}
