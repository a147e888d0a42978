"""`space`: numbers by hand, laws over all arguments, refusals by name."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfloor import floors

ROW = 0.9 * 64 - floors.H2(0.9)


def test_the_default_by_hand():
    """Halved and half again as large, fp16 has 26 levels: log2 26 bits a value."""
    floor = floors.space(1024, 64)
    assert floor.constants["levels"] == 26 and floor.constants["values"] == "fp16"
    assert floor.bits == pytest.approx(1024 * (57.6 * math.log2(26) - 0.4689955935892812))
    assert floor.bytes == 34_596
    assert floor.upper_bits == pytest.approx(65_536 * math.log2(26))


def test_single_bits_by_hand():
    floor = floors.space(1024, 64, values="binary")
    assert floor.bits == pytest.approx(1024 * (57.6 - 0.4689955935892812))
    assert floor.bytes == 7313
    assert floor.upper_bits == 65_536
    assert floor.regime == "near-orthogonal"
    assert "Theorem 8" in floor.theorem
    assert floor.constants["eps_s"] == 0.125
    assert floor.constants["tau"] == 0.3125
    assert floor.constants["exact_bytes_fp16"] == 1024 * 128 * 2
    assert floor.constants["exact_bytes_fp32"] == 1024 * 128 * 4


def test_window_hides_one_row_less_than_it_holds():
    floor = floors.space(1024, 64, window=256, values="binary")
    assert floor.bits == pytest.approx(255 * ROW)
    assert floor.upper_bits == 256 * 64
    assert (floor.regime, floor.constants["rows_bound_by"]) == ("sliding window", "W - 1")
    assert floors.space(100, 64, window=256).bits == floors.space(100, 64).bits
    assert floors.space(100, 64, window=1).bits == 0.0
    assert floors.space(100, 64, window=1).regime.startswith("vacuous")


def test_radius_caps_the_rows():
    floor = floors.space(10**6, 64, radius=16, values="binary")
    assert floor.constants["N"] == floor.constants["rows"] == 1920
    assert floor.bits == pytest.approx(1920 * ROW)
    assert floor.regime == "norm-bounded"
    assert floors.space(1000, 64, radius=16, values="binary").bits == floors.space(1000, 64, values="binary").bits
    assert floors.space(10**6, 64, radius=1e-3).constants["rows"] == 1
    assert floors.space(10**6, 64, radius=16, window=100).constants["rows"] == 99


def test_low_dimensions():
    assert floors.space(1000, 2, 16).constants["rows"] == 1000
    assert floors.space(1000, 2, 16).regime == "low-dimensional, unbounded norm"
    assert floors.space(1000, 1, 16).constants["rows"] == 2
    assert floors.space(1, 1, 16).constants["rows"] == 1
    assert floors.space(1000, 1, 16).regime == "line"
    assert floors.space(1000, 1, 16, radius=1e9).constants["rows"] == 2


def test_leak_of_uneven_copies_is_in_the_threshold():
    even, uneven = (floors.space(n, 64, radius=16, values="binary") for n in (2 * 1920, 2 * 1920 + 1))
    assert (even.constants["eps_s"], uneven.constants["eps_s"]) == (0.125, 0.125 * 3 / 2)
    assert uneven.constants["tau"] == floors.tau(0.5, 0.1875)


ARGUMENTS = {
    "n": st.integers(1, 10**6), "d": st.integers(1, 256), "dv": st.integers(1, 256), "eta": st.floats(0.0, 0.99),
    "p": st.floats(0.01, 1.0), "radius": st.none() | st.floats(0.01, 200.0),
    "window": st.none() | st.integers(1, 10**6), "heads": st.integers(1, 64), "layers": st.integers(1, 128),
    "values": st.sampled_from(["fp16", "bf16", "binary"]),
}  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries(ARGUMENTS), st.integers(1, 1000))
def test_monotone_in_every_argument_and_below_what_suffices(given_arguments, more):
    def bits(**changed):
        return floors.space(**(given_arguments | changed)).bits

    here, slack = bits(), 1 + 1e-9
    for name in ("n", "d", "dv", "heads", "layers", "window", "radius"):
        if given_arguments[name] is not None:
            assert bits(**{name: given_arguments[name] + more}) * slack >= here
            if name in ("window", "radius"):
                assert bits(**{name: None}) * slack >= here
    assert bits(p=1.0) * slack >= here
    assert bits(eta=0.0) * slack >= here
    floor = floors.space(**given_arguments)
    assert 0.0 <= floor.bits <= floor.upper_bits * slack
    assert (floor.bits == 0.0) == floor.regime.startswith("vacuous")
    assert floor.bytes * 8 * slack >= floor.bits > 8 * (floor.bytes - 1) - 1e-3 or floor.bytes == 0
    json.dumps(floor.as_dict(), allow_nan=False)


def test_infinite_constants_become_null():
    floor = floors.space(10, 5000, radius=5000.0)
    assert floor.constants["N"] == math.inf
    assert floor.as_dict()["constants"]["N"] is None


def test_the_near_orthogonal_regime_begins_beyond_its_border():
    n = int(math.exp(37.5))
    assert 4.0 * math.log(n) == 150.0
    assert [floors.space(n, d).regime for d in (150, 151)] == ["low-dimensional, unbounded norm", "near-orthogonal"]


@pytest.mark.parametrize(
    ("window", "regime", "bound"),
    [
        (1000, "near-orthogonal", "n"),
        (101, "near-orthogonal", "n"),
        (100, "sliding window", "W - 1"),
        (50, "sliding window", "W - 1"),
    ],
)
def test_a_window_that_never_binds_names_no_window_theorem(window, regime, bound):
    floor = floors.space(100, 64, window=window)
    assert (floor.regime, floor.constants["rows_bound_by"]) == (regime, bound)
    assert ("Theorem 17" in floor.theorem) == (regime == "sliding window")
    norm = floors.space(100, 64, window=window, metric="max", epsilon=0.1)
    assert norm.regime == ("max norm, sliding window" if bound == "W - 1" else "max norm")
    bounded = floors.space(100, 64, window=window, radius=4.0)
    assert bounded.regime.removeprefix("vacuous (").rstrip(")") == "norm-bounded"


def test_keys_that_no_format_can_represent_are_noted():
    assert "16-bit" in floors.space(10**6, 2).constants["note"]
    assert "note" not in floors.space(10**6, 64).constants and "note" not in floors.space(100, 2).constants
