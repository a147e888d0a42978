"""Attention over the slots of blocks, the definition: the answers of exact attention in float64, at odd shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvfloor import core
from kvfloor.core import attend_blocks as module
from kvfloor.core.attend_blocks import attend_blocks, kernel_applies
from tests.core.blocks import CASES, Case, error, error_of_equal_keys, made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition_is_exact_attention(case: Case) -> None:
    assert error(attend_blocks, case) < 1


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_equal_keys_share_their_weight(case: Case) -> None:
    assert error_of_equal_keys(attend_blocks, case) < 1


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "applies"),
    [
        ("cuda", torch.float32, True, True),
        ("cuda", torch.bfloat16, True, True),
        ("cuda", torch.float16, True, True),
        ("cuda", torch.float64, True, False),
        ("cuda", torch.float32, False, False),
        ("cpu", torch.float32, True, False),
        ("mps", torch.float32, True, False),
    ],
)
def test_the_kernel_is_for_cuda_devices_with_triton(
    device: str, dtype: torch.dtype, installed: bool, applies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name if installed else None)
    q: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert kernel_applies(q) is applies


def test_the_kernel_answers_where_it_applies_and_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, batch = made(CASES[0])
    answer = torch.zeros(1)
    monkeypatch.setattr(core, "attend_blocks_triton", SimpleNamespace(attend_blocks=lambda *_: answer), raising=False)
    assert attend_blocks(q, k, v, batch, 1.0, None) is not answer
    monkeypatch.setattr(module, "kernel_applies", lambda q: True)
    assert attend_blocks(q, k, v, batch, 1.0, None) is answer
    assert attend_blocks(q, k, v, batch, 1.0, None, backend="torch") is not answer
