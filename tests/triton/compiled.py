"""Compile the decode kernels for CUDA devices, which takes none; print what a program of each takes, as JSON.

A process of its own, `python -m tests.triton.compiled`, as triton must not interpret here. Shared memory is in bytes,
registers are per thread, and spilled is the bytes of registers that a thread keeps in memory instead.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from kvfloor import parse
from kvfloor.core.attend_triton import attend_part, constants, merge_parts
from kvfloor.core.spec import Spec
from kvfloor.methods.stores import fused_triton

CAPABILITY = 90
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PLAIN = (
    (4, 128, 128, torch.bfloat16, False, False, False),
    (8, 64, 64, torch.float16, False, True, True),
    (4, 128, 128, torch.float32, True, True, True),
    (16, 256, 256, torch.bfloat16, True, False, True),
)
CODED = ("exact:k4v4", "exact:k8v8", "h2o(block=32):k4v4@256", "h2o(block=32):k8v8@256")


def usage(kernel: Any, fixed: dict[str, Any], types: dict[str, str]) -> dict[str, int]:
    """Compile a kernel with these compile-time arguments and argument types; return what a program of it takes."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    given = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    made = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32))
    return {"shared": made.metadata.shared, **registers(made.asm["ptx"])}


def registers(ptx: str) -> dict[str, int]:
    """Return the registers of a thread, and its spilled bytes, as the assembler tells them."""
    from triton.backends.nvidia import compiler  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        assembler = compiler.get_ptxas(CAPABILITY).path
        command = [assembler, "-v", f"--gpu-name=sm_{CAPABILITY}a", str(path), "-o", str(path.with_suffix(".cubin"))]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used, spilled = re.findall(r"Used (\d+) registers", told), re.findall(r"(\d+) bytes spill stores", told)
    return {"registers": int(used[0]), "spilled": sum(map(int, spilled))}


def plain(m: int, d: int, dv: int, dtype: torch.dtype, *flags: bool) -> dict[str, int]:
    """Compile the kernel of plain slots for these arguments of `constants`."""
    types = dict.fromkeys(("q_at", "k_at", "v_at"), f"*{NAMES[dtype]}")
    types |= dict.fromkeys(("weight_at", "mean_at", "mass_at"), "*fp32") | {"count_at": "*i64"}
    types |= dict.fromkeys(("k_row", "v_row"), "i64") | dict.fromkeys(("scale", "softcap"), "fp32")
    return usage(attend_part, constants(m, d, dv, dtype, *flags), types)


def coded(text: str) -> dict[str, int]:
    """Compile the kernel of coded slots for a method, with keys and values of width 128."""
    state = parse(text).open(Spec(2, 128, 128))
    fixed = fused_triton.constants(state.slots, 4)  # type: ignore[arg-type]
    floats = ("q_at", "bias_at", "k_level_at", "v_level_at", "range_at", "mean_at", "mass_at")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("k_at", "v_at", "low_at", "high_at"), "*u8")
    types |= dict.fromkeys(("k_scale_at", "v_scale_at"), "*bf16") | {"position_at": "*i32", "softcap": "fp32"}
    types |= dict.fromkeys(("offset_at", "held_at", "coded_at"), "*i64")
    return usage(fused_triton.attend_codes, fixed, types)


def merging(parts: int) -> dict[str, int]:
    """Compile the kernel that merges parts."""
    types = dict.fromkeys(("part_mean_at", "part_mass_at", "mean_at", "mass_at"), "*fp32")
    return usage(merge_parts, {"PARTS": parts, "DV": 128}, types)


if __name__ == "__main__":
    found = {f"plain {sizes}": plain(*sizes) for sizes in PLAIN}
    found |= {text: coded(text) for text in CODED} | {"merge of 64": merging(64)}
    print(json.dumps(found))
