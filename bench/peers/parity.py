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

Float32 rounding alone (same tokens kept, another order of summation) moves a token's KL by up to about 5e-5 nats and
a mean by 1e-7. Two tokens whose scores are equal up to rounding may change places, which moves a mean by about 1e-5.
So a pair of the same rule must agree to TOLERANCE nats and keep tokens whose scores differ by rounding only, and the
means of random rules must not differ with p below LEAST_P. Otherwise no table is written, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
import transformers
from pairs import PAIRS, STEPWISE
from parity_table import RUNS, Reading, Table, compared, drawn
from sides import ExactReading, ours, press_of, theirs, theirs_stepwise
from transformers.utils import logging
from variants import method_of

from kvfloor.audit.texts import excerpts
from kvfloor.hf import prepare
from kvfloor.models import load

TABLE = Path(__file__).with_name("parity.tsv")
CONTEXT, SCORED, STEPS = 1024, 256, 64
CELLS = (("speech", 256), ("speech", 512), ("facts", 256))


def read_text(table: Table, stock, prepared, exact: ExactReading, text: str, budgets: list[int], others: bool) -> None:
    """Add the rows of one text: equal rules at every budget, and if `others` rules that differ at the first."""
    once = [pair for pair in PAIRS if pair.rule == "same" or (others and pair.rule == "other" and not pair.runs)]
    wanted = [(pair, budget) for budget in budgets for pair in once if pair.rule == "same" or budget == budgets[0]]
    for eager in (False, True):
        mine = [(pair, budget) for pair, budget in wanted if pair.eager == eager]
        stock.set_attn_implementation("eager" if eager else "sdpa")
        presses = [press_of(pair, budget, CONTEXT) for pair, budget in mine]
        for (pair, budget), reading in zip(
            mine, theirs(stock, presses, [pair for pair, _ in mine], exact), strict=True
        ):
            places = {"positions": "cache"} if pair.ranks else {}
            table.add(
                text,
                budget,
                pair,
                compared(reading, ours(prepared, method_of(f"{pair.method}@{budget}", pair.variant), exact, **places)),
            )


def read_random(table: Table, stock, prepared, exact: ExactReading, text: str, budget: int) -> None:
    """Add the rows of the random rules, RUNS runs a side; kvfloor's runs of one method are shared by its pairs."""
    runs: dict[str, list[Reading]] = {}
    for pair in PAIRS:
        if not pair.runs:
            continue
        if pair.method not in runs:
            runs[pair.method] = [
                ours(prepared, method_of(f"{pair.method}@{budget}"), exact, seed=seed) for seed in range(RUNS)
            ]
        torch.manual_seed(0)
        presses = [press_of(pair, budget, CONTEXT, run) for run in range(RUNS)]
        table.add(text, budget, pair, drawn(theirs(stock, presses, [pair] * RUNS, exact), runs[pair.method]))


def read_stepwise(table: Table, stock, prepared, exact: ExactReading, text: str, budget: int) -> None:
    for pair in STEPWISE:
        press, more = press_of(pair, budget, CONTEXT), {}
        if pair.press == "PyramidKVPress":
            layers = stock.model.layers
            more["budgets"] = [[press.get_layer_budget(layer.self_attn, CONTEXT)] for layer in layers]
        method = pair.method if more else f"{pair.method}@{budget}"
        their = theirs_stepwise(stock, press, exact, STEPS)
        table.add(text, budget, pair, compared(their, ours(prepared, method_of(method), exact, STEPS, **more)))


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
        exact, budgets = ExactReading.of(stock, excerpt), [budget for name, budget in CELLS if name == text]
        read_text(table, stock, prepared, exact, text, budgets, text == CELLS[0][0])
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
