"""Run the kernel of attention over blocks by triton's interpreter, and print as JSON how far its answers are off.

triton decides when it is imported whether it interprets, so this is a process of its own:
`TRITON_INTERPRET=1 python -m tests.vllm.interpreted`.
"""

from __future__ import annotations

import json

import torch

from kvfloor.core.attend_blocks import attend_blocks as definition
from kvfloor.core.attend_blocks_triton import attend_blocks as kernel
from tests.core.blocks import CASES, error, error_of_equal_keys, made


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


def kernel_less_one(q, k, v, batch, scale, softcap):
    """A mutant: the newest token is not read."""
    from dataclasses import replace

    return kernel(q, k, v, replace(batch, held=batch.held - 1), scale, softcap)


if __name__ == "__main__":
    found = {
        "exact": {str(case): error(kernel, case) for case in CASES},
        "equal keys": {str(case): error_of_equal_keys(kernel, case) for case in CASES[:4]},
        "mutant": error(kernel_less_one, CASES[2]),
        "poison": error_beside_poison(),
        "scattered": refusal_of_scattered_entries(),
    }
    print(json.dumps(found))
