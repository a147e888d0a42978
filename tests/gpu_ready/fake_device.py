"""Run a state's calls with its tensors on a CUDA device that does not exist, and refuse whatever would wait for it.

Tensors on the device are fake: they have a shape, a dtype and the device "cuda:0", and no numbers. Tensors on the CPU,
such as the clocks of a state, are real. So a call runs as on a GPU, as long as it never needs a number from the device.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kvfloor.core.memory import Memory
from kvfloor.core.state import State

DEVICE = "cuda:0"
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "allclose"}
SHAPED_BY_DATA = {
    *("nonzero_static", "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2", "bincount"),
    "repeat_interleave",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class HostWaits(Exception):
    """Say that the host would wait for the device, or that a shape would depend on numbers there."""


class FakeDevice(FakeTensorMode):
    """Run operations on the device's tensors as fake ones, all others for real; raise HostWaits where the host waits.

    The host waits where it reads a number of the device, where a shape depends on such numbers, and in a copy between
    the two that is not marked as non_blocking.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.calls: list[str] = []  # names of the operations on the device, in their order
        self._bindings = _Bindings()

    def __enter__(self) -> Self:
        self._bindings.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._bindings.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and _hidden.now:
            return torch.device("meta")
        with _hidden(False), torch._C.DisableTorchFunction():
            kwargs = kwargs or {}
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            there = [x for x in tensors if isinstance(x, FakeTensor)]
            target = kwargs.get("device")
            sends = target is not None and torch.device(target).type == "cuda"
            if not there and not sends:
                return func(*args, **kwargs)
            refuse_waits(func, args, kwargs, tensors, sends)
            self.calls.append(str(func))
            return super().__torch_dispatch__(func, types, args, kwargs)


def refuse_waits(func: Any, args: Any, kwargs: Any, tensors: list[Tensor], sends: bool) -> None:
    """Raise HostWaits if a torch operation on the device makes the host wait, or has a shape that depends on numbers.

    tensors  all tensors among the arguments
    sends    True if the result is made on the device
    """
    name = func.overloadpacket.__name__
    here = [x for x in tensors if not isinstance(x, FakeTensor) and x.ndim > 0]
    there = [x for x in tensors if isinstance(x, FakeTensor)]
    if name in READS | SHAPED_BY_DATA:
        raise HostWaits(f"{func} reads numbers of the device")
    if name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]) if x is not None):
        raise HostWaits(f"{func} by a mask has a shape that depends on numbers of the device")
    if there and not sends and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        raise HostWaits(f"{func} copies to the host")
    waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if here and waits:
        raise HostWaits(f"{func} copies to the device and waits for it")
    if name == "copy_" and waits and not isinstance(args[0], FakeTensor):
        raise HostWaits(f"{func} copies to the host and waits for the device")


class _Bindings(TorchFunctionMode):
    """Hide the device from torch's C++ bindings, which set the current device before they dispatch an operation.

    A build of torch without CUDA cannot do that. The operations themselves see the device again.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("__getitem__", "__setitem__") and isinstance(args[0], FakeTensor):
            named = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.ndim > 0]
            if any(not isinstance(x, FakeTensor) for x in named):
                raise HostWaits("an index of the host is copied to the device")
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as failure:
            if "not linked with support" not in str(failure):
                raise
            with _hidden(True):  # nothing was done yet
                return func(*args, **(kwargs or {}))


class _hidden:
    """Let fake tensors say that they are on the meta device, or that they are where they are, within a `with` block."""

    now = False

    def __init__(self, hide: bool) -> None:
        self.hide = hide

    def __enter__(self) -> None:
        self.before, _hidden.now = _hidden.now, self.hide

    def __exit__(self, *error: Any) -> None:
        _hidden.now = self.before


def moved(state: State, device: FakeDevice) -> State:
    """Return a copy of a state on the CPU whose tensors lie on the fake device, but for those that stay on the host.

    Which stay there is read from a state that is opened on the meta device.
    """
    spec = replace(state.spec, device="meta")
    twin = state.method.open(spec)
    mover = _Mover(device)
    copied = copy.deepcopy(state)
    mover.move(copied, twin)
    return copied


class _Mover:
    """Replace the tensors of a state by fake ones; tensors that shared a storage share one again."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.done: dict[int, tuple[Any, Any]] = {}  # id -> (the object, so that its id stays its own; what it became)

    def move(self, part: Any, twin: Any) -> None:
        """Replace the tensors of this part of a state; `twin` is the same part of an empty state on the meta device."""
        if id(part) in self.done:
            return
        self.done[id(part)] = part, part
        for name, value in list(vars(part).items()):
            other = getattr(twin, name, None)
            if name == "spec":
                part.spec = replace(value, device=DEVICE)
            elif isinstance(value, Memory):
                self.move(value, other)
            elif isinstance(value, dict):
                setattr(part, name, {key: self.fake(x) if isinstance(x, Tensor) else x for key, x in value.items()})
            elif isinstance(value, Tensor) and (not isinstance(other, Tensor) or other.is_meta):
                setattr(part, name, self.fake(value))

    def fake(self, x: Tensor) -> Tensor:
        """Return the fake tensor that stands for x."""
        if id(x) not in self.done:
            storage = x.untyped_storage()
            key = storage.data_ptr() or id(x)
            if ("storage", key) not in self.done:
                with self.device:
                    flat = torch.empty(storage.nbytes() // x.element_size(), dtype=x.dtype, device=DEVICE)
                self.done["storage", key] = storage, flat  # type: ignore[index]
            flat = self.done["storage", key][1]  # type: ignore[index]
            with self.device:
                self.done[id(x)] = x, flat.as_strided(x.shape, x.stride(), x.storage_offset())
        return self.done[id(x)][1]
