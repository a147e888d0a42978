"""Take blocks of tokens into clusters and sampled pairs in compiled C, where the system has a C compiler.

`Clusters.join` and `Reservoir.offer` define in torch what is done; the kernel does the same, bit by bit. It serves
float32 tensors on a CPU. In shapes, r are the rows of a call and b the new tokens of each.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfloor.core import native
from kvfloor.core.native import instructions
from kvfloor.models.gguf import cache_folder

if TYPE_CHECKING:
    from kvfloor.methods.sketches.clusters import Clusters, Reservoir

SOURCE = Path(__file__).with_name("append.c")
OPTIONS = (*native.OPTIONS, "-ffp-contract=off")
_NOT_HERE, _NO_MEMORY = 1, 2
_UNLIMITED = 2**62


class _Joining(ctypes.Structure):
    """Lay out what `join` is given, as `struct joining` of append.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("r", "b", "d", "t", "stride", "cap")),
        ("delta", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("rows", "position", "lane", "k")),
        *((name, ctypes.c_void_p) for name in ("centre", "count", "sample", "sample_key", "overfull")),
    ]


class _Offering(ctypes.Structure):
    """Lay out what `offer` is given, as `struct offering` of append.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("r", "b", "d", "dv", "s")),
        *((name, ctypes.c_void_p) for name in ("rows", "position", "lane", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("pair_k", "pair_v", "key", "mu")),
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, which is made first if it is missing; None where it cannot be had."""
    return native.if_possible(lambda: loaded(cache_folder() / "kernels"))


def loaded(folder: Path) -> ctypes.CDLL | None:
    """Return the compiled kernel in a folder, made there if it is missing; None if it takes other structures."""
    found = native.compiled(SOURCE, "append", folder, (*OPTIONS, *instructions()))
    for name, given in (("join", _Joining), ("offer", _Offering)):
        work, size = getattr(found, name), getattr(found, f"size_of_{name}ing")
        work.argtypes, work.restype, size.restype = (ctypes.c_void_p,), ctypes.c_int64, ctypes.c_int64
        if size() != ctypes.sizeof(given):
            return None
    return found


def joined(clusters: Clusters, rows: Tensor, k: Tensor, position: Tensor, lane: Tensor, delta: float) -> bool:
    """Do the work of `Clusters.join` on clusters that have room for r * b further centres; return True if it was done.

    lane (r,) int64: the rows' keys of random numbers. Raises MemoryError, and changes nothing, where memory is short.
    Returns False, and changes nothing, for numbers that the kernel does not serve.
    """
    held = {name: getattr(clusters, name) for name in ("centre", "count", "sample", "sample_key", "overfull")}
    given = {"rows": rows, "position": position, "lane": lane, "k": k}
    (r, b, d), t, stride = k.shape, clusters.sample.shape[2], clusters.centre.shape[1]
    sizes = (r, b, d, t, stride, _UNLIMITED if clusters.cap is None else clusters.cap)
    return _done("join", _Joining, (*sizes, delta), given, held, (k, clusters.centre, clusters.sample))


def offered(pairs: Reservoir, rows: Tensor, k: Tensor, v: Tensor, position: Tensor, lane: Tensor) -> bool:
    """Do the work of `Reservoir.offer`; return True if it was done. `lane`, errors and False are those of `joined`."""
    held = {"pair_k": pairs.k, "pair_v": pairs.v, "key": pairs.key, "mu": pairs.mu}
    given = {"rows": rows, "position": position, "lane": lane, "k": k, "v": v}
    sizes = (*k.shape, v.shape[2], pairs.key.shape[1])
    return _done("offer", _Offering, sizes, given, held, (k, v, pairs.k, pairs.v))


def _done(
    name: str, kind: type[ctypes.Structure], sizes: tuple[Any, ...], given: dict[str, Tensor], held: dict[str, Tensor],
    numbers: tuple[Tensor, ...],
) -> bool:  # fmt: skip
    if any(x.dtype != torch.float32 or x.device.type != "cpu" for x in numbers):
        return False
    found = library()
    if found is None or not all(x.is_contiguous() for x in held.values()):
        return False
    dense = {name: x.contiguous() for name, x in given.items()}  # kept until the call is over
    where = [x.data_ptr() for x in (*dense.values(), *held.values())]
    status = getattr(found, name)(ctypes.byref(kind(*sizes, *where)))
    if status == _NO_MEMORY:
        raise MemoryError("no memory to take a block of tokens into clusters and pairs")
    return status != _NOT_HERE
