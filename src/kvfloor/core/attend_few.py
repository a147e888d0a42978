"""Compute attention of few queries over many tokens in compiled C, where the system has a C compiler.

`core.attend` defines in torch what is computed. The kernel reads keys and values once for all queries of a row. It
is for float32 and bfloat16 on processors with AVX2. A row is one (batch item, kv head)
stream. In shapes, q is (rows, m, d), k (rows, s, d), v (rows, s, dv): m queries and s tokens per row.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvfloor.core import native
from kvfloor.files import cache_folder

SOURCE = Path(__file__).with_name("attend_few.c")
OPTIONS = (*native.OPTIONS, "-ffp-contract=fast", "-pthread")
MOST_QUERIES = 16
"""Most queries of a row for which the kernel is used; its source has the same number."""

WIDEST = 1024
"""Largest width of a value."""

PART = 4096
"""Tokens of a row that one thread reads at a time; the parts follow from the row alone, so that its answers do too."""

_QUERIES, _LANES = 4, 8
_SHARED_BYTES = 2**21


class _Asked(ctypes.Structure):
    """Lay out what the kernel is given, as `struct asked` of attend_few.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "m", "s", "d", "dv")),
        *((name, ctypes.c_int64) for name in ("k_row", "k_token", "v_row", "v_token", "w_row", "part", "narrow")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "weight", "mean", "log_mass")),
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, which is made first if it is missing; None where it cannot be had."""
    return native.if_possible(lambda: loaded(cache_folder() / "kernels"))


@lru_cache(maxsize=1)
def parallel() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP runtime that torch has loaded; None where it has none of GNU.

    Threads of that runtime wait for work for a while after each of torch's operators, and keep others from the cores.
    """
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError, TypeError):
        return None


def loaded(folder: Path) -> ctypes.CDLL | None:
    """Return the compiled kernel in a folder, made there if it is missing; None for processors without AVX2."""
    if "-mavx2" not in native.instructions():
        return None
    return laid_out(native.compiled(SOURCE, "attend_few", folder, (*OPTIONS, *native.instructions())))


def laid_out(found: ctypes.CDLL) -> ctypes.CDLL | None:
    """Return the kernel with the types of its arguments; None if it takes another structure."""
    found.attend_few.argtypes = (ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    found.attend_few.restype, found.size_of_asked.restype = None, ctypes.c_int64
    return found if found.size_of_asked() == ctypes.sizeof(_Asked) else None


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return True if the kernel is at hand and computes attention of these tensors.

    It takes CPU tensors of one dtype, float32 or bfloat16, whose keys and values have their numbers side by side, at
    least one query of a row and at most `MOST_QUERIES`, and values of a width of at most `WIDEST`. It knows no
    gradients.
    """
    return (
        q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float32, torch.bfloat16)
        and 0 < q.shape[1] <= MOST_QUERIES
        and min(k.shape) > 0
        and 0 < v.shape[-1] <= WIDEST
        and k.stride(-1) == v.stride(-1) == 1
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and library() is not None
    )


def attend_few(
    q: Tensor, k: Tensor, v: Tensor | None, scale: float, log_weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute attention of q over k and v, which the kernel serves: outputs (rows, m, dv) and log-masses (rows, m).

    Both are float32 and as `attend` defines them. v None: the outputs have width 0, and keys alone are read.
    log_weight  (rows, s), added to the logits; None: nothing is added
    Products and sums are in float32, also for bfloat16. A query with a logit that is infinite or not a number gets NaN.
    """
    found = library()
    assert found is not None
    (rows, m, d), s, dv = q.shape, k.shape[1], 0 if v is None else v.shape[-1]
    parts = -(-s // PART)
    asked = pad(q.float() * scale, (0, -d % _LANES, 0, -m % _QUERIES)).contiguous()
    weight = None if log_weight is None else log_weight.float()
    if weight is not None and weight.stride(-1) != 1:
        weight = weight.contiguous()
    mean = torch.empty(rows, parts, m, dv, dtype=torch.float32)
    log_mass = torch.empty(rows, parts, m, dtype=torch.float32)
    given = _Asked(
        *(rows, m, s, d, dv, *k.stride()[:2], *((0, 0) if v is None else v.stride()[:2])),
        *(0 if weight is None else weight.stride(0), PART, q.dtype == torch.bfloat16),
        *(None if x is None else x.data_ptr() for x in (asked, k, v, weight, mean, log_mass)),
    )
    nbytes = rows * s * (d + dv) * k.element_size()
    threads = torch.get_num_threads() if nbytes >= _SHARED_BYTES else 1
    found.attend_few(threads, parallel(), ctypes.byref(given))
    return _joined(mean, log_mass)


def _joined(mean: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the parts' means (rows, parts, m, dv) and log-masses (rows, parts, m)."""
    if mean.shape[1] == 1:
        return mean.squeeze(1), log_mass.squeeze(1)
    whole = log_mass.logsumexp(1)
    if mean.shape[-1] == 0:
        return mean[:, 0], whole
    share = (log_mass - whole.unsqueeze(1)).exp_().masked_fill_(log_mass == -torch.inf, 0.0)
    return torch.matmul(share.permute(0, 2, 1).unsqueeze(2), mean.transpose(1, 2)).squeeze(2), whole
