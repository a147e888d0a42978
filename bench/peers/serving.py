"""Compare stock vLLM with kvfloor's caches inside it, on SmolLM2, and write bench/peers/serving.tsv: `make serve-bench`

One server per setting, all with the same model, memory for the cache and limits. They take turns: in every round each
server gets the same requests from vLLM's own benchmark client, first as many at a time as stock can hold (`paced`),
then a Poisson stream that exceeds what two cores can serve (`saturated`). The columns of the table, over all rounds:

setting       "stock", or kvfloor's method with its budget in tokens per kv head
cache_MiB     memory that the engine has for the cache
load          the kind of load; prompt, answer: tokens of each; requests: their number in a round
concurrency   requests of the longest length that fit into the memory, from the engine's own log
preempted     requests that the engine stopped for lack of memory and computed again, mean per round
requests_s    requests per second, median over rounds
ttft_ms       time to the first token: the median of a round's requests, and the median over rounds
tpot_ms       time per further token of a request, likewise
ratio         requests per second divided by stock's in the same round, median
tpot_ratio    time per token divided by stock's in the same round, median
peak_MiB      most memory that the server's processes held, as the kernel counts it

Prints no figures while the tests of what is timed fail. Needs the environment of `make test-vllm`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))

from gate import green  # noqa: E402

TABLE = Path(__file__).with_suffix(".tsv")
TIMED = (  # the engine first: vLLM's start fails in a process that has loaded numba, which the tests of pools may do
    "tests/vllm/test_engine.py::test_prompts_of_many_lengths_in_one_batch[sinks(4)@64]",
    "tests/vllm/test_engine.py::test_prompts_of_many_lengths_in_one_batch[h2o@64]",
    "tests/vllm/test_batch.py",
    "tests/core/test_pool.py",
)
FIELDS = (
    "setting",
    "cache_MiB",
    "load",
    "prompt",
    "answer",
    "requests",
    "concurrency",
    "preempted",
    "requests_s",
    "ttft_ms",
    "tpot_ms",
    "ratio",
    "tpot_ratio",
    "peak_MiB",
)
LONGEST = 4096
CLIENT = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as P; "
    "p = P(); add_cli_args(p); main(p.parse_args())"
)
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Load:
    """Describe one kind of load: tokens of a prompt and of an answer, requests, and how they arrive.

    at_once: most requests at a time; None: they arrive as they come, `rate` per second on average.
    """

    name: str
    prompt: int
    answer: int
    requests: int
    rate: float
    at_once: int | None = None


@dataclass
class Server:
    """Hold a running server: its setting, port, process, log file, and what its rounds measured."""

    setting: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    rounds: dict[Load, list[dict[str, float]]] = field(default_factory=dict)

    @property
    def concurrency(self) -> float:
        """Return the requests of the longest length that fit into the memory, as the engine logs them."""
        found = re.findall(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", self.log.read_text())
        return float(found[-1])

    @property
    def peak_mib(self) -> float:
        """Return the most memory that the server's processes held, in MiB, as the kernel counts it."""
        return sum(_peak_kib(pid) for pid in _family(self.process.pid)) / 1024

    def metric(self, name: str) -> float:
        """Return a counter of the server's metrics page."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextmanager
def served(setting: str, model: Path, port: int, at_once: int, mib: int) -> Iterator[Server]:
    """Start a server for this setting, wait until it answers, and end it afterwards.

    setting  "stock", or kvfloor's method with its budget
    at_once  most requests in one batch
    mib      memory for the cache
    """
    own = {} if setting == "stock" else {"KVFLOOR_METHOD": setting}
    with tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
            + ["--served-model-name", "smollm2", "--dtype", "float32", "--enforce-eager", "--port", str(port)]
            + ["--max-model-len", str(LONGEST), "--max-num-seqs", str(at_once), "--max-num-batched-tokens", "512"]
            + ["--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(mib << 20)],
            env=os.environ | ENVIRONMENT | own,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(setting, port, process, Path(log.name))
    try:
        _wait(server)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait(server: Server, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise SystemExit(f"the server of {server.setting} ended:\n{server.log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise SystemExit(f"the server of {server.setting} did not answer within {seconds:.0f} s")


def measure(server: Server, load: Load, model: Path, seed: int) -> None:
    """Send the requests of a load to a server, and add the round's figures to it."""
    before = server.metric("vllm:num_preemptions_total")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "round.json"
        given = {
            "--port": server.port,
            "--model": model,
            "--served-model-name": "smollm2",
            "--dataset-name": "random",
            "--random-input-len": load.prompt,
            "--random-output-len": load.answer,
            "--num-prompts": load.requests,
            "--request-rate": load.rate,
            "--seed": seed,
            "--result-dir": folder,
            "--result-filename": out.name,
        }
        if load.at_once:
            given["--max-concurrency"] = load.at_once
        told = [str(part) for pair in given.items() for part in pair]
        flags = ["--ignore-eos", "--save-result", "--disable-tqdm"]
        run = subprocess.run(
            [sys.executable, "-c", CLIENT, *told, *flags],
            env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if run.returncode or not out.exists():
            raise SystemExit(f"the client failed on {server.setting}:\n{run.stdout[-1500:]}\n{run.stderr[-1500:]}")
        found = json.loads(out.read_text())
    if found["completed"] != load.requests:
        raise SystemExit(f"{server.setting} answered {found['completed']} of {load.requests} requests")
    server.rounds.setdefault(load, []).append(
        {
            "requests_s": found["request_throughput"],
            "ttft_ms": found["median_ttft_ms"],
            "tpot_ms": found["median_tpot_ms"],
            "preempted": server.metric("vllm:num_preemptions_total") - before,
        }
    )


def rows(servers: Sequence[Server], loads: Sequence[Load], mib: int) -> list[tuple[object, ...]]:
    """Return the table: one row per load and setting. mib: memory for the cache."""
    stock, found = servers[0], []
    for load in loads:
        for server in servers:
            mine, theirs = server.rounds[load], stock.rounds[load]

            def middle(name: str, mine: list[dict[str, float]] = mine) -> float:
                return statistics.median(one[name] for one in mine)

            def ratio(name: str, mine=mine, theirs=theirs) -> float:
                return statistics.median(a[name] / b[name] for a, b in zip(mine, theirs, strict=True))

            preempted = statistics.fmean(one["preempted"] for one in mine)
            figures = [
                middle("requests_s"),
                middle("ttft_ms"),
                middle("tpot_ms"),
                ratio("requests_s"),
                ratio("tpot_ms"),
            ]
            found.append(
                (server.setting, mib, load.name, load.prompt, load.answer, load.requests)
                + (server.concurrency, preempted, *figures, server.peak_mib)
            )
    return found


def _family(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def _peak_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="smollm2, or the folder of a model")
    parser.add_argument("--methods", default="sinks(4)@256,h2o@256,sinks(4)@1024", help="settings, joined by commas")
    parser.add_argument("--prompts", default="1024,2048", help="tokens of a prompt, joined by commas")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=24, help="requests of a saturated round")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second of a saturated round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=int, default=1024, help="MiB of memory for the cache")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--at-once", type=int, default=32, help="most requests in a batch")
    given = parser.parse_args()
    if not green(*TIMED):
        sys.exit(1)
    from kvfloor.models.load import find

    model, loads = find(given.model, False, print), []
    for prompt in map(int, given.prompts.split(",")):
        loads.append(Load("paced", prompt, given.answer, 4, float("inf"), 4))
        loads.append(Load("saturated", prompt, given.answer, given.requests, given.rate))
    with ExitStack() as stack:
        servers = []
        for i, setting in enumerate(("stock", *given.methods.split(","))):
            servers.append(stack.enter_context(served(setting, model, given.port + i, given.at_once, given.mib)))
            print(f"{setting}: {servers[-1].concurrency}x", flush=True)
        for seed in range(given.rounds):
            for load in loads:
                for server in servers:
                    measure(server, load, model, seed)
                    print(seed, load.name, load.prompt, server.setting, server.rounds[load][-1], flush=True)
        table = rows(servers, loads, given.mib)
    lines = ["\t".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row) for row in (FIELDS, *table)]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
