"""Time SubGen's append, in compiled C and in torch: `OMP_NUM_THREADS=1 python bench/subgen_append.py`.

32 rows, 1,024 centres, width 64, 4 samples a centre, 256 pairs; tokens come in calls of one block. The columns are
milliseconds per token of all rows: wall, and CPU time, which other work on the machine changes less. C and torch take
turns of 256 tokens; medians and the least of the turns. The target is 0.15. Prints no figures while the tests of the
timed code fail.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from gate import green
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.core.state import State
from kvfloor.methods.sketches import append

TIMED = ("tests/methods/test_append.py", "tests/methods/test_subgen.py")
ROWS, D, CENTRES, TURN, TURNS = 32, 64, 1024, 256, 15


class Keys:
    """Draw keys near 1,024 centres of each row, which are far apart."""

    def __init__(self) -> None:
        self._draw = torch.Generator().manual_seed(0)
        self.centre = 4 * torch.randn(ROWS, CENTRES, D, generator=self._draw)

    def tokens(self, n: int) -> tuple[Tensor, Tensor]:
        which = torch.randint(0, CENTRES, (ROWS, n, 1), generator=self._draw)
        near = self.centre.gather(1, which.expand(-1, -1, D))
        return near + 0.1 * self.noise(n), self.noise(n)

    def noise(self, n: int) -> Tensor:
        return torch.randn(ROWS, n, D, generator=self._draw)


def turn(state: State, k: Tensor, v: Tensor, block: int) -> tuple[float, float]:
    """Append the tokens in blocks; return wall and CPU milliseconds per token."""
    wall, cpu = time.perf_counter(), time.process_time()
    for at in range(0, k.shape[1], block):
        state.append(k[:, at : at + block], v[:, at : at + block])
    return (time.perf_counter() - wall) / k.shape[1] * 1e3, (time.process_time() - cpu) / k.shape[1] * 1e3


def main() -> int:
    if not green(*TIMED):
        return 1
    torch.set_num_threads(1)
    native = append.library()
    print(f"torch {torch.__version__}, {ROWS} rows, {CENTRES} centres, d = {D}; ms per token, target 0.15")
    if native is None:
        print("no compiled kernel here: both columns would be torch's")
        return 1
    print(f"  {'block':>5}  {'':<6} {'wall':>8} {'least':>8} {'CPU':>8} {'least':>8}")
    for block in (16, 32, 64):
        keys, versions = Keys(), {"torch": None, "C": native}
        method = parse(f"subgen_sketch(delta=4.0,t=4,s=256,centres={CENTRES},block={block})")
        states = {name: method.open(Spec(ROWS, D, D, scale=D**-0.5)) for name in versions}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in versions}
        start = keys.centre, keys.noise(CENTRES)
        warm = keys.tokens(8 * TURN)
        for _ in range(TURNS):
            tokens = keys.tokens(TURN)
            for name, library in versions.items():
                append.library = lambda library=library: library  # pyright: ignore[reportAttributeAccessIssue]
                if not times[name]:
                    states[name].append(*start)
                    states[name].append(*warm)
                times[name].append(turn(states[name], *tokens, block))
        if states["torch"].to_bytes() != states["C"].to_bytes():
            print("the two states differ")
            return 1
        for name in versions:
            wall, cpu = zip(*times[name], strict=True)
            figures = (statistics.median(wall), min(wall), statistics.median(cpu), min(cpu))
            print(f"  {block:>5}  {name:<6} " + " ".join(f"{figure:8.3f}" for figure in figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
