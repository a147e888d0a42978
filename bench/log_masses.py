"""Time weighted reads and log-masses in every way that they can be had: `OMP_NUM_THREADS=1 python bench/log_masses.py`.

8 query heads on 2 kv heads, one new token; keys and values come from memory, not from caches. The columns are times
in units of `sdpa, folded`, torch's attention without weights (ms), medians of versions that take turns:
    fused      weighted attention by torch's fused kernel
    in C       the same by `core.attend_few`
    eager      log-masses by attention over values of width 1, which the fused kernel does not take
    as values  log-masses by the fused kernel, with the keys as values
    product    log-masses by a product of matrices
    alone      log-masses by `core.attend_few`, from keys alone
    twice      the fused kernel for twice the queries, with a second set of weights for the second half
    both       numerator and denominator as `bench.decode_read` and SubGen read them: `in C` and `alone`
`--repeats 60` sets the most turns. Prints no figures while the tests of the timed code fail.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable

import torch
from gate import green
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvfloor.bench.timing import interleaved
from kvfloor.core import attend_few as kernel
from kvfloor.core.attend import attend
from kvfloor.core.attend_few import attend_few

TIMED = ("tests/core/test_attend.py", "tests/core/test_attend_few.py", "tests/core/test_log_masses.py")
ROWS, GROUP, COLD = 2, 4, 2**28


def versions(dtype: torch.dtype, width: int, n: int) -> dict[str, Callable[[], object]]:
    """Return what is timed, by its name; every call takes the next copy of the keys and values."""
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, GROUP, width, generator=draw).to(dtype)
    k, v = (torch.randn(ROWS, n, width, generator=draw).to(dtype) for _ in range(2))
    held = [(k.clone(), v.clone()) for _ in range(max(2, COLD // (2 * k.nbytes)))]
    above, below = torch.rand(2, ROWS, n, generator=draw)
    nothing, scale = k.new_zeros(ROWS, n, 1), width**-0.5

    def on(call: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        turn = itertools.cycle(held)
        return lambda: call(*next(turn))

    def product(k: Tensor, v: Tensor) -> Tensor:
        del v
        logits = torch.matmul(k.float(), (q.float() * scale).mT).mT.contiguous()
        return (logits + below.unsqueeze(1)).logsumexp(-1)

    def twice(k: Tensor, v: Tensor) -> Tensor:
        weights = torch.stack([above, below], 1).repeat_interleave(GROUP, 1).unsqueeze(1)
        return sdpa(torch.cat([q, q], 1).unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), weights.to(dtype), scale=scale)

    return {
        "folded": on(lambda k, v: sdpa(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), scale=scale)),
        "fused": on(lambda k, v: attend(q, k, v, scale, None, above, backend="flash")),
        "in C": on(lambda k, v: attend_few(q, k, v, scale, above)),
        "eager": on(lambda k, v: attend(q, k, nothing, scale, None, below, backend="eager")),
        "as values": on(lambda k, v: attend(q, k, k, scale, None, below, backend="flash")),
        "product": on(product),
        "alone": on(lambda k, v: attend_few(q, k, None, scale, below)),
        "twice": on(twice),
        "both": on(lambda k, v: (attend_few(q, k, v, scale, above), attend_few(q, k, None, scale, below))),
        "plain read": on(lambda k, v: (k.view(torch.float32).sum(), v.view(torch.float32).sum())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    turns = parser.parse_args().repeats
    if not green(*TIMED):
        return 1
    if kernel.library() is None:
        print("no compiled kernel here")
        return 1
    heads: list[str] = []
    for dtype, width, n in itertools.product((torch.float32, torch.bfloat16), (64, 128), (512, 4096, 32768)):
        timed = interleaved(versions(dtype, width, n), turns, 10.0)
        if not heads:
            heads = [name for name in timed.ms if name != "folded"]
            print(f"{timed.threads} threads\n| dtype, width, tokens | folded, ms | {' | '.join(heads)} |")
            print(f"|---|{'--:|' * (len(heads) + 1)}")
        shares = [1 / statistics.median(timed.ratios(name, "folded")) for name in heads]
        row = [f"{str(dtype)[6:]}, {width}, {n:,}{' (crowded)' if timed.crowded else ''}"]
        row += [f"{statistics.median(timed.ms['folded']):.3g}", *(f"{share:.2f}" for share in shares)]
        print(f"| {' | '.join(row)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
