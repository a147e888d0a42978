"""Break calls at every torch operation inside them, and count how a state or a cache behaves afterwards.

    python -m characterize.broken [--most N]

A call runs on a copy and fails after its first, second, ... operation (at `--most` points at even distances, if it has
more). Then the same call is made again. The outcomes are:
    as_before   the state's message is the one from before, and the repeated call gives the bits of an undisturbed one
    taken_in    a forward broke off after its last layer: `get_seq_length` counts its tokens, and the next forward gives
                the bits that follow an undisturbed one
    refused     every public call raises BrokenState
    silent      anything else
States have three rows and GQA groups of two. Caches are those of tiny models with full layers, or with full layers
between sliding or linear ones; they hold 19 + 3 tokens. The script takes ten minutes on one core.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import torch
from transformers.utils import logging

from characterize.lib.table import save
from kvfloor import parse
from kvfloor.check import Setting
from kvfloor.check.breaking import broken, situations
from kvfloor.check.faults import FaultTally
from kvfloor.hf import CompressedCache, prepare
from survey.breaking import broken_forwards, forward_of
from survey.tiny import tiny_model

STATES = (
    "exact",
    "h2o(block=4)@16",
    "sinks(4,block=4)@16",
    "window(block=4)+value_sum@16",
    "window(block=4)+taylor@16",
    "subgen_sketch(block=4)@24",
)
CACHES = (
    *(("llama", text) for text in ("exact", "h2o(block=4)@16", "sinks(4,block=4)@16", "subgen_sketch(block=4)@24")),
    *((family, "h2o(block=4)@16") for family in ("gemma2", "gemma3n_text", "zamba", "qwen3_next", "lfm2")),
)


def states(most: int) -> Iterator[tuple[str, FaultTally]]:
    for text in STATES:
        for what, (state, call) in situations(parse(text), Setting(g=2)).items():
            yield f"{text}: {what}", broken(state, call, most)


def caches(most: int) -> Iterator[tuple[str, FaultTally]]:
    ids = torch.randint(2, 98, (2, 40), generator=torch.Generator().manual_seed(0))
    for family, text in CACHES:
        model = prepare(tiny_model(family))
        cache, forward = CompressedCache(model.config, text), forward_of(model)
        for start, stop in ((0, 19), (19, 20), (20, 21), (21, 22)):
            forward(cache, ids[:, start:stop])
        for n in (1, 5):
            tally = broken_forwards(model, cache, ids[:, 22 : 22 + n], ids[:, 30:31], most)
            yield f"{family}, {text}: a forward of {n} token{'s' * (n > 1)}", tally


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=100)
    most = parser.parse_args().most
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for found in (states, caches):
        for what, tally in found(most):
            rows.append((what, tally.points, tally.as_before, tally.taken_in, tally.refused, len(tally.silent)))
            print(*rows[-1], *tally.silent[:1], sep="\t", flush=True)
    save(__file__, ("call", "points", "as_before", "taken_in", "refused", "silent"), rows)


if __name__ == "__main__":
    main()
