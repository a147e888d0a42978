"""The kernel of attention over blocks gives the answers of its definition, run by triton's interpreter on a CPU.

It lies here because the environment of vLLM has triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.core.blocks import CASES


def told(module: str, **environment: str) -> Any:
    """Run a module of the tests in a process of its own, and return what it printed."""
    clean = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run([sys.executable, "-m", module], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return told("tests.vllm.interpreted", TRITON_INTERPRET="1")


def test_the_kernel_is_exact_attention(found: dict[str, Any]) -> None:
    assert len(found["exact"]) == len(CASES)
    assert {case: error for case, error in found["exact"].items() if not error < 1} == {}


def test_equal_keys_share_their_weight(found: dict[str, Any]) -> None:
    assert len(found["equal keys"]) == 4
    assert max(found["equal keys"].values()) < 1


def test_a_kernel_that_leaves_the_newest_token_out_is_found(found: dict[str, Any]) -> None:
    assert found["mutant"] > 10


def test_the_kernel_reads_no_slot_without_a_token(found: dict[str, Any]) -> None:
    assert found["poison"] < 3e-6


def test_a_pool_with_the_kernel_serves_each_request_as_alone(found: dict[str, Any]) -> None:
    assert found["pool"] < 2e-6


def test_entries_that_lie_apart_are_refused(found: dict[str, Any]) -> None:
    assert "must lie together" in found["scattered"]


def test_the_kernel_compiles_for_devices_and_fits_their_shared_memory(tmp_path: Path) -> None:
    shared = told("tests.vllm.compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(shared) == 8 and 0 < max(shared) <= 163 * 1024  # the least that a program may have on those devices
