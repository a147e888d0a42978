"""What the state's base class does for every variant: checking, packing pads away, clocks, and travelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from kvfloor import CorruptState, Method, Partial, Spec, State, Traits, parse
from tests.support import Draw, between, close, fed, filled, opened, stream

MIXED = "window+value_sum|zeta(k=3,window=2)@12"  # a policy, a summary and a selector at once


@dataclass(frozen=True)
class Newest(Method):
    """A third party's smallest method: the newest token answers, through the base's token-by-token step."""

    name: ClassVar[str] = "newest"

    @property
    def traits(self) -> Traits:
        return Traits()

    def open(self, spec: Spec) -> NewestState:
        return NewestState(self, spec)

    def capacity(self, n: int, prompt: int | None = None, pinned: int = 0) -> int | None:
        return min(n, 1)


class NewestState(State):
    def __init__(self, method: Method, spec: Spec) -> None:
        super().__init__(method, spec)
        self.v = torch.zeros(spec.rows, spec.dv, dtype=spec.dtype)

    def _append(self, k: Tensor, v: Tensor, take: Tensor) -> None:
        last = (take - 1).clamp_min(0).view(-1, 1, 1).expand(-1, 1, v.shape[-1])
        self.v = torch.where((take > 0).unsqueeze(1), v.gather(1, last)[:, 0], self.v)
        self.seen = self.seen + take

    def _read(self, q: Tensor) -> Partial:
        mean = self.v.unsqueeze(1).expand(-1, q.shape[1], -1) + 0 * q.sum(-1, keepdim=True)
        return Partial(mean, torch.zeros(q.shape[:2], dtype=self.v.dtype))


def test_the_default_step_goes_token_by_token(draw: Draw) -> None:
    q, k, v = stream(draw, 2, 3, 5, 4, 2)
    out = Newest().open(Spec(2, 4, 2, dtype=torch.float64)).step(q, k, v)
    assert torch.equal(out, v.unsqueeze(1).expand(-1, 3, -1, -1))


@pytest.mark.parametrize("method", [Newest(), parse(MIXED)], ids=["newest", MIXED])
def test_pads_full_of_nan_change_nothing_and_are_answered_with_zero(draw: Draw, method: Method) -> None:
    rows, t = 3, 20
    present = torch.arange(t) >= torch.tensor([0, 13, 20]).unsqueeze(1)  # left-padded; the last row is all pads
    q, k, v = stream(draw, rows, 2, t)
    pad = ~present.unsqueeze(-1)
    spec = Spec(rows, 4, 4, dtype=torch.float64)
    clean, dirty = method.open(spec), method.open(spec)
    wanted = clean.step(q, k, v, present)
    out = dirty.step(*(x.masked_fill(p, torch.nan) for x, p in ((q, pad.unsqueeze(1)), (k, pad), (v, pad))), present)
    assert torch.equal(out, wanted)
    assert bool((out.masked_select(pad.unsqueeze(1)) == 0).all())
    assert dirty.to_bytes() == clean.to_bytes()
    assert dirty.seen.tolist() == [20, 7, 0]


@pytest.mark.parametrize("cut", [1, 45])
def test_a_restored_state_goes_on_to_the_bit(draw: Draw, cut: int) -> None:
    tokens = stream(draw, 2, 2, 60, dtype=torch.bfloat16)
    state = opened(MIXED, rows=2, dtype=torch.bfloat16)
    state.step(*between(tokens, 0, cut))
    again = state.method.from_bytes(state.to_bytes())
    assert torch.equal(state.step(*between(tokens, cut)), again.step(*between(tokens, cut)))
    assert state.to_bytes() == again.to_bytes()


def test_a_message_of_another_method_is_refused_by_both_names() -> None:
    sent = parse(MIXED).open(Spec(1, 4, 4)).to_bytes()
    with pytest.raises(CorruptState, match="not of 'sinks@99'"):
        parse("sinks@99").from_bytes(sent)


def test_selected_rows_go_on_as_they_would_have(draw: Draw) -> None:
    tokens = stream(draw, 3, 1, 40)
    whole, chosen = opened(MIXED, rows=3), opened(MIXED, rows=3)
    for state in (whole, chosen):
        state.step(*between(tokens, 0, 23))
    index = torch.tensor([2, 0, 2])
    chosen.select_rows(index)
    assert chosen.spec.row_ids == (2, 0, 2)
    rest = between(tokens, 23)
    close(chosen.step(*(x[index] for x in rest)), whole.step(*rest)[index])


@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_exact_answers_do_not_depend_on_the_cuts(draw: Draw, chunk: int) -> None:
    tokens = stream(draw, 1, 2, 700)
    close(fed(opened("exact"), tokens, *range(0, 700, chunk)), opened("exact").step(*tokens))


def test_top_k_reads_ties_at_the_last_place_all() -> None:
    k = torch.tensor([[[2.0], [1.0], [1.0], [0.0]]])
    v = torch.tensor([[[1.0], [2.0], [4.0], [100.0]]])
    state = filled("exact|top_k(k=2)", k, v)
    e = torch.exp(torch.tensor([2.0, 1.0, 1.0]))
    wanted = (e * torch.tensor([1.0, 2.0, 4.0])).sum() / e.sum()
    assert state.read(torch.ones(1, 1, 1)).mean.item() == pytest.approx(float(wanted))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 0),
        ("d", -1),
        ("dv", 1.5),
        ("rows", True),
        ("scale", float("nan")),
        ("softcap", 0.0),
        ("dtype", torch.int8),
        ("seed", 0.5),
    ],
)
def test_a_spec_out_of_its_domain_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"Spec.{field}"):
        Spec(**({"rows": 1, "d": 1, "dv": 1} | {field: value}))  # type: ignore[arg-type]


def test_a_spec_travels_as_json() -> None:
    import json

    spec = Spec(2, 3, 4, scale=0.1, softcap=30.0, dtype=torch.bfloat16, seed=2**60, row_ids=[5, 2**61])
    assert Spec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_finite_numbers_whose_sum_is_not_are_taken_and_infinite_ones_are_not(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    v = torch.full((1, 9, 4), largest, dtype=dtype)
    state = filled("exact", torch.zeros(1, 9, 4, dtype=dtype), v)
    assert state.held.tolist() == [9]
    for bad in (torch.inf, -torch.inf, torch.nan):
        broken = v.clone()
        broken[0, 5, 2] = bad
        broken[0, 6, 2] = -bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            state.append(torch.zeros(1, 9, 4, dtype=dtype), broken)


@pytest.mark.parametrize(
    "present", [[[True] * 3] * 2, torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
)
def test_what_marks_no_tokens_is_refused(draw: Draw, present: object) -> None:
    state = opened(MIXED, rows=2)
    with pytest.raises(ValueError, match="present must be a bool tensor"):
        state.append(draw(2, 3, 4), draw(2, 3, 4), present)  # type: ignore[arg-type]
