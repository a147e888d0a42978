"""Levels and bits against numbers by hand and against the worst answers that eta allows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors
from kvfloor.floors.measured import Demand
from kvfloor.floors.measured.levels import grain


def one(weight: float, leak: float, demand: Demand) -> int:
    return int(demand.levels(torch.tensor([weight], dtype=torch.float64), torch.tensor([leak], dtype=torch.float64)))


@pytest.mark.parametrize(
    ("weight", "leak", "eta", "levels"),
    [
        (1.0, 0.0, 0.3, 4),  # 3 * 0.3 < 1 < 4 * 0.3
        (0.5, 0.1, 0.1, 3),  # 2 * 0.2 < 0.5 < 3 * 0.2
        (1.0, 0.0, 0.25, 4),  # 4 * 0.25 is not below 1
        (0.2, 0.1, 0.1, 1),  # 1 * 0.2 is not below 0.2
        (0.21, 0.1, 0.1, 2),
        (0.0, 0.0, 0.1, 1),
    ],
)
def test_levels_by_hand(weight, leak, eta, levels):
    assert one(weight, leak, Demand(eta, 0.9, 1, torch.float64)) == levels


def test_bits_by_hand():
    demand = Demand(0.25, 0.9, 64, torch.float64)
    bits = demand.bits(torch.tensor([1.0, 0.2]), torch.tensor([0.0, 0.0]))
    assert float(bits[0]) == pytest.approx(0.9 * 64 * 2.0 - 0.4689955935892812)
    assert float(bits[1]) == 0.0
    assert demand.ceiling == pytest.approx(float(bits[0]))


def test_bits_of_a_row_that_fano_cannot_use_are_zero():
    assert Demand(0.6, 0.3, 1, torch.float64).bits(torch.ones(1), torch.zeros(1)).item() == 0.0
    assert 0.3 * math.log2(2) - floors.H2(0.3) < 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_grain_is_the_largest_rounding_of_a_number_up_to_one(dtype):
    x = torch.linspace(-1.0, 1.0, 200_001, dtype=torch.float64)
    rounded = (x - x.to(dtype).double()).abs().max().item()
    assert rounded <= grain(dtype) and (dtype == torch.float64 or rounded > 0.9 * grain(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_format_bounds_the_levels_of_exact_answers_and_they_stay_apart_in_it(dtype):
    levels = one(1.0, 0.0, Demand(0.0, 0.9, 1, dtype))
    assert levels == {torch.bfloat16: 512, torch.float16: 4096}[dtype]
    stored = (2.0 * torch.arange(levels, dtype=torch.float64) / (levels - 1) - 1.0).to(dtype)
    assert len(stored.unique()) == levels


def test_a_cap_on_the_levels_holds():
    assert one(1.0, 0.0, Demand(0.001, 0.9, 1, most_levels=16)) == 16


@given(st.floats(1e-3, 1.0), st.floats(0.0, 1.0), st.floats(1e-4, 0.9), st.floats(1.0, 3.0))
def test_monotone_in_weight_leak_and_eta(weight, leak, eta, factor):
    here = one(weight, leak, Demand(eta, 0.9, 1))
    assert one(min(1.0, weight * factor), leak, Demand(eta, 0.9, 1)) >= here
    assert one(weight, leak / factor, Demand(eta, 0.9, 1)) >= here
    assert one(weight, leak, Demand(eta / factor, 0.9, 1)) >= here


@given(st.floats(1e-3, 1.0), st.floats(0.0, 1.0), st.floats(1e-3, 0.9))
def test_the_worst_error_decodes_at_this_many_levels_and_not_at_one_more(weight, leak, eta):
    def decodes(levels: int) -> bool:
        return all(
            round(((weight * x + side * (leak + eta)) / weight + 1.0) * (levels - 1) / 2.0) == level
            for side in (-1, 1)
            for level in (0, (levels - 1) // 2, levels - 1)
            for x in (2.0 * level / (levels - 1) - 1.0,)
        )

    levels = one(weight, leak, Demand(eta, 0.9, 1, torch.float64))
    assert levels == 1 or decodes(levels)
    room = (levels * (eta + leak) - weight) / weight
    assert room < 1e-6 or not decodes(levels + 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eta": 1.0}, r"eta must lie in \[0, 1\), got 1.0"),
        ({"eta": -0.1}, r"eta must lie in \[0, 1\), got -0.1"),
        ({"p": 0.0}, r"p must lie in \(0, 1\], got 0.0"),
        ({"dv": 0}, "dv must be a whole number >= 1, got 0"),
        ({"dtype": torch.int8}, "dtype must be a floating-point torch dtype, got torch.int8"),
        ({"most_levels": 1}, "most_levels must be a whole number >= 2, got 1"),
    ],
)
def test_refusals_name_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        Demand(**({"eta": 0.1, "p": 0.9, "dv": 4} | changed))
