"""The decode kernels compile for an H100 or H200 without one, and fit into its shared memory and registers."""

from __future__ import annotations

from pathlib import Path

from tests.vllm.test_attend_blocks_triton import told

MOST_SHARED = 113 * 1024
"""Bytes of shared memory per program for two programs to run on a multiprocessor at once, which has 227 KiB."""


def test_the_kernels_compile_and_fit(tmp_path: Path) -> None:
    found = told("tests.triton.compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 9
    for used in found.values():
        assert 0 < used["shared"] <= MOST_SHARED and 0 < used["registers"] <= 255 and used["spilled"] == 0
