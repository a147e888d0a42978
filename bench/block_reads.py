"""Time how a step reads the blocks of many requests: in place, gathered, or by one call per request.

    python bench/block_reads.py

Sizes are SmolLM2's: 3 kv heads, 3 query heads each, width 64, float32, and 288 slots per head. Columns, in milliseconds
per layer:

in place  attention over blocks that follow one another
gather    copy of blocks that lie in random order
pool      that copy and the attention over it, which is what a pool does
loop      one attention call per request, without a copy

Medians on one thread; quote the ratios. Prints no figures while the tests of pools fail.
"""

from __future__ import annotations

import sys

import torch
from gate import green
from timing import interleaved
from torch.nn.functional import scaled_dot_product_attention

HEADS, G, SLOTS, D = 3, 3, 288, 64
REQUESTS, REPEATS = (1, 8, 32), 25


def main() -> None:
    if not green("tests/core/test_pool.py"):
        sys.exit(1)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{'requests':>8} {'in place':>9} {'gather':>9} {'pool':>9} {'loop':>9}")
    for n in REQUESTS:
        k, v = (torch.randn(n + 4, HEADS, SLOTS, D) for _ in range(2))
        q, ids = torch.randn(n, HEADS, G, D), torch.randperm(n + 4)[:n]
        times = interleaved(
            {
                "in place": lambda q=q, k=k[:n], v=v[:n]: scaled_dot_product_attention(q, k, v),
                "gather": lambda k=k, v=v, ids=ids: [x.index_select(0, ids) for x in (k, v)],
                "pool": lambda q=q, k=k, v=v, ids=ids: scaled_dot_product_attention(
                    q, k.index_select(0, ids), v.index_select(0, ids)
                ),
                "loop": lambda q=q, k=k, v=v, ids=ids: [
                    scaled_dot_product_attention(q[i : i + 1], k[j : j + 1], v[j : j + 1])
                    for i, j in enumerate(ids.tolist())
                ],
            },
            REPEATS,
        )
        print(f"{n:8} " + " ".join(f"{times[name]:9.3f}" for name in ("in place", "gather", "pool", "loop")))


if __name__ == "__main__":
    main()
