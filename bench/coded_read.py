"""Time how a decode step reads a store of few bits: by the fused kernel, by torch, and 16 or 32 bits instead.

    python bench/coded_read.py        # needs pip install "kvfloor[fast]"

3 rows (kv heads) of n tokens, 3 queries each, keys and values of width d, one thread. Columns, milliseconds per step,
the least of all repeats:

fp32, bf16  torch's scaled_dot_product_attention over float32 and bfloat16 keys and values, queries folded
kernel      attention over a store's codes, read in place, with the uncoded tokens
torch       the same attention in torch, which unpacks all codes first; left out where it would take minutes
bf16/kernel the ratio of the two columns: above 1, reading the codes is faster than reading 16 bits

The first lines say what compiling the kernel takes, and loading it in a later process. Prints no figures while the
tests of the kernel fail, or are skipped for want of numba.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from gate import green
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfloor import Spec, parse

ROWS, G = 3, 3
TOKENS, WIDTHS = (1024, 8192, 32768), (64, 128)
STORES = ("exact:k8v8", "exact:k4v4", "exact:k3v3", "exact:k2v2", "window:k4v4@")
REPEATS, SECONDS = 40, 12.0


def least(versions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least milliseconds per call of each version; versions take turns, after one uncounted call each."""
    best = dict.fromkeys(versions, float("inf"))
    for call in versions.values():
        call()
    begun = time.perf_counter()
    for i in range(REPEATS):
        for name, call in versions.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
        if i >= 7 and time.perf_counter() - begun > SECONDS:
            break
    return best


def over(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Return a call of torch's attention of q (rows, g, 1, d) over k and v (rows, n, d), all in this dtype."""
    q, k, v = q.to(dtype).transpose(1, 2), k.to(dtype).unsqueeze(1), v.to(dtype).unsqueeze(1)
    return lambda: scaled_dot_product_attention(q, k, v)


def say_compile_time() -> None:
    """Print the seconds that a first and a second process take to import the kernel, beyond torch and kvfloor."""
    code = (
        "import time, kvfloor; t = time.perf_counter(); from kvfloor.methods.stores import fused_numba; "
        "print(f'{time.perf_counter() - t:.1f}')"
    )
    with tempfile.TemporaryDirectory() as folder:
        for what in ("compile the kernel", "load it from numba's cache"):
            run = [sys.executable, "-c", code]
            took = subprocess.run(run, env=os.environ | {"NUMBA_CACHE_DIR": folder}, capture_output=True, text=True)
            print(f"{what}: {took.stdout.strip()} s")


def main() -> None:
    if find_spec("numba") is None or not green("tests/methods/stores/test_fused.py"):
        sys.exit('no figures without numba and green tests: pip install "kvfloor[fast]"')
    torch.manual_seed(0)
    torch.set_num_threads(1)
    say_compile_time()
    print(f"{'n':>6} {'d':>4} {'store':>13} {'fp32':>8} {'bf16':>8} {'kernel':>8} {'torch':>8} {'bf16/kernel':>12}")
    for n in TOKENS:
        for d in WIDTHS:
            k, v = (torch.randn(ROWS, n, d) for _ in range(2))
            q = torch.randn(ROWS, G, 1, d)
            plain = {"fp32": over(q, k, v, torch.float32), "bf16": over(q, k, v, torch.bfloat16)}
            for text in STORES:
                state = parse(text + str(2 * n) if text.endswith("@") else text).open(Spec(ROWS, d, d, d**-0.5))
                for start in range(0, n, 1024):
                    state.append(k[:, start : start + 1024], v[:, start : start + 1024])
                view = state.slots.view()
                calls = {"kernel": lambda view=view, spec=state.spec, q=q: view.newest(q, spec)}
                if n <= 8192:
                    calls["torch"] = lambda view=view, spec=state.spec, q=q: view.unpacked(q.squeeze(2), spec)
                took = least(plain | calls)
                slow = f"{took['torch']:8.2f}" if "torch" in took else " " * 8
                ratio = took["bf16"] / took["kernel"]
                print(
                    f"{n:6} {d:4} {text.rstrip('@'):>13} {took['fp32']:8.3f} {took['bf16']:8.3f} {took['kernel']:8.3f} "
                    f"{slow} {ratio:12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
