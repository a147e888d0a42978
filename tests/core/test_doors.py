"""What a state's doors refuse: a table of bad inputs at every door, each a typed error that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfloor import Spec, State, parse
from tests.support import between, fitting, seeded

Make = Callable[[Tensor], Any]

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # torch's, of layouts that are in beta or on their way out

METHODS = (
    "exact",
    "h2o@32",
    "snapkv(window=4)@32",
    "window+taylor@32",
    "exact|hip(k=8,key_block=2)",
    "quant(group=8)",
    "subgen_sketch(s=8)",
    "balance@64",
    "window_sample@32",
    "tensor",
)


def nested(x: Tensor, layout: torch.layout = torch.strided) -> Tensor:
    return torch.nested.nested_tensor([row[..., : 2 + i, :] for i, row in enumerate(x)], layout=layout)


def with_entry(x: Tensor, entry: float) -> Tensor:
    x = x.clone()
    x.view(-1)[-1] = entry
    return x


NO_TENSORS: dict[str, Make] = {
    "None": lambda x: None,
    "a number": lambda x: 3,
    "a fraction": lambda x: 0.5,
    "True": lambda x: True,
    "text": lambda x: "k",
    "bytes": lambda x: b"k",
    "a list": lambda x: x.tolist(),
    "a tuple of tensors": lambda x: tuple(x),
    "a dict": lambda x: {"k": x},
    "an array": lambda x: x.numpy(),
    "an array of objects": lambda x: np.array([x, None], dtype=object),
    "a shape": lambda x: x.shape,
    "a dtype": lambda x: x.dtype,
    "a class": lambda x: Tensor,
    "a function": lambda x: lambda: x,
    "a parameter without data": lambda x: torch.nn.UninitializedParameter(),
    "a buffer without data": lambda x: torch.nn.parameter.UninitializedBuffer(),
    "a storage": lambda x: x.untyped_storage(),
}
NOT_DENSE: dict[str, Make] = {
    "a sparse tensor": lambda x: x.to_sparse(),
    "a sparse tensor of rows": lambda x: x.to_sparse(x.ndim - 1),
    "a compressed sparse tensor": lambda x: x.reshape(-1, x.shape[-1]).to_sparse_csr(),
    "a tensor without data": lambda x: x.to("meta"),
    "a nested tensor": nested,
    "a jagged nested tensor": lambda x: nested(x, torch.jagged) if x.ndim == 3 else nested(x),
    "a nested tensor of equal parts": lambda x: torch.nested.as_nested_tensor(x),
    "a quantized tensor": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    "a tensor of another library's layout": lambda x: x.float().to_mkldnn(),
}
WRONG_TENSORS: dict[str, Make] = {
    "no axis": lambda x: torch.tensor(1.0),
    "one axis": lambda x: x.flatten(),
    "an axis less": lambda x: x[0],
    "an axis more": lambda x: x.unsqueeze(0),
    "an axis more in the middle": lambda x: x.unsqueeze(1),
    "six axes": lambda x: x[(None,) * (6 - x.ndim)],
    "no rows": lambda x: x[:0],
    "too few rows": lambda x: x[1:],
    "too many rows": lambda x: torch.cat([x, x]),
    "one row spread over all": lambda x: x[:1].expand(7, *x.shape[1:]),
    "no width": lambda x: x[..., :0],
    "another width": lambda x: x[..., 1:],
    "a doubled width": lambda x: torch.cat([x, x], -1),
    "rows and width exchanged": lambda x: x.transpose(0, -1),
    "double precision": lambda x: x.double(),
    "half precision": lambda x: x.half(),
    "brain floats": lambda x: x.bfloat16(),
    "eight-bit floats": lambda x: x.to(torch.float8_e4m3fn),
    "whole numbers": lambda x: x.long(),
    "small whole numbers": lambda x: x.to(torch.int8),
    "bytes as numbers": lambda x: x.to(torch.uint8),
    "truth values": lambda x: x > 0,
    "complex numbers": lambda x: x.to(torch.complex64),
    "conjugated numbers": lambda x: x.to(torch.complex64).conj(),
}
NOT_FINITE: dict[str, Make] = {
    "NaN": lambda x: with_entry(x, torch.nan),
    "infinity": lambda x: with_entry(x, torch.inf),
    "minus infinity": lambda x: with_entry(x, -torch.inf),
    "NaN everywhere": lambda x: torch.full_like(x, torch.nan),
    "both infinities": lambda x: with_entry(with_entry(x, torch.inf).flip(-1), -torch.inf),
    "NaN seen through a stride": lambda x: with_entry(x, torch.nan).transpose(1, -1).contiguous().transpose(1, -1),
}
OTHER_LENGTHS: dict[str, Make] = {
    "a token less": lambda x: x[..., 1:, :],
    "a token more": lambda x: torch.cat([x, x[..., :1, :]], -2),
    "no token": lambda x: x[..., :0, :],
}
BAD_PRESENT: dict[str, Make] = {name: make for name, make in NO_TENSORS.items() if name != "None"} | {
    "a sparse mask": lambda p: p.to_sparse(),
    "a mask without data": lambda p: p.to("meta"),
    "a nested mask": lambda p: torch.nested.as_nested_tensor(p),
    "a jagged nested mask": lambda p: torch.nested.nested_tensor([p[0], p[1, 1:]], layout=torch.jagged),
    "numbers": lambda p: p.long(),
    "fractions": lambda p: p.float(),
    "a mask of one axis": lambda p: p[0],
    "a mask of three axes": lambda p: p.unsqueeze(-1),
    "a mask of too few rows": lambda p: p[1:],
    "a mask of too few tokens": lambda p: p[:, 1:],
    "a mask of no tokens": lambda p: p[:, :0],
    "a mask on its side": lambda p: p.T,
}
BAD_INDEX: dict[str, Any] = {
    "None": None,
    "text": "0",
    "bytes": b"0",
    "a fraction": 0.5,
    "a number": 1,
    "True": True,
    "a dict": {0: 1},
    "a set": {0, 1},
    "nothing": [],
    "no rows": torch.zeros(0, dtype=torch.int64),
    "fractions": [0.0, 1.0],
    "truth values": [True, False],
    "a mask": torch.ones(2, dtype=torch.bool),
    "bytes as numbers": torch.ones(2, dtype=torch.uint8),
    "small numbers": torch.ones(2, dtype=torch.int8),
    "a matrix": [[0], [1]],
    "ragged lists": [[0], [1, 0]],
    "None in a list": [0, None],
    "text in a list": ["0"],
    "a row too high": [0, 2],
    "a row below 0": [-1],
    "a number that no tensor holds": [2**70],
    "no axis": torch.tensor(0),
    "an array of objects": np.array([0, None], dtype=object),
    "a sparse tensor": torch.tensor([0, 1]).to_sparse(),
    "a tensor without data": torch.zeros(2, dtype=torch.int64, device="meta"),
    "complex numbers": torch.zeros(2, dtype=torch.complex64),
    "a nested tensor": torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)], layout=torch.jagged),
    "a parameter without data": torch.nn.UninitializedParameter(),
}


def opened(text: str) -> tuple[State, Tensor, Tensor, Tensor]:
    """A state in the middle of a block, and q, k, v of the next 3 tokens."""
    state = parse(text).open(Spec(rows=2, d=4, dv=3, seed=1))
    tokens = fitting(seeded(0), state, 2, 48)
    state.step(*between(tokens, 0, 45))
    return state, *between(tokens, 45)


def calls(state: State, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every bad input at every door that takes it."""
    bad = NO_TENSORS | NOT_DENSE | WRONG_TENSORS | NOT_FINITE
    doors: dict[str, Callable[[Any, Any, Any], object]] = {
        "append": lambda q, k, v: state.append(k, v),
        "step": lambda q, k, v: state.step(q, k, v),
        "step_partial": lambda q, k, v: state.step_partial(q, k, v),
        "attend": lambda q, k, v: state.attend(q),
    }
    for tokens in (3, 1):
        one = {"q": q[:, :, :tokens], "k": k[:, :tokens], "v": v[:, :tokens]}
        for door, call in doors.items():
            for name in {"append": "kv", "attend": "q"}.get(door, "qkv"):
                lengths = {} if door == "attend" else OTHER_LENGTHS
                for what, make in (bad | lengths).items():
                    given = one | {name: make(one[name])}
                    yield f"{door} of {tokens} with {name} as {what}", lambda call=call, given=given: call(**given)  # pyright: ignore[reportCallIssue]
    for door in ("step", "step_partial", "attend"):
        given = (q[:, :0],) if door == "attend" else (q[:, :0], k, v)
        yield f"{door} with an empty group", lambda door=door, given=given: getattr(state, door)(*given)
    for what, make in bad.items():
        yield f"read with q as {what}", lambda make=make: state.read(make(q[:, 0]))
    present = torch.tensor([[True, False, True], [True, True, True]])
    for what, make in BAD_PRESENT.items():
        yield f"append with {what}", lambda make=make: state.append(k, v, make(present))
        yield f"step with {what}", lambda make=make: state.step(q, k, v, make(present))
        yield f"step_partial with {what}", lambda make=make: state.step_partial(q, k, v, make(present))
    for what, index in BAD_INDEX.items():
        yield f"select_rows with {what}", lambda index=index: state.select_rows(index)
    for door in ("append", "step", "step_partial", "read", "attend", "select_rows"):
        yield f"{door} of nothing", getattr(state, door)
        yield f"{door} of five", lambda door=door: getattr(state, door)(q, k, v, None, None)
    yield "seal with an argument", lambda: state.seal(3)  # type: ignore[call-arg]


@pytest.mark.parametrize("text", METHODS)
def test_every_bad_input_is_a_typed_error_that_changes_nothing(text: str) -> None:
    state, q, k, v = opened(text)
    before, tried = state.to_bytes(), 0
    for what, call in calls(state, q, k, v):
        try:
            call()
        except (TypeError, ValueError) as error:
            assert str(error).strip() and "INTERNAL ASSERT" not in str(error) and "bug" not in str(error), what
        except Exception as error:
            pytest.fail(f"{text}: {what} raised {type(error).__name__}: {error}")
        else:
            pytest.fail(f"{text}: {what} was accepted")
        assert state.to_bytes() == before, f"{text}: {what} was refused, but the state has changed"
        tried += 1
    assert tried > 800


@pytest.mark.parametrize("text", METHODS)
def test_no_query_and_no_token_are_answered_with_nothing(text: str) -> None:
    state, q, k, v = opened(text)
    before = state.to_bytes()
    assert state.attend(q[:, :, :0]).shape == (2, 2, 0, 3)
    assert state.read(q[:, 0, :0]).mean.shape == (2, 0, 3)
    assert state.step(q[:, :, :0], k[:, :0], v[:, :0]).shape == (2, 2, 0, 3)
    assert state.step(q, k, v, torch.zeros(2, 3, dtype=torch.bool)).abs().sum() == 0
    state.append(k[:, :0], v[:, :0])
    assert state.to_bytes() == before
