"""Time certified reads of one decode step against attention over all tokens in 32 bits, and say where the time goes.

    python bench/certified_read.py [--tokens 8192,32768] [--rows 3,12] [--keys random,real] [--ungated]

Rows (kv heads) of n tokens, 3 queries each, width 64, one thread. All times are of this thread's processor, in
milliseconds, the least of all repeats, so that other work on the machine hardly counts. Keys are `random`, or `real`:
SmolLM2's on a text of 8,192 tokens, from layers 0, 10, 19 and 29, of which all but the first 64 tokens are repeated
until there are n; 3 rows are one head of three of these layers. The queries are those of the text's last token.

epsilon    the error allowed, relative to the largest norm of a value
fp32       torch's scaled_dot_product_attention over float32 keys and values, queries folded
kernel     the answers of the kernel of `tiered`, with their bounds; nan where there is no C compiler
fp32/      the ratio of the two: below 1, the kernel is slower
sure       share of the queries that the kernel certifies to epsilon
unread     share of the mass whose values were not read
read       the whole certified read, with what is fetched for queries that are not sure
read/      the ratio of fp32 to it
logits, weights, values   the kernel's nanoseconds per token of a row: logits, with the pages' ranges; weights, and what
           is known of the values' lengths; sums over values

Prints no figures while the tests of certified reads fail.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gate import green
from timing import interleaved
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfloor import Spec
from kvfloor.methods.tiered import kernel, kernel_library
from kvfloor.methods.tiered.tiered import Tiered

G, D = 3, 64
EPSILONS, REPEATS, SECONDS = (0.01, 0.1), 40, 20.0
TEXT, LAYERS, ONCE = "speech", 4, 64
PARTS = ("logits", "weights", "values")


def streams(keys: str, rows: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values (rows, n, d) and a step's queries (rows, g, 1, d)."""
    if keys == "random":
        return torch.randn(rows, n, D), torch.randn(rows, n, D), torch.randn(rows, G, 1, D)
    from characterize.lib.real_keys import real

    found = replace(real("SmolLM2 8k"), texts=(TEXT,)).together(LAYERS)
    here = torch.arange(rows) if rows > 3 else torch.arange(rows) * 4
    q, k, v = (x[here].float() for x in (found.q, found.k, found.v))

    def tiled(x: Tensor) -> Tensor:
        again = x[:, ONCE:-1]
        return torch.cat((x[:, :ONCE], *[again] * -(-n // again.shape[1])), 1)[:, :n].contiguous()

    return tiled(k), tiled(v), q[:, :, -1:]


def filled(k: Tensor, v: Tensor) -> Any:
    """Return a state of the tokens k and v."""
    state = Tiered(epsilon=EPSILONS[0]).open(Spec(len(k), D, D, D**-0.5))
    for start in range(0, k.shape[1], 1024):
        state.append(k[:, start : start + 1024], v[:, start : start + 1024])
    return state


def parts(given: dict[str, Any], tokens: int) -> list[float]:
    """Return the nanoseconds per token of a row that each part of the kernel takes, by a kernel with clocks in it."""
    with tempfile.TemporaryDirectory() as folder:
        options = (*kernel_library.OPTIONS, "-DTIMED")
        with patch.object(kernel_library, "OPTIONS", options):
            library = kernel_library.loaded(Path(folder))
        spent = (ctypes.c_double * len(PARTS)).in_dll(library, "spent")
        best = [float("inf")] * len(PARTS)
        with patch.object(kernel_library, "library", lambda: library):
            for _ in range(REPEATS):
                spent[:] = [0.0] * len(PARTS)
                kernel.run(given, 1)
                best = [min(x, y / tokens) for x, y in zip(best, spent, strict=True)]
    return best


def timed(keys: str, rows: int, n: int) -> Iterator[dict[str, float]]:
    """Yield, for each epsilon, what the columns of a line are."""
    k, v, q = streams(keys, rows, n)
    state, folded, flat = filled(k, v), q.transpose(1, 2), q.flatten(1, 2)
    served = kernel.serves(state.hot)
    for epsilon in EPSILONS:
        calls: dict[str, Callable[[], object]] = {
            "fp32": lambda: scaled_dot_product_attention(folded, k.unsqueeze(1), v.unsqueeze(1)),
            "read": partial(state.read_certified, q, epsilon),
        }
        if served:
            calls["kernel"] = partial(kernel.read, state.hot, flat, None, epsilon)
        times = interleaved(calls, REPEATS, min, time.thread_time, SECONDS)
        line = {"epsilon": epsilon, "kernel": float("nan")} | times
        line["fp32/"], line["read/"] = line["fp32"] / line["kernel"], line["fp32"] / line["read"]
        if served:
            given = kernel.arguments(state.hot, flat, None, epsilon)
            kernel.run(given, 1)
            line["sure"] = float(kernel.read(state.hot, flat, None, epsilon).within(epsilon).float().mean())
            line["unread"] = float(given["unread"].mean())
        if served:
            line |= dict(zip(PARTS, parts(given, rows * n), strict=True))
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="8192,32768", help="numbers of tokens, with commas")
    parser.add_argument("--rows", default="3,12", help="3, 12 or both, with a comma")
    parser.add_argument("--keys", default="random,real", help="random, real or both, with a comma")
    parser.add_argument("--ungated", action="store_true", help="do not run the tests first")
    given = parser.parse_args()
    if not given.ungated and not green(
        "tests/methods/test_tiered.py", "tests/methods/tiered/test_kernel.py", "tests/certify/test_certified.py"
    ):
        sys.exit(1)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    names = ("epsilon", "fp32", "kernel", "fp32/", "sure", "unread", "read", "read/", *PARTS)
    print(f"{'keys':>8}{'rows':>6}{'n':>8}", *(f"{name:>8}" for name in names))
    for keys in given.keys.split(","):
        for rows in map(int, given.rows.split(",")):
            for n in map(int, given.tokens.split(",")):
                for line in timed(keys, rows, n):
                    found = (f"{line.get(name, float('nan')):8.3f}" for name in names)
                    print(f"{keys:>8}{rows:6}{n:8}", *found, flush=True)


if __name__ == "__main__":
    main()
