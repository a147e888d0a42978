"""`step_partial`: the same means as `step`, and the mass that `read` gives at that moment."""

from __future__ import annotations

import pytest
import torch

from kvfloor import Spec, parse
from tests.support import attention, between, later, opened, seeded, stream

METHODS = ["exact", "window(block=4)@8", "h2o(recent=2,block=4)@8", "sinks(2,block=4)+value_sum@8", "quant(bits=8)"]


@pytest.mark.parametrize("text", METHODS)
def test_means_are_those_of_step_and_masses_those_of_exact_attention(text: str) -> None:
    q, k, v = stream(seeded(0), 3, 2, 13)
    spec = Spec(3, 4, 4, dtype=torch.float64)
    part = parse(text).open(spec).step_partial(q, k, v)
    assert torch.equal(part.mean, parse(text).open(spec).step(q, k, v))
    # Nothing has left before the first block's end.
    expected = attention(q[:, :, :4], k[:, None, :4], v[:, None, :4], hide=later(4))[1]
    torch.testing.assert_close(part.log_mass[:, :, :4], expected, rtol=0.0, atol=0.05 if "quant" in text else 1e-12)


@pytest.mark.parametrize("text", METHODS)
def test_one_call_weighs_as_token_by_token(text: str) -> None:
    q, k, v = stream(seeded(0), 3, 2, 13)
    at_once = opened(text, rows=3).step_partial(q, k, v)
    state = opened(text, rows=3)
    for i in range(q.shape[2]):
        one = state.step_partial(*between((q, k, v), i, i + 1))
        torch.testing.assert_close(at_once.log_mass[:, :, i], one.log_mass[:, :, 0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(at_once.mean[:, :, i], one.mean[:, :, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", METHODS)
def test_absent_tokens_are_answered_with_the_empty_partial(text: str) -> None:
    q, k, v = stream(seeded(0), 3, 2, 13)
    present = torch.arange(13) >= torch.tensor([0, 5, 13]).unsqueeze(1)
    spec = Spec(3, 4, 4, dtype=torch.float64)
    part = parse(text).open(spec).step_partial(q, k, v, present)
    alone = opened(text, row_ids=[1])
    only = alone.step_partial(*(x[1:2] for x in between((q, k, v), 5)))
    torch.testing.assert_close(part.log_mass[1:2, :, 5:], only.log_mass, rtol=1e-12, atol=1e-12)
    for gone in (part.log_mass[1, :, :5], part.log_mass[2]):
        assert bool((gone == -torch.inf).all())
    assert bool((part.mean[2] == 0).all())
    empty = parse(text).open(spec).step_partial(q, k, v, torch.zeros_like(present))
    assert bool((empty.log_mass == -torch.inf).all()) and empty.mean.dtype == torch.float64
