"""Compare kvpress's divergence from the exact cache with kvfloor's on SmolLM2, and write bench/peers/parity.tsv.

Protocol: 1,024 tokens of a shipped text go in at once, then each layer and kv head is compressed to `kept` tokens, then
the next 256 tokens are scored without further eviction (the pairs marked stepwise: 64 tokens, fed one by one). KL is
KL(exact || compressed) of the next-token distribution, mean over the scored tokens, in nats. Both sides run in one
process on the same float32 weights. The columns of the table:

rule                    "same" tokens kept; "random" tokens of the same distribution; "other" rules
kvpress, kvfloor        KL; of random rules the mean of RUNS runs
difference, largest     of the mean KL, and the largest of one token's KL; of random rules empty
common, least           share of kept tokens that both sides keep, in all heads and in the head with the fewest
gap                     how far below kvpress's lowest kept score a token scores that only kvfloor keeps, as a share of
                        that score: rounding where the rules agree
intervals, p            of random rules: 95 % intervals of both means, and the permutation test's p that they differ

Float32 rounding alone (same tokens kept, another order of summation) moves a token's KL by up to about 1e-5 nats and
a mean by 1e-7. Two tokens whose scores are equal up to rounding may change places, which moves a mean by about 1e-5.
So a pair of the same rule must agree to TOLERANCE nats and keep tokens whose scores differ by rounding only, and the
means of random rules must not differ with p below LEAST_P. Otherwise no table is written, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from pairs import PAIRS, STEPWISE, Pair
from sides import Exact, Reading, ours, press_of, theirs, theirs_stepwise
from transformers.utils import logging

from kvfloor.audit.texts import excerpts
from kvfloor.hf import prepare
from kvfloor.models import load

TABLE = Path(__file__).with_name("parity.tsv")
CONTEXT, SCORED, STEPS, RUNS = 1024, 256, 64, 8
CELLS = (("speech", 256), ("speech", 512), ("facts", 256))
TOLERANCE, ROUNDING, LEAST_P = 1e-4, 1e-4, 0.01
COLUMNS = ("text", "kept", "press", "method", "rule", "kvpress", "kvfloor", "difference", "largest", "common", "least",
           "gap", "intervals", "p")  # fmt: skip
T_95 = 2.3646  # two-sided 95 % quantile of Student's t with RUNS - 1 degrees of freedom


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
    half = T_95 * statistics.stdev(values) / len(values) ** 0.5
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
            {"text": text, "kept": kept, "press": pair.title, "method": pair.method, "rule": pair.rule, **figures}
        )
        seconds = time.perf_counter() - self.begin
        print(f"{seconds:5.0f} s  " + "  ".join(written(self.rows[-1])), flush=True)
        where = f"{pair.title} on {text}, {kept} kept"
        if pair.rule == "same" and (figures["difference"] > TOLERANCE or figures.get("gap", 0.0) > ROUNDING):  # pyright: ignore[reportOperatorIssue]
            self.broken.append(
                f"{where}: KL {figures['kvpress']:.6f} and {figures['kvfloor']:.6f}, gap {figures.get('gap')}"
            )
        if pair.rule == "random" and figures["p"] < LEAST_P:  # pyright: ignore[reportOperatorIssue]
            self.broken.append(f"{where}: the means {figures['intervals']} differ, p = {figures['p']}")

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


def read_text(table: Table, stock, prepared, exact: Exact, text: str, budgets: list[int]) -> None:
    """Add the rows of one text: every rule at every budget, then the random rules at the first budget."""
    wanted = [
        (pair, budget)
        for budget in budgets
        for pair in PAIRS
        if pair.rule == "same" or (pair.rule == "other" and "seed" not in pair.arguments)
    ]
    for eager in (False, True):
        mine = [(pair, budget) for pair, budget in wanted if pair.eager == eager]
        stock.set_attn_implementation("eager" if eager else "sdpa")
        presses = [press_of(pair, budget, CONTEXT) for pair, budget in mine]
        for (pair, budget), reading in zip(
            mine, theirs(stock, presses, [pair for pair, _ in mine], exact), strict=True
        ):
            places = {"positions": "cache"} if pair.ranks else {}
            table.add(text, budget, pair, compared(reading, ours(prepared, f"{pair.method}@{budget}", exact, **places)))


def read_random(table: Table, stock, prepared, exact: Exact, text: str, budget: int) -> None:
    """Add the rows of the random rules, RUNS runs a side; kvfloor's runs of one method are shared by its pairs."""
    runs: dict[str, list[Reading]] = {}
    for pair in PAIRS:
        if pair.rule != "random" and "seed" not in pair.arguments:
            continue
        if pair.method not in runs:
            runs[pair.method] = [ours(prepared, f"{pair.method}@{budget}", exact, seed=seed) for seed in range(RUNS)]
        torch.manual_seed(0)
        presses = [press_of(pair, budget, CONTEXT, run) for run in range(RUNS)]
        table.add(text, budget, pair, drawn(theirs(stock, presses, [pair] * RUNS, exact), runs[pair.method]))


def read_stepwise(table: Table, stock, prepared, exact: Exact, text: str, budget: int) -> None:
    for pair in STEPWISE:
        press, more = press_of(pair, budget, CONTEXT), {}
        if pair.press == "PyramidKVPress":
            layers = stock.model.layers
            more["budgets"] = [[press.get_layer_budget(layer.self_attn, CONTEXT)] for layer in layers]
        method = pair.method if more else f"{pair.method}@{budget}"
        their = theirs_stepwise(stock, press, exact, STEPS)
        table.add(text, budget, pair, compared(their, ours(prepared, method, exact, STEPS, **more)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to write")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    stock, tokenizer = load("smollm2", track=print)
    prepared, table = prepare(load("smollm2")[0]), Table()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {given.threads} threads")
    for text in dict.fromkeys(text for text, _ in CELLS):
        excerpt = excerpts(
            [text], [CONTEXT], SCORED, lambda told: tokenizer(told, add_special_tokens=False)["input_ids"]
        )[0]
        exact, budgets = Exact.of(stock, excerpt), [budget for name, budget in CELLS if name == text]
        read_text(table, stock, prepared, exact, text, budgets)
        if text == CELLS[0][0]:
            read_random(table, stock, prepared, exact, text, budgets[0])
            read_stepwise(table, stock, prepared, exact, text, budgets[0])
    if table.broken:
        print("no table written; these pairs of the same rule differ:", *table.broken, sep="\n  ", file=sys.stderr)
        return 1
    table.write(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
