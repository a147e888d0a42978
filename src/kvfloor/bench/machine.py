"""Say what a benchmark ran on: processor, instruction set, cores, threads and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kvfloor.version import __version__

_BESIDE = ("transformers", "numba", "kvpress", "vllm")


def machine() -> dict[str, Any]:
    """Return what the times depend on: processor, instruction set, cores that this process may use, and versions.

    `torch_isa` is the instruction set that torch's own kernels use.
    """
    sold_as = importlib.metadata.packages_distributions()  # vLLM's builds for CPUs are not called vllm
    versions = {
        name: importlib.metadata.version(sold_as[name][0])
        for name in _BESIDE
        if find_spec(name) is not None and name in sold_as
    }
    return {
        "processor": _processor(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kvfloor": __version__,
        **versions,
    }


def machine_line(about: dict[str, Any]) -> str:
    """Return the machine in one line."""
    beside = ", ".join(f"{name} {about[name]}" for name in ("python", "torch", "kvfloor", *_BESIDE) if name in about)
    return (
        f"{about['processor']}, {about['torch_isa']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['system']}; {beside}"
    )


def cores() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """Return the processor's name as Linux gives it, with family and model; else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    facts = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or "unknown processor"
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"
