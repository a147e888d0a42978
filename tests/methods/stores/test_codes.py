"""Codes of tokens err as their levels do, whatever the vector was; codes of channels err by half a step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvfloor import Spec
from kvfloor.methods.stores import codes as codes_module
from kvfloor.methods.stores.codes import ChannelCodes, SlotCodes, TokenCodes
from kvfloor.methods.stores.levels import error
from kvfloor.methods.stores.turn import turned
from tests.support import Draw, require_mean

SCALE_ERROR = 2**-8
"""Largest relative rounding error of a coded length, which has 16 bits."""


def coded(codes: SlotCodes, x: Tensor, real: Tensor | None = None, turn: bool = False) -> Tensor:
    """Code x (rows, t, w) as the first group of every row, and return what is read back."""
    rows, t = x.shape[:2]
    group = torch.zeros(rows, dtype=torch.int64)
    real = torch.ones(t, dtype=torch.bool) if real is None else real
    entries = codes.encode(torch.arange(rows), group, x, real)
    return codes.decode(entries, None, group.unsqueeze(1).expand(-1, t), turn)


def by_token(bits: int, width: int, unbiased: bool, dtype: torch.dtype = torch.float64, rows: int = 1) -> TokenCodes:
    return TokenCodes(Spec(rows, width, width, dtype=dtype), width, bits, 8, centred=False, unbiased=unbiased)


def by_channel(bits: int, width: int, rows: int = 1, dtype: torch.dtype = torch.float64) -> ChannelCodes:
    return ChannelCodes(Spec(rows, width, width, dtype=dtype), width, bits, 8, 32)


def relative(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared error of y relative to the vectors x (..., w)."""
    size = x.abs().amax(-1, keepdim=True)  # a square may be too large or too small for the dtype
    return ((y.double() - x.double()) / size).square().sum(-1) / (x.double() / size).square().sum(-1)


# ---- tokens, each by itself ------------------------------------------------------------------------------------------


def require_stated_error(errors: Tensor, wanted: float) -> None:
    """Require that the mean of the errors (n,) is `wanted` up to 4.5 standard errors.

    `wanted` is for lengths that are kept as they are (s = |x|). The least error lies below it, by up to D^2 on average
    for wide vectors, and by a few hundredths more where a vector's own levels happen to be long or short. The rounding
    of lengths adds to it.
    """
    sigma, mean = float(errors.std()) / math.sqrt(len(errors)), float(errors.mean())
    assert 0.95 * wanted - wanted**2 - 4.5 * sigma <= mean <= wanted + 4.5 * sigma + SCALE_ERROR**2 / 3


@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_random_vectors_err_as_the_levels_do(draw: Draw, bits: int, width: int) -> None:
    x = draw(1, 3000, width)
    errors = relative(x, coded(by_token(bits, width, unbiased=False), x))[0]
    require_stated_error(errors, error(bits, width))


def test_the_error_of_one_bit_less_is_told_from_it(draw: Draw) -> None:
    x = draw(1, 3000, 64)
    errors = relative(x, coded(by_token(3, 64, unbiased=False), x))[0]
    with pytest.raises(AssertionError):
        require_stated_error(errors, error(4, 64))
    with pytest.raises(AssertionError):
        require_stated_error(errors, error(2, 64))


@pytest.mark.parametrize("bits", [2, 4])
def test_the_unbiased_length_errs_orthogonally_and_the_least_error_does_not(draw: Draw, bits: int) -> None:
    """The direction of x is random, as the rotation is fixed."""
    x = draw(1, 4000, 64)
    along, errors = {}, {}
    for unbiased in (True, False):
        y = coded(by_token(bits, 64, unbiased), x)
        along[unbiased] = (((y - x) * x).sum(-1) / x.square().sum(-1))[0]
        errors[unbiased] = relative(x, y)[0]
    # A coded length is rounded to 8 binary digits, to nearest: its error is small, and zero on average.
    assert float(along[True].abs().max()) <= SCALE_ERROR
    require_mean(along[True], 0.0)
    with pytest.raises(AssertionError):
        require_mean(along[False], 0.0)
    require_mean(along[False], -errors[False].mean())  # the least squared error is what the projection leaves
    assert bool((errors[False] <= errors[True] + 4 * SCALE_ERROR**2).all())
    wanted = error(bits, 64)
    assert float(errors[True].mean()) == pytest.approx(wanted / (1 - wanted), rel=0.05)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_zero_vector_comes_back_as_zero(dtype: torch.dtype, unbiased: bool) -> None:
    codes = by_token(4, 64, unbiased, dtype)
    x = torch.zeros(1, 3, 64, dtype=codes.spec.compute_dtype)
    x[0, 1, 5] = 1.0
    y = coded(codes, x)
    assert not bool(y[0, [0, 2]].any()) and bool(y[0, 1].any())


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("size", [1e-30, 1e-15, 1.0, 1e15, 1e30, 1e35])
def test_the_size_of_a_vector_does_not_matter(draw: Draw, size: float, unbiased: bool) -> None:
    """The square of such a number has no place in float32."""
    x = draw(1, 50, 64, dtype=torch.float32)
    wanted = relative(x, coded(by_token(4, 64, unbiased, torch.float32), x))
    found = relative(x * size, coded(by_token(4, 64, unbiased, torch.float32), x * size))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=1e-4)


def adversaries(width: int) -> dict[str, Tensor]:
    """Return vectors (n, width) of kinds that are unlike random ones."""
    at = torch.arange(width, dtype=torch.float64)
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.tensor([[1.0], [37.0], [1000.0], [30001.0]], dtype=torch.float64) * frequency
    hadamard = torch.stack([torch.where(at.long() // 2**i % 2 == 0, 1.0, -1.0) for i in range(width.bit_length() - 1)])
    return {
        "one-hot": torch.eye(width, dtype=torch.float64),
        "two entries": torch.eye(width, dtype=torch.float64) + torch.eye(width, dtype=torch.float64).roll(1, 1),
        "constant": torch.ones(1, width, dtype=torch.float64),
        "alternating": (1 - 2 * (at % 2)).unsqueeze(0),
        "blocks": torch.stack([(at // size % 2 == 0).double() for size in (2, 4, 8, 16, width // 2)]),
        "rows of the transform": hadamard.double(),
        "a ramp": (at + 1).unsqueeze(0),
        "rotated pairs": torch.cat([angle.cos(), angle.sin()], 1),
        "sinusoids": torch.stack([torch.sin(at * f + 0.3) for f in (0.01, 0.1, 0.5, 1.0, 3.0)]),
        "a massive entry": torch.eye(width, dtype=torch.float64)[:4] * 1000 + torch.sin(7 * at + at.square()),
    }


WORST = 2.6
"""Largest error of such a vector, as a multiple of a random vector's; found: 2.45, of one-hot vectors in 3 bits."""


def largest_error(bits: int, width: int) -> float:
    """Return the largest error of the adversaries, as a multiple of a random vector's."""
    x = torch.cat(list(adversaries(width).values())).unsqueeze(0)
    return float(relative(x, coded(by_token(bits, width, unbiased=False), x)).max()) / error(bits, width)


@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_vector_errs_much_more_than_random_ones(bits: int, width: int) -> None:
    assert largest_error(bits, width) < WORST


def test_without_the_rotation_some_would(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("turned", "turned_back"):
        monkeypatch.setattr(codes_module, name, lambda x: x)
    assert largest_error(4, 64) > 5 * WORST


@pytest.mark.parametrize("centred", [False, True])
def test_read_rotated_or_not_is_the_same_vector(draw: Draw, centred: bool) -> None:
    codes = TokenCodes(Spec(2, 20, 20, dtype=torch.float64), 20, 3, 16, centred=centred, unbiased=False)
    x = draw(2, 8, 20) + 3
    plain = coded(codes, x)
    torch.testing.assert_close(coded(codes, x, turn=True), turned(plain), rtol=1e-12, atol=1e-12)


def test_the_centre_is_the_mean_of_the_first_group_and_taken_off_later_ones(draw: Draw) -> None:
    codes = TokenCodes(Spec(2, 16, 16, dtype=torch.float64), 16, 4, 8, centred=True, unbiased=False)
    far = 50 * draw(2, 1, 16)
    x, real = far + draw(2, 8, 16), torch.arange(8) >= 2
    y = coded(codes, x, real)
    torch.testing.assert_close(codes.centre, x[:, 2:].mean(1))
    assert float(relative(x - far, y - far)[:, 2:].mean()) < 0.05  # of what is left without the centre
    before, later = codes.centre.clone(), far + draw(2, 8, 16)
    one = torch.ones(2, dtype=torch.int64)
    entries = codes.encode(torch.arange(2), one, later, torch.ones(8, dtype=torch.bool))
    again = codes.decode(entries, None, one.unsqueeze(1).expand(-1, 8))
    assert torch.equal(codes.centre, before)
    assert float(relative(later - far, again - far).mean()) < 0.05
    plain = coded(by_token(4, 16, unbiased=False, rows=2), later)
    assert float(relative(later - far, plain - far).mean()) > 1.0  # without a centre the same bits are lost on it


@pytest.mark.parametrize("per", ["token", "channel"])
def test_a_tokens_code_depends_on_no_other_row(draw: Draw, per: str) -> None:
    x = draw(3, 32, 20, dtype=torch.float32)

    def read(x: Tensor, rows: int) -> Tensor:
        spec = Spec(rows, 20, 20)
        codes = TokenCodes(spec, 20, 3, 8, True, False) if per == "token" else ChannelCodes(spec, 20, 3, 8, 32)
        return coded(codes, x)

    together = read(x, 3)
    for row in range(3):
        assert torch.equal(read(x[row : row + 1], 1), together[row : row + 1])
    assert torch.equal(read(x.flip(0), 3), together.flip(0))


# ---- channels of a group ---------------------------------------------------------------------------------------------


def half_steps(codes: ChannelCodes, x: Tensor) -> Tensor:
    """Return the largest error of each number of x (rows, t, w): half a step, widened by the ranges' own rounding."""
    low, high = x.amin(1), x.amax(1)
    start = (low.amax(-1, keepdim=True) - low.amin(-1, keepdim=True)) / 255
    end = (high.amax(-1, keepdim=True) - high.amin(-1, keepdim=True)) / 255
    step = (high - low + start + end) / (2**codes.bits - 1)
    return (step / 2).unsqueeze(1).expand_as(x)


def require_within(y: Tensor, x: Tensor, bound: Tensor) -> None:
    rounding = 16 * torch.finfo(x.dtype).eps * x.abs().amax()
    assert bool(((y - x).abs() <= bound + rounding).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("bits", "width", "t"), [(2, 64, 32), (3, 5, 32), (4, 1, 32), (8, 64, 32), (4, 16, 7)])
def test_a_number_errs_by_half_a_step(draw: Draw, bits: int, width: int, t: int, dtype: torch.dtype) -> None:
    x = draw(3, t, width, dtype=dtype, scale=4.0)
    x[..., 0] += 20
    codes = by_channel(bits, width, 3, dtype)
    y = coded(codes, x)
    require_within(y, x, half_steps(codes, x))
    with pytest.raises(AssertionError):
        require_within(y, x, half_steps(codes, x) / 4)


def test_no_number_lies_beyond_its_coded_range(draw: Draw) -> None:
    """The ranges are rounded outwards, so the ends of a channel are not clipped."""
    x = draw(3, 32, 64)
    codes = by_channel(4, 64, 3)
    coded(codes, x)
    start, step = codes._steps(codes.low[:, 0], codes.high[:, 0], codes.range[:, 0])
    end = start + 15 * step
    assert bool((start <= x.amin(1) + 1e-12).all()) and bool((end >= x.amax(1) - 1e-12).all())
    assert bool((start >= x.amin(1) - half_steps(codes, x)[:, 0]).all())


@pytest.mark.parametrize("constant", [0.0, 1.0, -7.25, 1e30, 1e-30])
def test_a_group_of_one_number_is_kept_exactly(constant: float) -> None:
    x = torch.full((2, 32, 8), constant)
    assert torch.equal(coded(by_channel(4, 8, 2, torch.float32), x), x)


def test_a_constant_channel_errs_by_the_ranges_rounding_alone(draw: Draw) -> None:
    x = draw(1, 32, 16)
    x[..., 3] = 0.7
    codes = by_channel(2, 16)
    y = coded(codes, x)
    low, high = x.amin(1), x.amax(1)
    widest = float(max(low.amax() - low.amin(), high.amax() - high.amin()))
    assert float((y[..., 3] - 0.7).abs().max()) <= widest / 255 + 1e-12


@pytest.mark.parametrize("offset", [1e3, -1e3])
def test_a_channel_of_huge_offset_costs_the_others_a_255th_of_it(draw: Draw, offset: float) -> None:
    """KIVI's keys have such channels. All ranges of a group share two steps of 8 bits, which the offset stretches."""
    x = draw(1, 32, 16)
    x[..., 3] += offset
    codes = by_channel(4, 16)
    y = coded(codes, x)
    require_within(y, x, half_steps(codes, x))
    assert float((y - x).abs().amax()) <= (1e3 * 2 + 10) / 255 / 15 / 2 * 1.3 + 0.3


def test_unread_tokens_do_not_widen_the_ranges(draw: Draw) -> None:
    x, real = draw(1, 32, 8), torch.arange(32) >= 4
    wild = x.clone()
    wild[:, :4] = 1e6
    assert torch.equal(coded(by_channel(3, 8), x, real)[:, 4:], coded(by_channel(3, 8), wild, real)[:, 4:])
    assert not torch.equal(coded(by_channel(3, 8), x)[:, 4:], coded(by_channel(3, 8), wild)[:, 4:])


def test_a_group_without_a_token_that_is_read_is_finite(draw: Draw) -> None:
    nothing = torch.zeros(32, dtype=torch.bool)
    assert bool(torch.isfinite(coded(by_channel(4, 8), draw(1, 32, 8), nothing)).all())


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_channels_of_any_size_err_alike(draw: Draw, size: float) -> None:
    x = draw(1, 32, 8, dtype=torch.float32)
    codes = by_channel(4, 8, dtype=torch.float32)
    y = coded(codes, x * size) / size
    require_within(y, x, half_steps(codes, x) * 1.01)


def test_groups_are_kept_apart(draw: Draw) -> None:
    codes, x = by_channel(4, 8, 2), [draw(2, 32, 8) * 10.0**i for i in range(4)]
    every = torch.arange(2)
    parts = [codes.encode(every, torch.full((2,), i), x[i], torch.ones(32, dtype=torch.bool)) for i in range(4)]
    for i, entries in enumerate(parts):
        y = codes.decode(entries, None, torch.full((2, 32), i))
        require_within(y, x[i], half_steps(codes, x[i]))
        one = {name: value[1:] for name, value in entries.items()}
        assert torch.equal(codes.decode(one, torch.tensor([1]), torch.full((1, 32), i)), y[1:])
