"""Measure what one method per layer, chosen for a number of bytes, gains over one method for all layers of SmolLM2.

    make mixed-bits
    python -m characterize.mixed_bits [--costs FILE]

First the cost of each method in each two adjacent layers is measured on one text (`kvfloor measure-layers`: 1,024
tokens taken in, 512 scored), unless the file of costs is there; it is characterize/mixed_bits_costs.json. The uniform
settings are on the frontier of `frontier.tsv`, at about a quarter, a seventh and a twelfth of the bytes. The mixed
setting has at most as many bytes, after 2,048 tokens in a 16-bit model; its layers' methods have the least sum of
costs. Both then read two other texts, 2,048 tokens taken in and 512 scored. The table has the bytes as a share of those
of kvfloor's exact cache in 16 bits, the KL divergence from exact predictions in nats per token, the divergence that the
sum of the costs predicted, and the difference to the uniform setting, paired token by token; intervals are of 95 % over
blocks of 64 tokens. About an hour on one core; 10 minutes with the file of costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from characterize.lib.table import Row, save
from kvfloor.audit.layer_costs import METHODS, measure_layers
from kvfloor.audit.nats import BLOCK_TOKENS
from kvfloor.audit.reading import Read, Reader
from kvfloor.audit.texts import excerpts
from kvfloor.core.method import Method
from kvfloor.hf import prepare
from kvfloor.hf.held import held_bytes
from kvfloor.hf.layer_shape import LayerShape
from kvfloor.hf.mixed import cache_shapes, choose
from kvfloor.methods.grammar import parse
from kvfloor.methods.mixed.costs import CostTable, read_costs, write_costs
from kvfloor.models import load
from kvfloor.statistics import blocks, mean_interval

COSTS = Path(__file__).with_name("mixed_bits_costs.json")
MEASURED_ON, TOGETHER = ("novel",), 2
READ, CONTEXT, SCORED = ("speech", "facts"), 2048, 512
UNIFORM = {"1/4": "exact:k4v3", "1/7": "snapkv:k4v3@50%", "1/12": "snapkv:k4v3@25%"}
FIELDS = (
    *("target", "kind", "share", "predicted", "kl", "low", "high", "difference", "difference_low", "difference_high"),
    *("same_top", "tokens", "setting"),
)


@dataclass(frozen=True)
class Contender:
    """Hold a setting that is compared: its method, its bytes in a 16-bit model, and its predicted nats per token."""

    kind: str
    method: Method
    nbytes: int
    predicted: float


def contenders(table: CostTable, shapes: Sequence[LayerShape], setting: str) -> tuple[Contender, Contender]:
    """Return the uniform setting that the text `setting` names, and the mixed setting in as many bytes."""
    uniform = parse(setting)
    size = held_bytes(uniform, tuple(shapes), CONTEXT, torch.bfloat16, 1)[1].after
    costs = [row.nats for row in table.rows if row.method == str(uniform)]
    mixed, found = choose(table, size, shapes, CONTEXT, torch.bfloat16)
    return Contender("uniform", uniform, size, sum(costs)), Contender("mixed", mixed, found.nbytes, found.nats)


def costs_of(path: Path, model: Any, encode: Any) -> CostTable:
    """Return the costs in the file `path`; measure them first if it is missing."""
    if not path.exists():
        options = {"texts": MEASURED_ON, "together": TOGETHER, "track": lambda _, text: print(text, flush=True)}
        write_costs(path, measure_layers(model, encode, METHODS, **options))
    return read_costs(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--costs", type=Path, default=COSTS, help="file of measured costs, made if it is missing")
    given = parser.parse_args()
    model, tokenizer = load("smollm2")
    prepare(model)

    def encode(text: str) -> list[int]:
        return tokenizer(text, verbose=False).input_ids

    table = costs_of(given.costs, model, encode)
    shapes, _ = cache_shapes(model)
    exact = held_bytes(parse("exact"), shapes, CONTEXT, torch.bfloat16, 1)[1].after
    pairs = {target: contenders(table, shapes, setting) for target, setting in UNIFORM.items()}
    reads: dict[str, list[Read]] = {}
    for excerpt in excerpts(READ, [CONTEXT], SCORED, encode):
        reader = Reader(model, 0)
        reference = reader.reference(excerpt)
        for one in (one for pair in pairs.values() for one in pair):
            print(excerpt.cell, one.method, flush=True)
            reads.setdefault(str(one.method), []).append(reader.read(one.method, excerpt, reference))
    rows: list[Row] = []
    for target, pair in pairs.items():
        uniform = _by_text(reads[str(pair[0].method)])
        for one in pair:
            found = reads[str(one.method)]
            kl = mean_interval(_blocks(_by_text(found)))
            less = [
                [x - y for x, y in zip(*texts, strict=True)] for texts in zip(_by_text(found), uniform, strict=True)
            ]
            same = [x for read in found for x in read.figures.same_top]
            rows.append(
                (target, one.kind, one.nbytes / exact, one.predicted, *kl)
                + (mean_interval(_blocks(less)) if one.kind == "mixed" else ("", "", ""))
                + (sum(same) / len(same), len(same), str(one.method))
            )
    save(__file__, FIELDS, rows)


def _by_text(reads: Sequence[Read]) -> list[Sequence[float]]:
    return [read.figures.kl for read in reads]


def _blocks(by_text: Sequence[Sequence[float]]) -> list[tuple[float, int]]:
    return [block for values in by_text for block in blocks(values, BLOCK_TOKENS)]


if __name__ == "__main__":
    main()
