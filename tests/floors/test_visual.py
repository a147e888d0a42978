"""Visual autoregression's floor: pyramids counted, and a whole map of spikes decoded by one softmax."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfloor import floors

ETA = 0.5


def test_pyramids_by_hand():
    assert floors.pyramid(16) == (1, 2, 4, 8, 16)
    assert floors.pyramid(24) == (1, 3, 6, 12, 24)
    assert floors.pyramid(9, 3) == (1, 3, 9)
    assert floors.pyramid(3, 1.01) == (1, 2, 3)
    assert floors.pyramid(1) == (1,)
    assert floors.visual_rows(floors.pyramid(16)) == 1 + 4 + 16 + 64 + 256 == 341
    assert floors.visual_rows(floors.pyramid(16), last_asks=True) == 85
    assert floors.visual_rows((1, 2, 4, 8, 16, 24)) == 917


@pytest.mark.parametrize("ratio", [2, 3, 5])
@pytest.mark.parametrize("scales", [1, 2, 5])
def test_closed_form_of_a_whole_ratio(ratio, scales):
    side = ratio ** (scales - 1)
    sides = floors.pyramid(side, ratio)
    assert floors.pyramid_tokens(side, ratio) == pytest.approx(floors.visual_rows(sides))
    assert floors.pyramid_tokens(side, ratio, before_last=True) == pytest.approx(
        floors.visual_rows(sides, last_asks=True)
    )


@given(st.integers(1, 5000), st.floats(1.01, 10.0), st.floats(1.0, 2.0))
def test_pyramids_stay_below_the_geometric_sum_and_are_monotone(n, ratio, factor):
    tokens = floors.visual_rows(floors.pyramid(n, ratio))
    strictly = n * (n + 1) * (2 * n + 1) // 6  # no side repeats
    assert tokens <= strictly
    if ratio >= 2.0:  # then no side has to shrink faster than by the ratio
        assert tokens <= n**2 * ratio**2 / (ratio**2 - 1) + 1  # a side never shrinks below 1
    assert floors.visual_rows(floors.pyramid(n + 1, ratio)) >= tokens
    assert floors.visual_rows(floors.pyramid(n, ratio * factor)) <= tokens


def map_of_spikes(sides, asking: int, d: int, C: float, keys: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor):
    """Answers of one map of `asking` zero tokens whose queries are spikes at `rows`, and the weights on those."""
    k = torch.cat([keys, torch.zeros(asking, d, dtype=torch.float64)])
    v = torch.cat([hidden, torch.zeros(asking, hidden.shape[1], dtype=torch.float64)])
    weights = torch.softmax(C * keys[rows] @ k.T, dim=1)
    return weights @ v, weights[torch.arange(len(rows)), rows]


@pytest.mark.parametrize("last_asks", [False, True])
def test_a_whole_map_reads_as_many_rows_at_once(last_asks):
    sides, d, dv = (1, 2, 4, 6), 32, 9
    rows, asking = floors.visual_rows(sides, last_asks=last_asks), sides[-1] ** 2
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)
    hidden = torch.randint(0, 2, (rows, dv), generator=generator).double()
    gap = 1 - (keys @ keys.T).fill_diagonal_(-1).max().item()
    C = floors.visual_C(rows, asking, gap, floors.eps_s(ETA))
    for asked in torch.arange(rows).split(asking):
        answers, on_spike = map_of_spikes(sides, asking, d, C, keys, hidden, asked)
        assert torch.equal((answers > floors.tau(ETA, floors.eps_s(ETA))).double(), hidden[asked])
        assert ((1 - on_spike) / on_spike).max() <= floors.eps_s(ETA)


@given(st.integers(1, 10**5), st.integers(1, 10**4), st.floats(0.01, 2.0), st.floats(0.001, 0.9))
def test_the_leak_of_the_worst_competitors(rows, asking, g, eps_s):
    C = floors.visual_C(rows, asking, g, eps_s)
    assert (rows - 1) * math.exp(-C * g) + asking * math.exp(-C) <= eps_s * (1 + 1e-9)


def test_the_mutant_that_forgets_the_asking_map_leaks():
    C = floors.spike_C(85, 1, 1.0, 1.0, 0.125)
    assert 84 * math.exp(-C) + 256 * math.exp(-C) > 0.125


def test_a_map_that_asks_hides_nothing():
    """Its own keys and values are zero: a mutant that counts its rows counts 256 too many."""
    floor = floors.visual_space(16, 64, last_asks=True, values="binary")
    assert floor.constants["rows"] == 85
    assert floor.constants["C"] == pytest.approx(math.log((84 + 256) / 0.125) / floors.gap_known(85, 64))
    assert floor.bits == floors.visual_space(16, 64, values="binary").constants["bits_if_the_last_map_asks"]
    assert floors.visual_space(1, 64, last_asks=True).regime == "vacuous (visual pyramid)"


def test_space_by_hand():
    row = 0.9 * 64 - floors.H2(0.9)
    floor = floors.visual_space(16, 64, values="binary")
    assert floor.bits == pytest.approx(341 * row)
    assert floor.upper_bits == 341 * 64
    assert floor.constants["exact_bytes_fp16"] == 341 * 128 * 2
    assert floor.constants["C"] == pytest.approx(math.log((340 + 256) / 0.125) / floors.gap_known(341, 64))
    assert floors.visual_space(24, 64, sides=(1, 2, 4, 8, 16, 24), values="binary").bits == pytest.approx(917 * row)
    assert floors.visual_space(16, 1, 64).constants["rows"] == 2
    assert floors.visual_space(16, 64, heads=2, layers=3, values="binary").bits == pytest.approx(6 * floor.bits)
    largest = floors.visual_space(512, 64, values="binary").bits / (512**2 * 64)
    assert largest == pytest.approx(4 / 3 * row / 64, rel=1e-5)  # a^2/(a^2 - 1) for a = 2


def test_values_of_a_format_hide_as_many_levels_as_answers_tell_apart():
    floor = floors.visual_space(16, 64, eta=0.1)
    assert floor.bits == pytest.approx(341 * (0.9 * 64 * math.log2(133) - floors.H2(0.9)))
    assert floor.constants["C"] > 4 * floors.visual_space(16, 64, eta=0.1, values="binary").constants["C"]


@settings(deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 200), st.integers(1, 100), st.floats(1.1, 8.0), st.booleans(),
    st.floats(0.0, 0.99), st.floats(0.01, 1.0), st.integers(1, 100),
)  # fmt: skip
def test_monotone_in_every_argument_and_below_what_suffices(n, d, dv, ratio, last_asks, eta, p, more):
    def bits(**changed):
        given_arguments = {"n": n, "d": d, "dv": dv, "ratio": ratio, "last_asks": last_asks, "eta": eta, "p": p}
        return floors.visual_space(**(given_arguments | changed)).bits

    here, slack = bits(), 1 + 1e-9
    for changed in ({"n": n + more}, {"d": d + more}, {"dv": dv + more}, {"eta": 0.0}, {"p": 1.0}, {"heads": 2},
                    {"layers": 2}, {"last_asks": False}, {"ratio": 1.05}):  # fmt: skip
        assert bits(**changed) * slack >= here
    floor = floors.visual_space(n, d, dv, ratio=ratio, last_asks=last_asks, eta=eta, p=p)
    assert 0.0 <= floor.bits <= floor.upper_bits * slack
    assert floor.bits <= min(memory.bits for memory in floor.possible) * slack
