"""Quantised storage: an error bound on every number, and bytes that are really that few."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.methods.stores.codes import SlotCodes
from kvfloor.methods.stores.kivi import RangedChannels, RangedTokens
from tests.support import Draw, filled


def read_back(codes: SlotCodes, x: Tensor) -> Tensor:
    """Code x (rows, group, width) as the first group of each row; return the numbers that come back."""
    rows, group, _ = x.shape
    wide, first = x.to(codes.spec.compute_dtype), torch.zeros(rows, dtype=torch.int64)
    entries = codes.encode(torch.arange(rows), first, wide, torch.ones(rows, group, dtype=torch.bool))
    return codes.decode(entries, None, None)


def encoded(x: Tensor, bits: int, per_channel: bool) -> tuple[Tensor, Tensor]:
    """x (rows, group, width) -> (decoded, the exact step of each number's channel or token)."""
    rows, group, width = x.shape
    spec = Spec(rows, width, width, dtype=x.dtype)
    places = rows * group
    codes = RangedChannels(spec, width, bits, places, group) if per_channel else RangedTokens(spec, width, bits, places)
    decoded = read_back(codes, x)
    assert torch.equal(decoded.to(x.dtype).to(decoded.dtype), decoded)
    axis = 1 if per_channel else 2
    spread = x.double().amax(axis, keepdim=True) - x.double().amin(axis, keepdim=True)
    return decoded.to(x.dtype), (spread / (2**bits - 1)).expand_as(x)


def stated(x: Tensor, bits: int, per_channel: bool) -> Tensor:
    """Compute, number by number, what x (rows, group, width) comes back as: offset and step have the dtype of x."""
    axis, wide = 1 if per_channel else 2, torch.float64 if x.dtype == torch.float64 else torch.float32
    x, dtype = x.to(wide), x.dtype
    low = x.amin(axis, keepdim=True).to(dtype).to(wide)
    step = ((x.amax(axis, keepdim=True) - low) / (2**bits - 1)).to(dtype).to(wide)
    code = torch.where(step > 0, (x - low) / step, 0).round().clamp(0, 2**bits - 1)
    return torch.addcmul(low, code, step).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("per_channel", [True, False])
def test_numbers_come_back_with_the_bits_of_the_stated_law(
    draw: Draw, dtype: torch.dtype, bits: int, per_channel: bool
) -> None:
    x = (draw(3, 32, 17, scale=4.0) + 3).to(dtype)
    decoded, _ = encoded(x, bits, per_channel)
    assert torch.equal(decoded, stated(x, bits, per_channel))
    assert not torch.equal(decoded, stated(x, bits, not per_channel))


# Offset and step are rounded to the cache's dtype, and so is the result: relative to the numbers' own size.
@pytest.mark.parametrize(
    ("dtype", "epsilon"),
    [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)],
)
@pytest.mark.parametrize(("bits", "per_channel", "width"), [(8, True, 1), (4, False, 5), (2, True, 64), (2, False, 1)])
def test_a_number_errs_by_half_a_step_and_rounding(
    draw: Draw, dtype: torch.dtype, epsilon: float, bits: int, per_channel: bool, width: int
) -> None:
    x = draw(3, 32, width, dtype=dtype, scale=4.0)
    x[..., 0] += 20
    decoded, step = encoded(x, bits, per_channel)
    spread = step * (2**bits - 1)
    size = x.double().abs().amax()
    bound = step / 2 + epsilon * (2 * size + spread)
    assert decoded.dtype == dtype
    assert bool(((decoded.double() - x.double()).abs() <= bound).all())


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_ends_of_a_range_come_back_exactly(bits: int) -> None:
    x = torch.tensor([[[-1.0], [0.3], [2.0], [0.9]]])
    decoded, _ = encoded(x, bits, per_channel=True)
    assert decoded[0, 0, 0] == -1.0 and decoded[0, 2, 0] == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize("constant", [0.0, 1.0, -7.25, 1e30])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_constant_channel_is_kept_exactly(constant: float, per_channel: bool) -> None:
    decoded, _ = encoded(torch.full((1, 8, 3), constant), 4, per_channel)
    assert bool((decoded == constant).all())


def test_a_spread_below_the_smallest_step_stays_finite() -> None:
    x = torch.tensor([[[1e-7], [2e-7]]], dtype=torch.float16)
    decoded, _ = encoded(x, 8, per_channel=True)
    assert bool(torch.isfinite(decoded).all()) and float((decoded - x).abs().max()) <= 1.3e-7


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (5, 7)])
def test_tokens_take_their_bits_and_their_ranges(draw: Draw, bits: int, d: int, dv: int) -> None:
    group, n, rows = 16, 200, 2
    state = parse(f"quant(bits={bits},group={group})").open(Spec(rows, d, dv, dtype=torch.bfloat16))
    state.append(draw(rows, n, d, dtype=torch.bfloat16), draw(rows, n, dv, dtype=torch.bfloat16))
    slots = state.slots
    assert state.held.tolist() == [n, n] and slots is not None
    by_token, by_group = -(-d * bits // 8) + -(-dv * bits // 8) + 2 * 2, 2 * d * 2
    assert slots.token_bytes == by_token + by_group / group
    capacity = int(slots.capacity[0])
    assert n <= capacity <= 1.25 * n + 1
    codes, fresh = capacity * by_token + n // group * by_group, 2 * group * (d + dv)
    slack = (1.25 * capacity - n) / group * by_group + 200  # ranges of groups to come, counts and flags
    assert rows * (codes + fresh) <= state.nbytes <= rows * (codes + fresh + slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_equal_attention_over_the_stated_numbers(draw: Draw, dtype: torch.dtype) -> None:
    spec = Spec(2, 8, 5, dtype=dtype)
    state = parse("quant(bits=4,group=8)").open(spec)
    k, v, q = draw(2, 20, 8, dtype=dtype), draw(2, 20, 5, dtype=dtype), draw(2, 3, 8, dtype=dtype)
    state.append(k, v)
    for start in (0, 8):
        k[:, start : start + 8] = stated(k[:, start : start + 8], 4, True)
        v[:, start : start + 8] = stated(v[:, start : start + 8], 4, False)
    wanted = torch.softmax(q.double() @ k.double().transpose(1, 2), -1) @ v.double()
    torch.testing.assert_close(state.read(q).mean.double(), wanted, rtol=1e-5, atol=1e-5)


def test_it_is_exact_with_the_store_of_its_bits(draw: Draw) -> None:
    tokens = [draw(1, 2, 100, 16), draw(1, 100, 16), draw(1, 100, 16)]
    spec = Spec(1, 16, 16, scale=0.25, dtype=torch.float64)
    quant, exact = (parse(text).open(spec) for text in ("quant(bits=2,group=16)", "exact:kivi2(group=16)"))
    assert type(quant) is type(exact)
    assert torch.equal(quant.step(*tokens), exact.step(*tokens))
    assert quant.nbytes == exact.nbytes
    assert str(quant.method) == "quant(bits=2,group=16)"
    q, again = tokens[0][:, 0], quant.method.from_bytes(quant.to_bytes())
    assert torch.equal(again.read(q).mean, quant.read(q).mean)


def test_a_token_may_be_dropped_and_the_others_keep_their_numbers(draw: Draw) -> None:
    k = draw(1, 40, 8)
    state = filled("quant(bits=4,group=16)", k, k)
    slots: Any = state.slots
    before = slots.view().v[0]
    state.forget(torch.tensor([0, 0]), torch.tensor([3, 35]))
    view = state.slots.view()  # type: ignore[union-attr]
    kept = view.position[0]
    assert sorted(kept.tolist()) == [i for i in range(40) if i not in (3, 35)]
    assert torch.equal(view.v[0], before[kept])
    assert state.method.from_bytes(state.to_bytes()).held.tolist() == [38]


def test_eight_bits_answer_better_than_two(draw: Draw) -> None:
    k, v, q = draw(1, 256, 16), draw(1, 256, 16), draw(1, 8, 16)
    errors = []
    for bits in (8, 4, 2):
        state = filled(f"quant(bits={bits})", k, v, scale=0.25)
        wanted = torch.softmax(q @ k.transpose(1, 2) * 0.25, -1) @ v
        errors.append(float((state.read(q).mean - wanted).norm() / wanted.norm()))
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.03
