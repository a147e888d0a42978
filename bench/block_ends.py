"""Time a step of one token in which several requests complete their blocks of tokens, and evict, at once.

    OMP_NUM_THREADS=1 python bench/block_ends.py

Sizes are SmolLM2's: 3 kv heads, 3 query heads each, width 64, float32, at a budget of 256. Columns, in milliseconds
of one CPU per layer, which other work on the machine hardly changes:

no end      the step before, in which no request completes a block (with block=1 there is none)
one by one  every request's state is bound to its block, with no copy
together    the states are copied out as one, at most AT_ONCE of them, and back: what a pool does with two or more

Medians on one thread; quote the ratios. Prints no figures while the tests of pools fail.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from gate import green

from kvfloor.core import pool as pool_module
from kvfloor.core.pool import Pool, block_bytes
from kvfloor.core.spec import Spec
from kvfloor.methods.grammar import parse

HEADS, G, D = 3, 3, 64
METHODS = ("sinks(4)@256", "sinks(4,block=1)@256", "knorm@256", "h2o@256", "h2o(block=1)@256")
REQUESTS, REPEATS, TOKENS = (1, 2, 4, 8, 16), 15, 320  # a block of tokens ends at TOKENS, for every method above
TOGETHER = pool_module.AT_ONCE


class Requests:
    """Serve n requests that have seen equally many tokens, in scattered blocks, and go back to an earlier moment."""

    def __init__(self, text: str, n: int) -> None:
        method, spec = parse(text), Spec(HEADS, D, D)
        self._draw = torch.Generator().manual_seed(0)
        self._memory = torch.zeros(n + 4, block_bytes(method, spec, G), dtype=torch.uint8)
        self._pool, self._ids = Pool(method, spec, G, self._memory), torch.randperm(n + 4, generator=self._draw)[:n]
        self._pool.clear(self._ids)

    def step(self, t: int) -> float:
        """Step t tokens of every request; return the CPU milliseconds."""
        shapes = ((HEADS, G, t, D), (HEADS, t, D), (HEADS, t, D))
        piece = [torch.randn(len(self._ids), *shape, generator=self._draw) for shape in shapes]
        begin = time.process_time()
        self._pool.step(self._ids, *piece)
        return (time.process_time() - begin) * 1e3

    def end(self, at_once: int) -> tuple[float, float]:
        """Step to the end of a block of tokens and back; return the CPU milliseconds of the last two steps."""
        pool_module.AT_ONCE, before = at_once, self._memory.clone()
        times = self.step(1), self.step(1)
        self._memory.copy_(before)
        return times


def main() -> None:
    if not green("tests/core/test_pool.py"):
        sys.exit(1)
    torch.set_num_threads(1)
    print(f"{'method':22} {'requests':>8} {'no end':>9} {'one by one':>10} {'together':>9}")
    for text in METHODS:
        for n in REQUESTS:
            requests = Requests(text, n)
            requests.step(TOKENS - 2)
            turns = [(requests.end(1), requests.end(TOGETHER)) for _ in range(REPEATS + 1)][1:]
            before = statistics.median(turn[i][0] for turn in turns for i in (0, 1))
            single, together = (statistics.median(turn[i][1] for turn in turns) for i in (0, 1))
            print(f"{text:22} {n:8} {before:9.2f} {single:10.2f} {together:9.2f}")


if __name__ == "__main__":
    main()
