"""Lay out a cache state as a block of bytes of fixed size, which may lie in memory that someone else owns.

A state is a KV cache's memory: the tokens that it holds, and its counters. A serving engine allocates one block of
bytes for each request and layer, and frees it when the request ends. So the state of a request has to live in such a
block: every tensor and number of the state is a field, at a fixed offset.
A part is an object among the attributes of a state or of another part, such as the store of held tokens. A row is one
(batch item, kv head) stream. The state of one request has H rows, one per kv head. A state of n requests has n H rows,
request after request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from kvfloor.core.memory import PUBLIC, SCALAR_BYTES, Memory
from kvfloor.core.state import State

ALIGNMENT = 16
"""Every field starts at a multiple of so many bytes, and the block's size is one."""

_NUMBERS = {bool: torch.int64, int: torch.int64, float: torch.float64}
_DERIVED = ("capacity", "offset")  # of an arena: every opened state has them, so their bytes in a block are not used


@dataclass(frozen=True)
class BlockField:
    """Describe one field of a block: where it lies, and which attribute of the state it holds.

    path    names of the attributes that lead from the state to this one, such as ("slots", "k")
    dtype   of the entries
    shape   of the attribute in the state of one request; () for a number
    offset  bytes from the block's start
    """

    path: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def name(self) -> str:
        """Return the path as one text, such as "slots.k"."""
        return ".".join(self.path)

    @property
    def nbytes(self) -> int:
        """Return the field's size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Hold the position and type of everything in a block.

    fields  the fields, in the order of their offsets
    nbytes  size of the block in bytes
    paths   path of each attribute that the block holds -> name of its field; two attributes may share one field
    """

    fields: tuple[BlockField, ...]
    nbytes: int
    paths: dict[tuple[str, ...], str]

    @classmethod
    def of(cls, state: State) -> Layout:
        """Return the layout of blocks for states like `state`, a state of one request.

        `state` must have allocated all memory that it will ever need (`State.reserve`). Two attributes that share their
        memory are one field.
        """
        fields: list[BlockField] = []
        end, stored, paths = 0, dict[int, str](), dict[tuple[str, ...], str]()
        for path, value in _attributes(state):
            if isinstance(value, Tensor):
                if value.numel() and value.data_ptr() in stored:
                    paths[path] = stored[value.data_ptr()]
                    continue
                field = BlockField(path, value.dtype, tuple(value.shape), end)
                stored[value.data_ptr()] = field.name
            else:
                field = BlockField(path, _NUMBERS[type(value)], (), end)
            fields.append(field)
            paths[path] = field.name
            end = -(-(end + field.nbytes) // ALIGNMENT) * ALIGNMENT
        return cls(tuple(fields), end, paths)

    @property
    def padding(self) -> int:
        """Return the number of bytes of the block that belong to no field, because fields are aligned.

        All other bytes are counted by the state's `nbytes` too.
        """
        return self.nbytes - sum(field.nbytes for field in self.fields)

    def views(self, blocks: Tensor) -> dict[str, Tensor]:
        """Return a view of each field in all blocks: field name -> tensor (blocks, *shape), with the field's shape.

        blocks: (blocks, bytes) uint8. Each block's bytes lie together; the blocks may lie apart. The shape of a number
        is (1,). Raises ValueError for blocks that are smaller than the layout, of another dtype, or not aligned to 8
        bytes.
        """
        if blocks.dtype != torch.uint8 or blocks.ndim != 2 or blocks.shape[1] < self.nbytes or blocks.stride(1) != 1:
            raise ValueError(
                f"blocks must be uint8 (blocks, at least {self.nbytes}), each without gaps, got {blocks.dtype} "
                f"{tuple(blocks.shape)} with strides {blocks.stride()}"
            )
        if blocks.stride(0) % 8 or blocks.data_ptr() % 8:
            raise ValueError("blocks must start at multiples of 8 bytes: allocate them so")
        found = {}
        for field in self.fields:
            part = blocks[:, field.offset : field.offset + field.nbytes]
            found[field.name] = part.view(field.dtype).unflatten(1, field.shape or (1,))
        return found

    def load(self, views: dict[str, Tensor], ids: Tensor, state: State) -> None:
        """Replace the tensors and numbers of `state`, a state of n requests, by copies from the blocks `ids` (n,).

        views: what the method `views` returned. Apart from its number of requests, `state` has the sizes of the state
        that the layout was made from. Raises ValueError if the blocks differ in a number, because a state has one value
        of it for all requests: for example, if the prompt has ended in some of the requests only.
        """
        copies = {field.name: views[field.name][ids] for field in self.fields if field.path[-1] not in _DERIVED}
        for path, field in self.paths.items():
            owner, name = _owner(state, path)
            if name in _DERIVED:
                continue
            source, now = copies[field], getattr(owner, name)
            if isinstance(now, Tensor):
                setattr(owner, name, source.flatten(0, 1).to(now.device))
                continue
            if bool((source != source[0]).any()):
                raise ValueError(f"these blocks differ in {field}: load them one after the other")
            setattr(owner, name, type(now)(source[0].item()))

    def empty(self, state: State) -> None:
        """Replace the tensors of `state` by empty ones, to free their memory.

        Until `load` or `bind` gives it new tensors, the state must not be used.
        """
        for path in self.paths:
            owner, name = _owner(state, path)
            now = getattr(owner, name)
            if isinstance(now, Tensor) and name not in _DERIVED:
                setattr(owner, name, now.new_empty(0))

    def bind(self, views: dict[str, Tensor], block: int, state: State) -> None:
        """Replace the tensors of `state`, a state of one request, by views of the fields of one block.

        views  what the method `views` returned
        block  index of the block
        A change of the state in place then changes the block. Numbers are copied from the block, and so are tensors
        that the state keeps on another device than the block's. `store` writes these back, and attributes that the
        state has replaced.
        """
        for path, field in self.paths.items():
            owner, name = _owner(state, path)
            if name in _DERIVED:
                continue
            source, now = views[field][block], getattr(owner, name)
            if not isinstance(now, Tensor):
                setattr(owner, name, type(now)(source.item()))
            elif now.device == source.device:
                setattr(owner, name, source)
            else:  # a new tensor: what is known of the old one is not true of this one
                setattr(owner, name, source.to(now.device))

    def store(self, state: State, views: dict[str, Tensor], ids: Tensor) -> None:
        """Copy `state`, a state of n requests, into the blocks `ids` (n,), which are different.

        views: what the method `views` returned. Raises ValueError, with no byte written, if an attribute has outgrown
        its field, or has no field because it was None when the layout was made.
        """
        n = len(ids)
        if any(path not in self.paths for path, _ in _attributes(state)):
            new = next(".".join(path) for path, _ in _attributes(state) if path not in self.paths)
            raise ValueError(f"{new} of {state.method} has no place in its block: `reserve` must make it at once")
        values = [getattr(*_owner(state, field.path)) for field in self.fields]
        for field, value in zip(self.fields, values, strict=True):
            if value is None or (isinstance(value, Tensor) and value.numel() != n * prod(field.shape)):
                raise ValueError(f"{field.name} of {state.method} no longer fits its block: its memory is not constant")
        for field, value in zip(self.fields, values, strict=True):
            view = views[field.name]
            if not isinstance(value, Tensor):
                view[ids] = value
            elif field.path[-1] in _DERIVED or (n == 1 and value.data_ptr() == view[ids[0]].data_ptr()):
                continue  # the same in every state, or bound to the block
            else:
                view[ids] = value.view(n, *view.shape[1:]).to(view.device)


def _attributes(part: Memory, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path, value) for each tensor and number in `part` and the parts inside it.

    path: names of the attributes that lead to the value; the argument `path` is its beginning.
    """
    for name, value in vars(part).items():
        if name in PUBLIC or value is None:
            continue
        if isinstance(value, Memory):
            yield from _attributes(value, (*path, name))
        elif isinstance(value, (Tensor, bool, int, float)):
            yield (*path, name), value
        else:
            raise TypeError(f"{'.'.join((*path, name))} is a {type(value).__name__}: a block holds tensors and numbers")


def _owner(state: State, path: tuple[str, ...]) -> tuple[Any, str]:
    """Return the object that has the attribute at the end of `path`, and that attribute's name.

    path: names of the attributes that lead from `state` to that one.
    """
    part: Any = state
    for name in path[:-1]:
        part = getattr(part, name)
    return part, path[-1]


assert SCALAR_BYTES == torch.int64.itemsize == torch.float64.itemsize  # a number takes as much in a block as in a state
