"""Compile the kernel of attention over blocks for CUDA devices, which takes none, and print the bytes of shared memory.

A process of its own, `python -m tests.vllm.compiled`, as triton must not interpret here.
"""

from __future__ import annotations

import json

import torch
import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from kvfloor.core.attend_blocks_triton import attend_kernel, constants

CAPABILITIES = (80, 90)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SIZES = (
    (3, 3, 64, 64, torch.float32, False),
    (8, 4, 128, 128, torch.bfloat16, False),
    (2, 1, 256, 256, torch.bfloat16, True),
    (4, 17, 80, 96, torch.float16, True),
)


def shared_bytes(capability: int, sizes: tuple[int, int, int, int, torch.dtype, bool]) -> int:
    """Compile the kernel for a device and these arguments of `constants`; return the shared memory of a program."""
    fixed = constants(*sizes)
    types = dict.fromkeys(("q_at", "k_at", "v_at", "out_at"), f"*{NAMES[sizes[4]]}")
    types |= dict.fromkeys(("rows_at", "held_at"), "*i64") | dict.fromkeys(("k_block", "v_block"), "i64")
    types |= dict.fromkeys(("k_head", "k_slot", "v_head", "v_slot"), "i32") | {"scale": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(fixed, "constexpr")
    names = attend_kernel.arg_names
    given = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=attend_kernel, signature={name: types[name] for name in names}, constexprs=given)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).metadata.shared


if __name__ == "__main__":
    print(json.dumps([shared_bytes(capability, sizes) for capability in CAPABILITIES for sizes in SIZES]))
