"""Attention over the slots of blocks, the definition: the answers of exact attention in float64, at odd shapes."""

from __future__ import annotations

import pytest
import torch

from kvfloor.core.attend_blocks import attend_blocks, kernel_applies
from tests.core.blocks import CASES, Case, error, error_of_equal_keys, made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition_is_exact_attention(case: Case) -> None:
    assert error(attend_blocks, case) < 1


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_equal_keys_share_their_weight(case: Case) -> None:
    assert error_of_equal_keys(attend_blocks, case) < 1


def test_the_kernel_is_for_devices_only() -> None:
    assert not kernel_applies(made(CASES[0])[0])
    assert not kernel_applies(torch.empty(1, device="meta"))
