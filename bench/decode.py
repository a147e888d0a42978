"""Time one decoded token with kvfloor's methods and with plain SDPA in one run: `make bench`.

Prints no figures while the tests of the timed code fail. Versions take turns in one process with one number of threads.
Figures are medians; quote the ratio column. Times are per call, cache updates included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from gate import green
from timing import interleaved
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvfloor

TIMED = ["tests/core", "tests/methods", "tests/hf/test_exact.py"]
HEADS, KV_HEADS, WIDTH = 8, 2, 128


def decode(n: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Time one token against n cached ones: stock attention with `cat`, stock attention alone, and our methods."""
    g = HEADS // KV_HEADS
    make = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, KV_HEADS, n, WIDTH, generator=make).to(dtype) for _ in range(2))
    new_k, new_v = (torch.randn(1, KV_HEADS, 1, WIDTH, generator=make).to(dtype) for _ in range(2))
    q = torch.randn(1, HEADS, 1, WIDTH, generator=make).to(dtype)
    spec = kvfloor.Spec(KV_HEADS, WIDTH, WIDTH, WIDTH**-0.5, dtype=dtype)
    versions: dict[str, Callable[[], object]] = {
        "stock: cat + sdpa(enable_gqa)": lambda: sdpa(
            q, torch.cat([k, new_k], 2), torch.cat([v, new_v], 2), enable_gqa=True
        ),
        "sdpa(enable_gqa) alone": lambda: sdpa(q, k, v, enable_gqa=True),
    }
    for text in ("exact", "window@512", "h2o@512", "quant(bits=4)"):
        state = kvfloor.parse(text).open(spec)
        state.append(k[0], v[0])
        versions[text] = lambda state=state: state.step(q.view(KV_HEADS, g, 1, WIDTH), new_k[0], new_v[0])
    return interleaved(versions, repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    if not green(*TIMED):
        return 1
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, {HEADS} heads, {KV_HEADS} kv heads, d = {WIDTH}")
    for dtype in (torch.float32, torch.bfloat16):
        for n in (4096, 32768):
            times = decode(n, dtype, given.repeats)
            base = times["stock: cat + sdpa(enable_gqa)"]
            print(f"\none token at n = {n:,}, {str(dtype).removeprefix('torch.')}")
            for name, ms in times.items():
                print(f"  {name:<32} {ms:8.3f} ms   {base / ms:6.2f}x stock")
    return 0


if __name__ == "__main__":
    sys.exit(main())
