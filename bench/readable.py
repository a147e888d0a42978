"""Time the read floor over many heads of long keys: `python bench/readable.py`.

Prints no figures while the tests of the timed code fail. Heads are shared among `--threads` workers with one thread
each. Keys are normal with unit variance, logits are scaled by 1/sqrt(width). This case is the slowest one: from a
radius of about 16 on nearly every token can be read, so every pair of tokens must be weighed. A line notes if the
workers got less than 80 % of their cores' time: repeat the run on an idle machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from gate import green
from torch import Tensor

from kvfloor.floors.measured import Limit, Readable, readable_by, readable_within

TIMED = ["tests/floors/measured"]
ETA = 0.05
_STEP = 0.5  # seconds; a search stops after the step in hand


def timed(floor: Callable[[int], Readable], heads: int, threads: int) -> tuple[float, float, list[Readable]]:
    """Compute the floor of every head; return wall seconds, CPU seconds and the floors."""
    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(floor, range(heads)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu, found


def keys(head: int, tokens: int, width: int) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(head))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--queries", type=int, default=256, help="recorded queries per head")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="stop: each head of a radius gets its share of these seconds")
    parser.add_argument("--only", choices=("by", "absent", "present"), help="time one of the floors alone")
    given = parser.parse_args()
    if not green(*TIMED):
        return 1
    torch.set_num_threads(1)
    n, d, scale = given.tokens, given.width, given.width**-0.5
    asked = {"eta": ETA, "dv": d, "scale": scale}

    def by(head: int) -> Readable:
        k = keys(head, n, d)
        noise = torch.randn(given.queries, d, generator=torch.Generator().manual_seed(-1 - head))
        return readable_by(k, 1.2 * k[:: n // given.queries][: given.queries] + 0.3 * noise, **asked)

    begun = [0.0]

    def limit(head: int) -> Limit | None:
        """Return the head's share of the time that is left, as heads are computed in turn."""
        if given.seconds is None:
            return None
        begun[0] = time.perf_counter() if head == 0 else begun[0]
        left = given.seconds - _STEP - (time.perf_counter() - begun[0])
        return Limit(seconds=max(0.001, left * given.threads / max(given.threads, given.heads - head)))

    versions: dict[str, Callable[[int], Readable]] = {}
    if given.only in (None, "by"):
        versions[f"readable_by, {given.queries} queries a head"] = by
    for others in ("absent", "present"):
        if given.only in (None, others):
            for radius in (16.0, 8.0):
                versions[f"readable_within, radius {radius:g}, others {others}"] = lambda head, r=radius, o=others: (
                    readable_within(keys(head, n, d), radius=r, others=o, limit=limit(head), **asked)
                )

    print(f"torch {torch.__version__}, {given.threads} threads, {given.heads} heads, n = {n:,}, d = {d}, eta = {ETA}")
    for name, floor in versions.items():
        wall, cpu, found = timed(floor, given.heads, given.threads)
        groups, bits = (sum(values) / given.heads for values in ([x.groups for x in found], [x.bits for x in found]))
        weighed = [one.stopped.weighed for one in found if one.stopped is not None]
        busy = cpu / (wall * given.threads)
        note = "" if busy >= 0.8 else f"   (only {busy:.0%} of the cores: other work runs beside)"
        print(f"  {name:<48} {wall:7.1f} s   {groups:9,.0f} groups   {bits / 8192:9.1f} KiB a head{note}", flush=True)
        if weighed:
            mean = sum(weighed) / len(weighed)
            print(f"    {len(weighed)} heads stopped, after {mean:,.0f} of {n:,} tokens on average", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
