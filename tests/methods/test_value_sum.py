"""The unmasked window: evicted tokens keep logit 0, and their sum answers for them without error."""

import pytest
import torch
from torch import Tensor

from kvfloor import Partial, Spec, parse
from tests.support import Draw, filled, opened, stream


def closed_form(q: Tensor, k: Tensor, v: Tensor, inside: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(sum of outside values + sum over inside of e^s v) / (number outside + sum over inside of e^s), and log mass."""
    weight = torch.where(inside, torch.exp(k @ q * scale), 1.0)
    return (weight.unsqueeze(1) * v).sum(0) / weight.sum(), weight.sum().log()


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("window", [1, 5, 40])
def test_every_answer_equals_the_closed_form(draw: Draw, window: int, block: int) -> None:
    n = 64
    q, k, v = stream(draw, 2, 3, n, 6, 4)
    state = opened(f"window(block={block})+value_sum@{window}", 2, 6, 4, scale=0.7)
    out = state.step(q, k, v)
    for i in range(n):
        left = max(0, i // block * block - window)  # what had left when token i was answered
        inside = torch.arange(i + 1) >= left
        for row in range(2):
            for j in range(3):
                wanted, _ = closed_form(q[row, j, i], k[row, : i + 1], v[row, : i + 1], inside, 0.7)
                assert float((out[row, j, i] - wanted).abs().max()) <= 1e-12


def test_the_mass_of_a_read_counts_the_evicted_at_one_each(draw: Draw) -> None:
    q, k, v = draw(1, 2, 4), draw(1, 50, 4), draw(1, 50, 4)
    state = filled("window(block=1)+value_sum@10", k, v)
    part = state.read(q)
    for j in range(2):
        mean, log_mass = closed_form(q[0, j], k[0], v[0], torch.arange(50) >= 40, 1.0)
        assert float((part.mean[0, j] - mean).abs().max()) <= 1e-12
        assert float((part.log_mass[0, j] - log_mass).abs()) <= 1e-12


def test_the_law_holds_for_whatever_the_policy_evicts(draw: Draw) -> None:
    q, k, v = draw(1, 2, 4), draw(1, 64, 4), draw(1, 64, 4)
    state = filled("random(block=8)+value_sum@16", k, v)
    inside = torch.zeros(64, dtype=torch.bool)
    inside[state.slots.view().position[0]] = True  # type: ignore[attr-defined]
    wanted, _ = closed_form(q[0, 0], k[0], v[0], inside, 1.0)
    assert float((state.read(q).mean[0, 0] - wanted).abs().max()) <= 1e-12


@pytest.mark.parametrize("start", [2**24 - 1, 2**31 - 1, 2**53 - 8])
def test_counts_beyond_float_precision_go_on_counting(start: int) -> None:
    """The state of a very long stream is injected; a float32 count would stall at 2**24."""
    state = parse("window(block=1)+value_sum@1").open(Spec(1, 2, 2, dtype=torch.bfloat16))
    ones = torch.ones(1, 6, 2, dtype=torch.bfloat16)
    state.append(ones[:, :1], ones[:, :1])
    summary = state.summary  # type: ignore[attr-defined]
    summary.count += start
    summary.total += float(start)
    state.append(ones[:, 1:], ones[:, 1:])
    assert int(summary.count) == start + 5
    assert float(summary.total[0, 0]) == start + 5
    part = state.read(torch.zeros(1, 1, 2, dtype=torch.bfloat16))
    assert bool((part.mean == 1).all())


def test_the_sum_of_equal_small_values_keeps_its_precision() -> None:
    state = parse("window+value_sum@8").open(Spec(1, 1, 1, dtype=torch.float32))
    values = torch.full((1, 100_000, 1), 0.1)
    state.append(torch.zeros_like(values), values)
    total = state.summary.total.item()  # type: ignore[attr-defined]
    assert total == pytest.approx(float(values[0, 0, 0].double()) * (100_000 - 8), rel=1e-12)


def test_value_sums_merge_like_any_partial(draw: Draw) -> None:
    """Two halves of a stream, held apart and merged, answer as the whole would."""
    k, v, q = draw(1, 40, 4), draw(1, 40, 4), draw(1, 2, 4)
    spec = Spec(1, 4, 4, dtype=torch.float64)
    parts: list[Partial] = []
    for half in (slice(0, 20), slice(20, 40)):
        state = parse("window(block=1)+value_sum@5").open(spec)
        state.append(k[:, half], v[:, half])
        parts.append(state.read(q))
    inside = torch.arange(40) % 20 >= 15
    wanted, _ = closed_form(q[0, 1], k[0], v[0], inside, 1.0)
    assert float((parts[0].merge(parts[1]).mean[0, 1] - wanted).abs().max()) <= 1e-12
