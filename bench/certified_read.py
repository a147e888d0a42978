"""Time certified reads of one decode step against attention over all tokens in 32 bits, and say where the time goes.

    python bench/certified_read.py [--tokens 8192,32768] [--ungated]

3 rows (kv heads) of n tokens, 3 queries each, random keys and values of width 64, one thread. All times are of this
thread's processor, in milliseconds, the least of all repeats, so that other work on the machine hardly counts:

fp32       torch's scaled_dot_product_attention over float32 keys and values, queries folded
kernel     `tiered` at epsilon 1 %, where the codes alone suffice, with numba's kernel (`pip install "kvfloor[fast]"`);
           nan where numba is not installed
fp32/      the ratio of the first two columns: below 1, the certified read is slower
torch      the same read without the kernel: the sum of the next four columns, and little else
keys       decoding all keys
values     decoding all values, in rotated form
glimpse    logits and what they may err
answer     weights, mean and bound

Prints no figures while the tests of certified reads fail.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from gate import green
from torch.nn.functional import scaled_dot_product_attention

from kvfloor import Spec
from kvfloor.methods.tiered import kernel
from kvfloor.methods.tiered.tiered import Tiered

ROWS, G, D = 3, 3, 64
EPSILON, REPEATS, SECONDS = 0.01, 12, 20.0


def least(call: Callable[[], object]) -> float:
    """Return the least milliseconds of this thread's processor that a call takes, after an uncounted one."""
    call()
    best, begun = float("inf"), time.perf_counter()
    for i in range(REPEATS):
        start = time.thread_time()
        call()
        best = min(best, (time.thread_time() - start) * 1e3)
        if i >= 2 and time.perf_counter() - begun > SECONDS:
            break
    return best


def filled(n: int) -> tuple[Any, torch.Tensor, Callable[[], object]]:
    """Return a state of n tokens, a step's queries (rows, g, 1, d), and torch's attention of them over the tokens."""
    k, v = (torch.randn(ROWS, n, D) for _ in range(2))
    q = torch.randn(ROWS, G, 1, D)
    state = Tiered(epsilon=EPSILON).open(Spec(ROWS, D, D, D**-0.5))
    for start in range(0, n, 1024):
        state.append(k[:, start : start + 1024], v[:, start : start + 1024])
    folded = q.transpose(1, 2)
    return state, q, lambda: scaled_dot_product_attention(folded, k.unsqueeze(1), v.unsqueeze(1))


def timed(n: int) -> tuple[dict[str, float], int]:
    """Return the milliseconds of each column for n tokens, and how many queries of the certified reads fetched."""
    state, q, plain = filled(n)
    codes, flat = state.hot.codes, q.flatten(1, 2)

    def decode(name: str) -> object:
        return codes._decoded(*codes._named(name), None, codes.positions(None, n), True)

    seen, _ = state.hot.glimpse(flat, None)
    served = kernel.serves(state.hot)
    took = {"fp32": least(plain), "kernel": least(lambda: state.read_certified(q)) if served else float("nan")}
    took["fp32/"] = took["fp32"] / took["kernel"]
    with patch.object(kernel, "serves", lambda hot: False):
        took["torch"] = least(lambda: state.read_certified(q))
    took |= {"keys": least(lambda: decode("k")), "values": least(lambda: decode("v"))}
    took["glimpse"] = least(lambda: state.hot.glimpse(flat, None)) - took["keys"] - took["values"]
    took["answer"] = least(seen.answer)
    return took, state.tally.queries - state.tally.unfetched


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="8192,32768", help="numbers of tokens, with commas")
    parser.add_argument("--ungated", action="store_true", help="do not run the tests first")
    given = parser.parse_args()
    if not given.ungated and not green(
        "tests/methods/test_tiered.py", "tests/methods/tiered/test_kernel.py", "tests/certify/test_certified.py"
    ):
        sys.exit(1)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(*(f"{name:>10}" for name in ("n", "fp32", "kernel", "fp32/", "torch", "keys", "values", "glimpse", "answer")))
    for n in map(int, given.tokens.split(",")):
        took, fetched = timed(n)
        print(f"{n:10}", *(f"{x:10.2f}" for x in took.values()), end="")
        print(f"  {fetched} queries fetched" if fetched else "", flush=True)


if __name__ == "__main__":
    main()
