"""Summarise the evicted tokens in a small linear-attention state with trained kernels (LESS, low rank).

In this file a row is one (batch item, kv head) stream. A kernel is a trained feature map, i.e. a small network that
maps a query (phi) or a key (psi) to R non-negative numbers, its features; kernels come in pairs (phi, psi), one pair
per kv head of each layer. In shapes, P are kv heads or rows, m queries and c keys of each, d the width of a key, h that
of a kernel's hidden layer, R the number of features; dv is the width of a value. A `Spec` holds the sizes and constants
of a cache and, in a model, each row's layer and kv head.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kvfloor.core.fields import Field
from kvfloor.core.message import CorruptState
from kvfloor.core.method import Traits
from kvfloor.core.partial import Partial
from kvfloor.core.rowwise import aligned
from kvfloor.core.spec import Spec
from kvfloor.core.summary import Summary, SummaryState, lots
from kvfloor.files import read_regular
from kvfloor.models.load import BUILTIN, builtin_path
from kvfloor.validation import count

UNTRAINED_HIDDEN = 64
_SETTLED_NS = 2_000_000_000  # a file that changed since is read anew: its times may not tell two versions apart
_MOST_BYTES = 1 << 31  # of a kernels file; 80 layers of 8 heads of width 128 take a quarter
FIRST_SIZE = 1e-4  # of s1 and s2 before training
_SHARED = "less/"


@dataclass(frozen=True)
class Less(Summary):
    """Summarise the evicted tokens in a linear-attention state of rank R with trained feature maps.

    Law (Dong et al. 2024): the state is H = sum of psi(k) v^T and z = sum of psi(k) over the evicted tokens of a row.
    The evicted tokens add phi(q) H to the numerator and phi(q) z to the denominator of attention, so psi(k).phi(q)
    replaces exp(scale q.k). phi and psi are small networks (`Kernels`), trained for one model and eviction policy by
    `kvfloor train-less`. Their outputs are non-negative, so phi(q) H / phi(q) z is a convex combination of the evicted
    tokens' values. The state is R (dv + 1) float32 numbers per row: with R = 8, as much memory as 4 tokens in float32.
    To compare fairly, let the same policy without this summary keep that many more tokens. There is no guarantee.

    rank     R
    kernels  the safetensors file that `kvfloor train-less` wrote, with one pair of networks per (layer, kv head); a row
             uses the pair of its own layer and kv head. A file with a single pair serves every row. "builtin": the
             kernels of the small language model that kvfloor ships. None: untrained networks, which give the evicted
             tokens almost no weight.
    A saved state holds the path of the kernels' file and a number computed from the file's contents. Loading the state
    is refused once the file has changed.
    """

    name: ClassVar[str] = "less"
    paper: ClassVar[str] = "Dong et al. 2024, LESS (arXiv 2402.09398)"
    rank: int = 8
    kernels: str | None = None

    def __post_init__(self) -> None:
        count(self.name, least=1, rank=self.rank)
        if self.kernels is None:
            return
        if not isinstance(self.kernels, str):
            raise ValueError(f"{self.name}: kernels must be a file's path or {BUILTIN!r}, got {self.kernels!r}")
        rank = self._file().kernels.s1.shape[1]
        if rank != self.rank:
            raise ValueError(f"{self.name}: the kernels in {self.kernels!r} have rank {rank}: write rank={rank}")

    def _file(self) -> KernelFile:
        assert self.kernels is not None
        path = builtin_path() / "less.safetensors" if self.kernels == BUILTIN else Path(self.kernels)
        try:
            stamp = path.stat()
        except (OSError, ValueError) as cause:
            reason = getattr(cause, "strerror", None) or cause
            raise ValueError(f"{self.name}: cannot read the kernels {str(path)!r}: {reason}") from None
        if abs(time.time_ns() - stamp.st_mtime_ns) < _SETTLED_NS:  # another write may leave the same times
            return read_kernels.__wrapped__(path, ())
        return read_kernels(path, (stamp.st_ino, stamp.st_ctime_ns, stamp.st_mtime_ns, stamp.st_size))

    @property
    def traits(self) -> Traits:
        if self.kernels is None:
            return Traits()
        file = self._file()
        return Traits(trained_for=(file.layers, file.heads, file.kernels.query_in.shape[1]))

    def open(self, spec: Spec) -> LessState:
        """Return an empty summary for the rows of `spec`, with the feature maps (kernels) for every row.

        Raises ValueError if the kernels were trained for another head width, or if the file has none for the layer and
        kv head of a row.
        """
        if self.kernels is None:
            return LessState(Kernels.untrained(1, spec.d, self.rank, UNTRAINED_HIDDEN, seed=0), [(0, 0)], 0, spec)
        file = self._file()
        d = file.kernels.query_in.shape[1]
        if d != spec.d:
            raise ValueError(f"{self.name}: the kernels in {self.kernels!r} are for heads of width {d}, not {spec.d}")
        if file.layers * file.heads == 1:
            return LessState(file.kernels, [(0, 0)], file.tag, spec)
        if spec.places is None:
            raise ValueError(
                f"{self.name}: {self.kernels!r} has kernels for {file.layers} layers of {file.heads} kv heads, and the "
                f"rows' Spec.places do not say which are theirs; kvfloor.hf sets them"
            )
        places = sorted(set(spec.places))
        for layer, head in places:
            if not (0 <= layer < file.layers and 0 <= head < file.heads):
                raise ValueError(
                    f"{self.name}: {self.kernels!r} has kernels for {file.layers} layers of {file.heads} kv heads, "
                    f"none for layer {layer}, kv head {head}: train them on this model"
                )
        chosen = torch.tensor([layer * file.heads + head for layer, head in places])
        return LessState(file.kernels.of(chosen), places, file.tag, spec)


@dataclass(frozen=True)
class Kernels:
    """Hold P pairs of feature maps, phi of queries and psi of keys: one per kv head, the first axis of every tensor.

        phi(q) = | gelu(gelu(q query_in) query_out) |          query_in (P, d, h), query_out (P, h, R)
        psi(k) = | x + (x key_mix) s2 |                        key_mix (P, R, R), s2 (P, R)
             x = |s1| gelu(gelu(k key_in) key_out)             key_in (P, d, h), key_out (P, h, R), s1 (P, R)

    Queries q and keys k are those that the cache receives, after RoPE. They are not multiplied by the scale of logits,
    as training fits the maps to it.
    """

    query_in: Tensor
    query_out: Tensor
    key_in: Tensor
    key_out: Tensor
    key_mix: Tensor
    s1: Tensor
    s2: Tensor

    @classmethod
    def untrained(cls, heads: int, d: int, rank: int, hidden: int, seed: int) -> Kernels:
        """Return random kernels from which training starts: uniform in +-sqrt(6 / (fan in + fan out)), s1 = s2 = 1e-4.

        heads: P, the number of pairs of maps; d: width of a key; rank: R, the number of features; hidden: h, the width
        of the hidden layer; seed: fixes the random numbers.
        """
        source = torch.Generator().manual_seed(seed)

        def uniform(fan_in: int, fan_out: int) -> Tensor:
            bound = (6.0 / (fan_in + fan_out)) ** 0.5
            return (2.0 * torch.rand(heads, fan_in, fan_out, generator=source) - 1.0) * bound

        query_in, query_out = uniform(d, hidden), uniform(hidden, rank)
        key_in, key_out, key_mix = uniform(d, hidden), uniform(hidden, rank), uniform(rank, rank)
        small = torch.full((heads, rank), FIRST_SIZE)
        return cls(query_in, query_out, key_in, key_out, key_mix, small, small.clone())

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def of(self, head: Tensor) -> Kernels:
        """Return r of the P pairs of feature maps: those with the indices `head` (r,), which may repeat, in this order.

        If there is only one pair (P = 1), it is returned r times whatever the indices, as views without a copy.
        """
        if self.s1.shape[0] == 1:
            return Kernels(*(x.expand(len(head), *x.shape[1:]) for x in self.tensors().values()))
        return Kernels(*(x[head] for x in self.tensors().values()))

    def one(self, place: int) -> Kernels:
        """Return the pair of feature maps with index `place`, in contiguous tensors aligned to 64 bytes.

        Matrix products of aligned tensors round alike in every call.
        """
        return Kernels(*(aligned(x[place : place + 1]) for x in self.tensors().values()))

    def phi(self, q: Tensor, dropout: float = 0.0) -> Tensor:
        """Return features (P, m, R) >= 0 of queries (P, m, d); training drops a share `dropout` of the hidden units."""
        return F.gelu(torch.bmm(_hidden(q, self.query_in, dropout), self.query_out)).abs()

    def psi(self, k: Tensor, dropout: float = 0.0) -> Tensor:
        """Return features (P, c, R) >= 0 of keys (P, c, d); training drops a share `dropout` of the hidden units."""
        x = F.gelu(torch.bmm(_hidden(k, self.key_in, dropout), self.key_out)) * self.s1.abs().unsqueeze(1)
        return (x + torch.bmm(x, self.key_mix) * self.s2.unsqueeze(1)).abs()


def _hidden(x: Tensor, weight: Tensor, dropout: float) -> Tensor:
    hidden = F.gelu(torch.bmm(x, weight))
    return F.dropout(hidden, dropout) if dropout else hidden


@dataclass(frozen=True)
class KernelFile:
    """Hold the contents of a kernels file: layers * heads pairs of feature maps, those of layer 0 first.

    heads  kv heads per layer; the pair of (layer, kv head) has the index layer * heads + kv head
    tag    a number from the SHA-256 of the file, which changes with its contents
    """

    kernels: Kernels
    layers: int
    heads: int
    tag: int


@lru_cache(maxsize=4)
def read_kernels(path: Path, stamp: tuple[int, ...]) -> KernelFile:
    """Read the trained feature maps from a safetensors file.

    A result is cached, and returned again for the same path and `stamp`. The caller passes as `stamp` numbers that
    change with the file, such as its size and the time of its last change, so that a changed file is read anew. Raises
    ValueError if the file is damaged, too large, or holds other tensors than such maps.
    """
    del stamp
    try:
        data = read_regular(path, _MOST_BYTES, "kernels")
        tensors = load(data)
    except (KeyError, OverflowError, RuntimeError, SafetensorError) as cause:
        raise ValueError(f"less: {str(path)!r} is no safetensors file: {cause}") from None
    layers, heads = _check_shapes(tensors, str(path))
    # Tensors are not aligned in the file; aligned ones make products round alike in every process.
    kernels = Kernels(*(aligned(tensors[f.name].to(torch.float32).flatten(0, 1)) for f in fields(Kernels)))
    return KernelFile(kernels, layers, heads, int.from_bytes(hashlib.sha256(data).digest()[:6], "little"))


def _check_shapes(tensors: Mapping[str, Tensor], path: str) -> tuple[int, int]:
    """Return the numbers (layers, kv heads) of a kernels file, which are the first two axes of each of its tensors.

    tensors: the file's tensors by name; path: the file's path, for the error. Raises ValueError if a tensor is missing
    or unknown, has a shape that does not fit the others, or has entries that are not finite floats.
    """
    names = {f.name for f in fields(Kernels)}
    if set(tensors) != names:
        raise ValueError(f"less: {path!r} has tensors {sorted(tensors)}; kernels are {sorted(names)}")
    first = tensors["query_in"].shape
    if len(first) != 4 or min(first) < 1:
        raise ValueError(f"less: query_in in {path!r} must be (layers, kv heads, d, hidden), got {tuple(first)}")
    layers, heads, d, hidden = first
    rank = tensors["query_out"].shape[-1]
    wanted = {
        "query_in": (d, hidden),
        "query_out": (hidden, rank),
        "key_in": (d, hidden),
        "key_out": (hidden, rank),
        "key_mix": (rank, rank),
        "s1": (rank,),
        "s2": (rank,),
    }
    for name, shape in wanted.items():
        x = tensors[name]
        if tuple(x.shape) != (layers, heads, *shape) or not x.is_floating_point():
            raise ValueError(
                f"less: {name} in {path!r} must be {(layers, heads, *shape)} floats, got {x.dtype} {tuple(x.shape)}"
            )
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"less: {name} in {path!r} has NaN or infinite entries")
    return layers, heads


class LessState(SummaryState):
    """Hold the linear-attention state of each row: sums (rows, R, dv + 1), which are H with z as last column.

    H = sum of psi(k) v^T and z = sum of psi(k), over the row's evicted tokens. sums are float32 (float64 for a float64
    cache). `tag` is a number that identifies the contents of the file that the feature maps were read from.
    """

    def __init__(self, kernels: Kernels, places: list[tuple[int, int]], tag: int, spec: Spec) -> None:
        super().__init__(spec)
        like = {"dtype": spec.compute_dtype, "device": spec.device}
        self.shared[_SHARED + "place"] = torch.tensor(places)
        for name, tensor in kernels.tensors().items():
            self.shared[_SHARED + name] = tensor.to(**like)
        self.tag = tag
        self.sums = torch.zeros(spec.rows, kernels.s1.shape[1], spec.dv + 1, **like)

    def _kernels(self, row: Tensor | None = None) -> Kernels:
        """Return one pair of feature maps for each row whose index is in `row` (r,), in this order; None: all rows."""
        of_places = Kernels(*(self.shared[_SHARED + f.name] for f in fields(Kernels)))
        head = torch.zeros(self.spec.rows, dtype=torch.int64)
        place = self.shared[_SHARED + "place"]
        if len(place) > 1:
            same = (torch.tensor(self.spec.places).unsqueeze(1) == place).all(2)
            head = same.to(torch.int64).argmax(1)
        return of_places.of(head.to(self.sums.device) if row is None else head.to(row.device)[row])

    def absorb(self, row: Tensor, k: Tensor, v: Tensor, position: Tensor) -> None:
        del position
        k, v = k.to(self.sums.dtype), v.to(self.sums.dtype)
        v = torch.cat([v, torch.ones_like(v[:, :1])], 1)
        rows = torch.unique_consecutive(row)
        kernels, single = self._kernels(rows), len(self.shared[_SHARED + "place"]) == 1
        own, added = kernels.one(0) if len(rows) else kernels, []
        for i, (_, keys, values) in enumerate(lots(row, k, v)):
            own = own if single else kernels.one(i)
            added.append(torch.bmm(own.psi(keys).transpose(1, 2), values))
        if added:
            self.sums[rows] += torch.cat(added)

    def read(self, q: Tensor) -> Partial:
        sums = torch.bmm(self._kernels().phi(q.to(self.sums.dtype)), self.sums)  # (rows, m, dv + 1)
        mass = sums[..., -1:]
        return Partial(torch.where(mass > 0, sums[..., :-1] / mass, 0.0), torch.log(mass.squeeze(-1)))

    def fields(self) -> dict[str, Any]:
        return {"tag": Field(int)}

    def adopt(self, fields: dict[str, Any]) -> None:
        if fields["tag"] != self.tag:
            raise CorruptState("less: the kernels' file has changed since this state was saved, or is another one")
        super().adopt(fields)
