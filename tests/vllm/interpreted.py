"""Run the kernel of attention over blocks by triton's interpreter, and print as JSON how far its answers are off.

triton decides when it is imported whether it interprets, so this is a process of its own:
`TRITON_INTERPRET=1 python -m tests.vllm.interpreted`.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvfloor.core import attend_blocks, attend_blocks_triton
from kvfloor.core.attend_blocks import attend_blocks as definition
from kvfloor.core.attend_blocks_triton import attend_blocks as kernel
from tests.core.blocks import CASES, error, error_of_equal_keys, made
from tests.core.test_pool import Engine


def error_beside_poison() -> float:
    """Return the largest distance from the definition, if all slots that hold no token are NaN."""
    q, k, v, batch = made(CASES[0])
    expected = definition(q, k, v, batch, 0.125, None)
    for block, held in zip(batch.named, CASES[0].held, strict=True):
        k[block, :, held + 1 :] = torch.nan
        v[block, :, held + 1 :] = torch.nan
    return float((kernel(q, k, v, batch, 0.125, None) - expected).abs().max())


def refusal_of_scattered_entries() -> str:
    q, k, v, batch = made(CASES[0])
    try:
        kernel(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, batch, 0.125, None)
    except ValueError as refusal:
        return str(refusal)
    return ""


def error_in_a_pool() -> float:
    """Return the largest distance of a pool with the kernel from states that serve each request alone."""
    engine, worst, calls = Engine("h2o@24"), 0.0, []
    for block, tokens in ((5, 70), (0, 3), (3, 31)):
        engine.start(block)
        engine.step([block], tokens)

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return kernel(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend_blocks, "kernel_applies", lambda q: True)
        patch.setattr(attend_blocks_triton, "attend_blocks", counted)
        for _ in range(12):
            worst = max(worst, engine.step([0, 3, 5], 1), engine.step([5, 3], 1))
    return worst if len(calls) == 24 and all(engine.same(block) for block in (0, 3, 5)) else math.inf


def kernel_less_one(q, k, v, batch, scale, softcap):
    """A mutant: the newest token is not read."""
    return kernel(q, k, v, replace(batch, held=batch.held - 1), scale, softcap)


if __name__ == "__main__":
    found = {
        "exact": {str(case): error(kernel, case) for case in CASES},
        "equal keys": {str(case): error_of_equal_keys(kernel, case) for case in CASES[:4]},
        "mutant": error(kernel_less_one, CASES[2]),
        "poison": error_beside_poison(),
        "pool": error_in_a_pool(),
        "scattered": refusal_of_scattered_entries(),
    }
    print(json.dumps(found))
