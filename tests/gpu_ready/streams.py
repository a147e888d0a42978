"""Open and fill states on a CPU for the tests of this folder, and step them on a fake device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvfloor import parse
from kvfloor.core.memory import PUBLIC, Memory
from kvfloor.core.method import Method
from kvfloor.core.spec import Spec
from kvfloor.core.state import State
from tests.gpu_ready.fake_device import DEVICE, FakeDevice, HostWaits, moved

D, G, PROMPT, WARM = 16, 2, 70, 9


def tokens(rows: int, t: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q (rows, G, t, D), k (rows, t, D) and v (rows, t, D)."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, D, generator=draw) for shape in ((rows, G, t), (rows, t), (rows, t)))  # type: ignore[return-value]


def rows_of(method: Method) -> int:
    """Return the number of rows of a method's state: as many as it has budgets, at least 2."""
    budget = getattr(method, "budget", None)
    return len(budget) if isinstance(budget, tuple) else 2


def filled(text: str, **spec: Any) -> State:
    """Return a state of the method on the CPU, past its prompt and some decoded tokens."""
    method = parse(text)
    rows = rows_of(method)
    state = method.open(Spec(rows, D, D, scale=D**-0.5, **spec))
    state.step(*tokens(rows, PROMPT))
    state.seal()
    for i in range(WARM):
        state.step(*tokens(rows, seed=i + 1))
    return state


def past_a_block_end(state: State) -> int:
    """Return a number of decode steps after which a filled state is past the end of a block, by one step or more."""
    block = getattr(state, "block", 32)
    return block - (PROMPT + WARM) % block + 1


def storages(part: Any, path: str = "") -> dict[str, int]:
    """Return the storage of each tensor on the device by its path in the state."""
    found: dict[str, int] = {}
    for name, value in vars(part).items():
        if isinstance(value, Memory):
            found |= storages(value, f"{path}{name}.")
        elif isinstance(value, FakeTensor) and name not in PUBLIC:
            found[path + name] = value.untyped_storage()._cdata
    return found


@dataclass(frozen=True)
class Decoded:
    """Hold what made the host wait while a state decoded past the end of a block, or "", and the tensors that moved."""

    waits: str
    moved: set[str]


def decoded(text: str) -> Decoded:
    """Decode tokens on the fake device, past the end of a block."""
    device = FakeDevice()
    state = moved(filled(text), device)
    try:
        stepped(state, device, 1)  # which allocates what a first step needs
        before = storages(state)
        held = copy.copy(vars(state)), copy.copy(vars(state.slots))  # so that no freed address is taken again
        stepped(state, device, past_a_block_end(state))
    except HostWaits as found:
        return Decoded(str(found), set())
    after = storages(state)
    assert before.keys() == after.keys() and len(before) >= 3 and held
    return Decoded("", {path for path, storage in before.items() if after[path] != storage})


once = cache(decoded)


def stepped(state: State, device: FakeDevice, steps: int) -> None:
    """Decode tokens with a state that `moved` put on the fake device."""
    rows = state.spec.rows
    with device:
        q, k, v = (torch.empty(*shape, D, device=DEVICE) for shape in ((rows, G, 1), (rows, 1), (rows, 1)))
        for _ in range(steps):
            assert state.step(q, k, v).device == torch.device(DEVICE)
