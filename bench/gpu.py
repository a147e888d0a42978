"""Check the kernels of GPUs against torch, and measure decode steps, on one GPU, in at most ten minutes.

    python bench/gpu.py --out out/gpu            on a GPU, with triton installed
    TRITON_INTERPRET=1 python bench/gpu.py --dry --out out/dry     on a CPU, on tiny shapes: no figure means anything

Writes `checks.tsv`, `reads.tsv`, `steps.tsv` and `gpu.json`. Ends with 1 if a check fails; figures are written all the
same, each with the check's result beside it.
    reads    one read by few queries of a whole state, in a CUDA graph: microseconds, and the share of the bandwidth of
             a copy of as many bytes, beside torch's attention at equal bytes
    steps    one decode step of each constant-memory method in microseconds: as it comes, replayed as graphs, and with
             the host's waits forbidden (torch.cuda.set_sync_debug_mode)
It never ran on a GPU so far.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvfloor import parse
from kvfloor.core.attend import attend
from kvfloor.core.graphs import StepGraphs, capture_cuda
from kvfloor.core.spec import Spec

if find_spec("triton"):
    from kvfloor.core.attend_triton import attend_split
    from kvfloor.methods.stores import fused_triton
else:
    attend_split = fused_triton = None

MINUTES = 9.0
"""After this many minutes no further measurement starts, so that ten are enough for all."""

MIB = 1 << 20
GROUP = 4


@dataclass(frozen=True)
class RunSizes:
    """Hold the sizes of a run: widths, bytes of the states to read, repeats of a measurement, budget of methods."""

    d: int
    rows: tuple[int, ...]
    reads: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    repeats: int
    replays: int
    budget: int
    step_rows: int


WHOLE = RunSizes(
    d=128,
    rows=(8, 64),
    reads=(8 * MIB, 64 * MIB, 256 * MIB),
    dtypes=(torch.bfloat16, torch.float32),
    repeats=9,
    replays=20,
    budget=1024,
    step_rows=32,
)
DRY = RunSizes(
    d=32,
    rows=(2,),
    reads=(1 << 15,),
    dtypes=(torch.float32, torch.bfloat16),
    repeats=2,
    replays=1,
    budget=48,
    step_rows=2,
)
METHODS = (
    *("window", "sinks", "random", "h2o", "tova", "knorm", "keydiff", "expected", "ridge_leverage"),
    "window+value_sum",
)
STORES = ("exact:k8v8", "exact:k4v4", "h2o(block=32):k8v8@{budget}", "h2o(block=32):k4v4@{budget}")


@dataclass(frozen=True)
class KernelCheck:
    """Hold the error of a kernel against float64, and the most that it may be."""

    what: str
    error: float
    most: float
    passed: bool


@dataclass(frozen=True)
class StateRead:
    """Hold the time of one read of a state, and its share of the bandwidth of a copy of as many bytes."""

    what: str
    dtype: str
    rows: int
    mib: float
    us: float
    gb_per_s: float
    share_of_copy: float


@dataclass(frozen=True)
class DecodeStep:
    """Hold the times of one decode step of a method. waits: what made the host wait, or ""."""

    method: str
    dtype: str
    rows: int
    eager_us: float
    graphed_us: float
    waits: str


class TimedDevice:
    """Time calls on a device: a GPU, by events around replays of a CUDA graph, or a CPU, for a dry run."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.began = time.monotonic()

    @property
    def late(self) -> bool:
        """Return True if no further measurement may start."""
        return time.monotonic() - self.began > MINUTES * 60

    @property
    def name(self) -> str:
        return "a CPU (dry run)" if self.dry else torch.cuda.get_device_name()

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return random numbers on the device."""
        draw = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randn(*shape, generator=draw, device=self.device).to(dtype)

    def graphed(self, work: Callable[[], Any], sizes: RunSizes) -> float:
        """Return the median microseconds of `work`, replayed in one CUDA graph of several runs."""
        if self.dry:
            return self.eager(work, sizes)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(sizes.replays):
                work()
        return self._timed(graph.replay, sizes.repeats) / sizes.replays

    def eager(self, work: Callable[[], Any], sizes: RunSizes) -> float:
        """Return the median microseconds of `work` as it comes, the host's time included."""

        def several() -> None:
            for _ in range(sizes.replays):
                work()

        return self._timed(several, sizes.repeats) / sizes.replays

    def _timed(self, work: Callable[[], Any], repeats: int) -> float:
        work()
        found = []
        for _ in range(repeats):
            if self.dry:
                start = time.perf_counter()
                work()
                found.append((time.perf_counter() - start) * 1e6)
                continue
            ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            ends[0].record()
            work()
            ends[1].record()
            torch.cuda.synchronize()
            found.append(ends[0].elapsed_time(ends[1]) * 1e3)
        return statistics.median(found)


# ---- checks --------------------------------------------------------------------------------------------------------


def checked(machine: TimedDevice, sizes: RunSizes) -> list[KernelCheck]:
    """Compare each kernel with attention in float64."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for softcap in (None, 30.0):
            q, k, v = (machine.random(3, n, sizes.d, dtype=dtype) for n in (GROUP, 333, 333))
            weight = machine.random(3, 333, dtype=torch.float32)
            count = torch.tensor([333, 1, 200], device=machine.device)
            hide = (torch.arange(333, device=machine.device) >= count.unsqueeze(1)).unsqueeze(1)
            scale = sizes.d**-0.5
            own = attend_split(q, k, v, scale, softcap, weight, count, parts=5)
            wide = (x.double() for x in (q, k, v))
            truth = attend(*wide, scale, softcap, weight.double(), hide, backend="eager")
            # TF32 keeps 10 bits of a softmax weight; a sum of many errs less than one of them.
            most = 1e-5 if dtype == torch.float32 else 2e-3
            found.append(check(f"split, {named(dtype)}, softcap {softcap}", own, truth, most))
    for text in STORES:
        state = filled(machine, text.format(budget=sizes.budget), 4 * sizes.budget, 3, sizes)
        q = machine.random(3, GROUP, sizes.d, dtype=torch.float32)
        view = state.slots.view()
        part = fused_triton.attention(view, q, state.spec)
        k, v = state.slots.decoded(view, turn=False)
        truth = attend(q.double(), k.double(), v.double(), state.spec.scale, backend="eager")
        found.append(check(f"codes, {state.method}", (part.mean, part.log_mass), truth, 2e-4))
    return found


def check(what: str, own: tuple[Tensor, ...], truth: tuple[Tensor, ...], most: float) -> KernelCheck:
    """Compare means and log-masses with the truth."""
    error = max(float((a.double() - b).abs().max()) for a, b in zip(own, truth, strict=True))
    return KernelCheck(what, error, most, error <= most)


def filled(
    machine: TimedDevice, text: str, n: int, rows: int, sizes: RunSizes, dtype: torch.dtype = torch.float32
) -> Any:
    """Return a state of the method that has seen n tokens."""
    state: Any = parse(text).open(Spec(rows, sizes.d, sizes.d, sizes.d**-0.5, dtype=dtype, device=machine.device))
    k, v = (machine.random(rows, n + i, sizes.d, dtype=dtype)[:, :n] for i in range(2))
    state.append(k, v)
    state.seal()
    return state


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- reads ---------------------------------------------------------------------------------------------------------


def reads(machine: TimedDevice, sizes: RunSizes) -> list[StateRead]:
    """Time one read of states of several sizes: by the kernel, by torch's attention, and a plain copy."""
    found: list[StateRead] = []
    for nbytes in sizes.reads:
        half = torch.empty(nbytes // 2, dtype=torch.uint8, device=machine.device)
        there = torch.empty_like(half)
        us = machine.graphed(partial(there.copy_, half), sizes)  # which reads half of the bytes and writes half
        speed = nbytes / us
        found.append(StateRead("copy", "uint8", 1, nbytes / MIB, us, speed / 1e3, 1.0))
        for dtype in sizes.dtypes:
            for rows in sizes.rows:
                if machine.late:
                    return found
                found += reads_of(machine, sizes, nbytes, rows, dtype, speed)
    return found


def reads_of(
    machine: TimedDevice, sizes: RunSizes, nbytes: int, rows: int, dtype: torch.dtype, speed: float
) -> list[StateRead]:
    """Time reads of `nbytes` bytes of keys and values in `rows` rows. speed: of a copy, in bytes per microsecond."""
    slots = max(64, nbytes // (2 * rows * sizes.d * dtype.itemsize) // 64 * 64)
    q, k, v = (machine.random(rows, n, sizes.d, dtype=dtype) for n in (GROUP, slots, slots))
    scale = sizes.d**-0.5
    folded = [x.unsqueeze(0) if x is not q else q.unsqueeze(0) for x in (q, k, v)]
    works: dict[str, Callable[[], Any]] = {
        "split kernel": lambda: attend_split(q, k, v, scale),
        "split kernel, log-weights": partial(
            attend_split, q, k, v, scale, log_weight=torch.zeros(rows, slots, device=machine.device)
        ),
        "torch sdpa": lambda: sdpa(*folded, scale=scale),
    }
    for store in STORES[:2] if dtype == sizes.dtypes[0] else ():
        state = filled(machine, store, slots, rows, sizes, dtype)
        view = state.slots.view()
        works[f"codes {store}"] = partial(fused_triton.over_all, view, q.float(), state.spec, fused_triton.clocks(view))
    found = []
    for what, work in works.items():
        us = machine.graphed(work, sizes)
        read = 2 * k.nbytes if not what.startswith("codes") else round(state_bytes(what, rows * slots, sizes.d))
        found.append(StateRead(what, named(dtype), rows, read / MIB, us, read / us / 1e3, read / us / speed))
    return found


def state_bytes(what: str, tokens: int, d: int) -> float:
    """Return the bytes of codes and scales of a coded state that a read takes."""
    bits = 8 if "k8" in what else 4
    return tokens * (2 * d * bits / 8 + 2)


# ---- steps ---------------------------------------------------------------------------------------------------------


def steps(machine: TimedDevice, sizes: RunSizes) -> list[DecodeStep]:
    """Time decode steps of each method past its budget, block ends included."""
    found = []
    for name in METHODS:
        for dtype in sizes.dtypes:
            if machine.late:
                return found
            found.append(step_of(machine, sizes, f"{name}@{sizes.budget}", dtype))
    return found


def step_of(machine: TimedDevice, sizes: RunSizes, text: str, dtype: torch.dtype) -> DecodeStep:
    """Time decode steps of one method: as they come, and with the device's work replayed."""
    rows, n = sizes.step_rows, 2 * sizes.budget
    state = filled(machine, text, n, rows, sizes, dtype)
    q = machine.random(rows, GROUP, 1, sizes.d, dtype=dtype)
    k, v = (machine.random(rows, 1 + i, sizes.d, dtype=dtype)[:, :1] for i in range(2))
    blocks = RunSizes(**asdict(sizes) | {"replays": state.block * (1 if machine.dry else 4)})
    for _ in range(state.block):
        state.step(q, k, v)
    waits = waiting(machine, lambda: [state.step(q, k, v) for _ in range(state.block)])
    eager = machine.eager(lambda: state.step(q, k, v), blocks)
    state.replay_steps(StepGraphs(captured_on_a_cpu if machine.dry else capture_cuda))
    for _ in range(2 * state.block):
        state.step(q, k, v)
    return DecodeStep(text, named(dtype), rows, eager, machine.eager(lambda: state.step(q, k, v), blocks), waits)


def waiting(machine: TimedDevice, work: Callable[[], Any]) -> str:
    """Run `work` with the host's waits forbidden; return what waited, or ""."""
    if machine.dry:
        work()
        return ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as failure:
        return str(failure).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


class CapturedHere:
    """Do the captured work anew, in place of a CUDA graph."""

    def __init__(self, work: Callable[[], Tensor], out: Tensor) -> None:
        self.work, self.out = work, out

    def replay(self) -> None:
        self.out.copy_(self.work())


def captured_on_a_cpu(work: Callable[[], Tensor]) -> tuple[CapturedHere, Tensor]:
    """Stand in for `capture_cuda` in a dry run."""
    out = work().clone()
    return CapturedHere(work, out), out


# ---- results -------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[Any], kind: type) -> None:
    """Write rows as a table of tab-separated values, one column for each field of `kind`."""
    names = [field.name for field in fields(kind)]
    lines = ["\t".join(names)]
    for row in rows:
        values = (getattr(row, name) for name in names)
        lines.append("\t".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--dry", action="store_true", help="run on a CPU, on tiny shapes")
    given = parser.parse_args()
    if attend_split is None:
        print("no triton here: pip install 'kvfloor[triton]'", file=sys.stderr)
        return 2
    if not given.dry and not torch.cuda.is_available():
        print("no GPU here: --dry runs everything on a CPU, on tiny shapes", file=sys.stderr)
        return 2
    machine, sizes = TimedDevice(given.dry), DRY if given.dry else WHOLE
    given.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        checks = checked(machine, sizes)
        write(given.out / "checks.tsv", checks, KernelCheck)
        read = reads(machine, sizes)
        write(given.out / "reads.tsv", read, StateRead)
        stepped = steps(machine, sizes)
        write(given.out / "steps.tsv", stepped, DecodeStep)
    told = {"machine": machine.name, "torch": torch.__version__, "seconds": time.monotonic() - machine.began}
    told |= {"complete": not machine.late, "passed": all(one.passed for one in checks)}
    rows = {"checks": checks, "reads": read, "steps": stepped}
    told |= {name: [asdict(one) for one in some] for name, some in rows.items()}
    (given.out / "gpu.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print((given.out / "checks.tsv").read_text() + (given.out / "reads.tsv").read_text(), end="")
    print((given.out / "steps.tsv").read_text(), end="")
    return 0 if told["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
