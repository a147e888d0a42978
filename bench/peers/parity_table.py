"""Compare readings of kvpress and kvfloor, and refuse to write a table in which rules stated to be equal differ."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pairs import Pair
from torch import Tensor

TOLERANCE, ROUNDING, LEAST_P = 1e-4, 1e-4, 0.01
COLUMNS = ("text", "kept", "press", "method", "rule", "kvpress", "kvfloor", "difference", "largest", "common", "least",
           "gap", "intervals", "p")  # fmt: skip
RUNS = 8
FINE = (("difference", 0.0), ("gap", 0.0), ("p", 1.0))  # numbers that a row without them counts as having
_T_95 = 2.3646  # two-sided 95 % quantile of Student's t with RUNS - 1 degrees of freedom


@dataclass
class Reading:
    """Hold what a compressed cache did to an excerpt.

    kl      (scored,) float64: KL(exact || compressed) of each token's prediction, nats
    kept    (layers, kv heads, context) bool: the tokens held after the prompt; None where they cannot be told
    scores  the press's score of every token, a tensor (kv heads, context) per layer; None for kvfloor
    """

    kl: Tensor
    kept: Tensor | None = None
    scores: list[Tensor] | None = None


def compared(their: Reading, mine: Reading) -> dict[str, float | str]:
    """Return the figures of two readings of one rule."""
    apart = (their.kl - mine.kl).abs()
    found: dict[str, float | str] = {
        "kvpress": float(their.kl.mean()),
        "kvfloor": float(mine.kl.mean()),
        "difference": abs(float(their.kl.mean() - mine.kl.mean())),
        "largest": float(apart.max()),
    }
    if their.kept is not None and mine.kept is not None:
        share = (their.kept & mine.kept).sum(2) / their.kept.sum(2)
        found |= {"common": float(share.double().mean()), "least": float(share.min()), "gap": gap(their, mine.kept)}
    return found


def gap(their: Reading, kept: torch.Tensor) -> float:
    """Return how far below the lowest kept score a token scores that only `kept` (layers, heads, context) has."""
    assert their.scores is not None and their.kept is not None
    scores = torch.stack(their.scores).double()
    lowest = scores.masked_fill(~their.kept, torch.inf).amin(2, keepdim=True)
    below = (lowest - scores) / lowest.abs().clamp_min(1e-30)
    return float(below.masked_fill(their.kept | ~kept, 0.0).max())


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the share of all ways to split the values into two such groups whose means differ at least as much."""
    every, size = [*a, *b], len(a)
    whole, seen = sum(every), abs(statistics.fmean(a) - statistics.fmean(b))
    splits = [sum(split) for split in itertools.combinations(every, size)]
    apart = [abs(part / size - (whole - part) / len(b)) for part in splits]
    return sum(x >= seen - 1e-12 for x in apart) / len(apart)


def interval(values: Sequence[float]) -> str:
    half = _T_95 * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values) - half:.4f} to {statistics.fmean(values) + half:.4f}"


def drawn(their: Sequence[Reading], mine: Sequence[Reading]) -> dict[str, float | str]:
    """Return the figures of several runs of a random rule on both sides."""
    a, b = ([float(reading.kl.mean()) for reading in side] for side in (their, mine))
    return {
        "kvpress": statistics.fmean(a),
        "kvfloor": statistics.fmean(b),
        "intervals": f"{interval(a)}; {interval(b)}",
        "p": permutation_p(a, b),
    }


class Table:
    """Collect the rows, print each, and say which of them break a stated equality."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float | str]] = []
        self.broken: list[str] = []
        self.begin = time.perf_counter()

    def add(self, text: str, kept: int, pair: Pair, figures: dict[str, float | str]) -> None:
        self.rows.append(
            {"text": text, "kept": kept, "press": pair.title, "method": pair.ours, "rule": pair.rule, **figures}
        )
        seconds = time.perf_counter() - self.begin
        print(f"{seconds:5.0f} s  " + "  ".join(written(self.rows[-1])), flush=True)
        where = f"{pair.title} on {text}, {kept} kept"
        difference, gap, p = (float(figures.get(name, fine)) for name, fine in FINE)
        if pair.rule == "same" and not (difference <= TOLERANCE and gap <= ROUNDING):
            kls = f"{figures['kvpress']:.6f} and {figures['kvfloor']:.6f}"
            self.broken.append(f"{where}: KL {kls}, gap of the scores {gap:.1e}")
        if pair.rule == "random" and not p >= LEAST_P:
            self.broken.append(f"{where}: the means {figures['intervals']} differ, p = {p:.1e}")

    def write(self, path: Path) -> None:
        path.write_text(
            "\n".join("\t".join(line) for line in [COLUMNS, *map(written, self.rows)]) + "\n", encoding="utf-8"
        )


def written(row: dict[str, float | str]) -> list[str]:
    """Return the row's cells: a KL with six decimals, other numbers with two digits, empty where there is none."""
    return [
        f"{value:.6f}" if name in ("kvpress", "kvfloor") and isinstance(value, float)
        else f"{value:.5f}" if name in ("common", "least") and isinstance(value, float)
        else f"{value:.2g}" if isinstance(value, float) else str(value)
        for name, value in ((name, row.get(name, "")) for name in COLUMNS)
    ]  # fmt: skip
