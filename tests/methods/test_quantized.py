"""Quantised storage: an error bound on every number, and bytes that are really that few."""

import pytest
import torch
from torch import Tensor

from kvfloor import Spec, parse
from kvfloor.methods.sketches.quantized import Codes
from tests.support import Draw, filled


def encoded(x: Tensor, bits: int, per_channel: bool) -> tuple[Tensor, Tensor]:
    """x (rows, group, width) -> (decoded, the exact step of each number's channel or token)."""
    rows, group, width = x.shape
    spec = Spec(rows, width, width, dtype=x.dtype)
    codes = Codes(spec, width, bits, group, per_channel)
    codes.write(torch.arange(rows), torch.zeros(rows, dtype=torch.int64), x)
    axis = 1 if per_channel else 2
    spread = x.double().amax(axis, keepdim=True) - x.double().amin(axis, keepdim=True)
    return codes.decode(1, spec), (spread / (2**bits - 1)).expand_as(x)


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
def test_packed_groups_take_their_bits_and_their_scales(draw: Draw, bits: int, d: int, dv: int) -> None:
    group, groups, rows = 16, 9, 2
    spec = Spec(rows, d, dv, dtype=torch.bfloat16)
    state = parse(f"quant(bits={bits},group={group})").open(spec)
    empty = state.nbytes
    n = group * groups
    state.append(draw(rows, n, d, dtype=torch.bfloat16), draw(rows, n, dv, dtype=torch.bfloat16))

    def size(g: int) -> int:
        codes = g * group * (-(-d * bits // 8) + -(-dv * bits // 8))
        scales = g * (2 * d * 2 + group * 2 * 2)
        return rows * (codes + scales)

    assert state.nbytes - empty == size(groups) - size(1)  # one is there at opening; by a quarter: 1 2 3 4 5 7 9
    assert state.held.tolist() == [n, n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_equal_attention_over_the_decoded_tokens(draw: Draw, dtype: torch.dtype) -> None:
    spec = Spec(2, 8, 5, dtype=dtype)
    state = parse("quant(bits=4,group=8)").open(spec)
    k, v, q = draw(2, 20, 8, dtype=dtype), draw(2, 20, 5, dtype=dtype), draw(2, 3, 8, dtype=dtype)
    state.append(k, v)
    k = torch.cat([state.keys.decode(2, spec), k[:, 16:]], 1).double()  # type: ignore[attr-defined]
    v = torch.cat([state.values.decode(2, spec), v[:, 16:]], 1).double()  # type: ignore[attr-defined]
    wanted = torch.softmax(q.double() @ k.transpose(1, 2), -1) @ v
    torch.testing.assert_close(state.read(q).mean.double(), wanted, rtol=1e-5, atol=1e-5)


def test_eight_bits_answer_better_than_two(draw: Draw) -> None:
    k, v, q = draw(1, 256, 16), draw(1, 256, 16), draw(1, 8, 16)
    errors = []
    for bits in (8, 4, 2):
        state = filled(f"quant(bits={bits})", k, v, scale=0.25)
        wanted = torch.softmax(q @ k.transpose(1, 2) * 0.25, -1) @ v
        errors.append(float((state.read(q).mean - wanted).norm() / wanted.norm()))
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.03
