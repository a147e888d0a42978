"""Edit a state's exported fields and give the message a valid digest again, as an attacker may do."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from kvfloor import Method, Spec, State
from kvfloor.core import message
from tests.support import between, fed, fitting, seeded

NUMBERS = (-(2**62), -(2**40), -2, -1, 0, 1, 2, 3, 63, 64, 255, 2**31 - 1, 2**40, 2**62, math.nan, math.inf, -math.inf)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


def leaves(fields: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """List the paths of all fields, nested ones included."""
    found: list[tuple[str, ...]] = []
    for name, value in fields.items():
        found.append((*path, name))
        if isinstance(value, dict):
            found += leaves(value, (*path, name))
    return found


def edited_number(value: Any, draw: random.Random) -> Any:
    """Return another number, or an object that is no number."""
    return draw.choice([not value, *NUMBERS, 0.5, None, "text", [value], {}, torch.zeros(3), torch.tensor(1)])


def edited_tensor(x: Tensor, draw: random.Random) -> Any:
    """Return the tensor with some entries, its shape or its dtype changed."""
    kind = draw.choice([0] * 10 + list(range(1, 7)))  # most often an entry: other edits are found by shape alone
    axis = draw.randrange(x.ndim) if x.ndim else 0
    if kind == 0 and x.numel():
        x, flat = x.clone(), torch.tensor(draw.choice(NUMBERS), dtype=torch.float64)
        place = draw.randrange(x.numel())
        old = x.view(-1)[place].double()
        new = draw.choice([flat, old + 1, old - 1, -old, old * 2])
        limit = torch.iinfo(x.dtype) if not (x.is_floating_point() or x.dtype == torch.bool) else None
        if limit is not None:
            new = new.nan_to_num(0.0, limit.max, limit.min).clamp(limit.min, limit.max)
            x.view(-1)[place] = max(limit.min, min(limit.max, int(new)))
        else:
            x.view(-1)[place] = new.to(x.dtype)
        return x
    if kind == 1 and x.numel():
        return x.flatten()[torch.tensor(draw.sample(range(x.numel()), x.numel()))].view(x.shape)
    if kind == 2 and x.ndim:
        return torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)
    if kind == 3 and x.ndim and x.shape[axis]:
        return x.narrow(axis, draw.randrange(2), x.shape[axis] - 1).clone()
    if kind == 4:
        return x.to(draw.choice(DTYPES))
    if kind == 5:
        return draw.choice(
            [x.unsqueeze(-1), x.unsqueeze(0), x.flatten(), x.new_zeros(0), x[..., :0], x.mT if x.ndim > 1 else x]
        )
    return draw.choice([None, 7, {}, {"x": x}, torch.zeros_like(x), torch.ones_like(x)])


def edited(fields: dict[str, Any], draw: random.Random) -> str:
    """Change one field in place, and return its name and new value as text."""
    *parents, name = draw.choice(leaves(fields))
    for parent in parents:
        fields = fields[parent]
    value, kind = fields[name], draw.randrange(25)
    if kind == 0:
        del fields[name]
        return f"{name} deleted"
    if kind == 1:
        fields["unknown"] = value
        return f"{name} there twice"
    if isinstance(value, Tensor):
        new = edited_tensor(value, draw)
    else:
        new = draw.choice([None, 3, torch.zeros(2)]) if isinstance(value, dict) else edited_number(value, draw)
    fields[name] = new
    told = f"{new.dtype} {tuple(new.shape)} {new.flatten()[:12].tolist()}" if isinstance(new, Tensor) else repr(new)
    return f"{'/'.join([*parents, name])} = {told}"


def redigested(state: State, draw: random.Random, edits: int) -> tuple[bytes, list[str]]:
    """Return the state's message with this many edits under a valid digest, and the edits as text."""
    header, fields = message.unpack(state.to_bytes())
    told = [edited(fields, draw) for _ in range(edits)]
    if draw.randrange(10) == 0:
        name = draw.choice(["rows", "d", "dv", "dtype", "seed", "scale", "row_ids", "tied"])
        header["spec"][name] = draw.choice([-1, 0, 1, 2, 4, 2**40, None, "float64", [0, 1], True])
        told.append(f"spec.{name} = {header['spec'][name]!r}")
    return message.pack(header, fields), told


def live_on(state: State, draw: random.Random) -> None:
    """Call every public method of a state; ValueError and TypeError are fine."""
    spec = state.spec
    source = torch.Generator().manual_seed(draw.randrange(1 << 30))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(spec.dtype)

    def tokens(t: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v = normal(spec.rows, t, state.key_width), normal(spec.rows, t, state.value_width)
        return normal(spec.rows, 2, t, spec.d), k, k if spec.tied else v

    def step(t: int) -> None:
        q, k, v = tokens(t)
        state.step(q, k, v)

    def padded() -> None:
        q, k, v = tokens(9)
        state.step_partial(q, k, v, torch.rand(spec.rows, 9, generator=source) < 0.6)

    doors = [
        lambda: state.read(normal(spec.rows, 3, spec.d)),
        lambda: state.attend(normal(spec.rows, 2, 3, spec.d)),
        lambda: step(1),
        padded,
        lambda: step(40),
        state.seal,
        lambda: step(1),
        lambda: step(7),
        lambda: state.append(*tokens(33)[1:]),
        lambda: state.select_rows(torch.tensor([spec.rows - 1, 0])),
        lambda: state.method.from_bytes(state.to_bytes()).read(normal(state.spec.rows, 2, spec.d)),
        state.guarantee,
        lambda: (state.nbytes, state.bytes_read, state.held),
    ]
    for door in doors:
        try:
            door()
        except (ValueError, TypeError):
            continue


def played(method: Method, seed: int, sealed: bool) -> State:
    """Return a state of two rows after 45 and about 30 tokens, in the middle of a block."""
    state = method.open(Spec(rows=2, d=4, dv=3, scale=0.5, seed=seed))
    tokens = fitting(seeded(seed), state, 2, 45)
    present = torch.ones(2, 45, dtype=torch.bool)
    present[1] = torch.rand(45, generator=torch.Generator().manual_seed(seed)) < 0.7
    fed(state, between(tokens, 0, 25), present=present[:, :25])
    if sealed:
        state.seal()
    fed(state, between(tokens, 25), present=present[:, 25:])
    return state
