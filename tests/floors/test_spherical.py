"""Codes on spheres: counted as they are built, with the gaps that are claimed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfloor import floors
from kvfloor.floors import spherical
from kvfloor.floors.spherical import level_gaps, log_cap_share, torus_codes
from kvfloor.game.keys import tori
from kvfloor.game.keys.gaps import one_sided_gaps
from tests.floors.test_coherence import cap_share

LEVELS = (0, 7, 31, 32, 33, 50, 64, 83, 110)
MOST_BUILT = 3_000


@pytest.mark.parametrize("d", [2, 3, 8, 32, 64])
@pytest.mark.parametrize("cosine", [0.0, 0.05, 0.2, 0.6, 0.95, 0.999])
def test_the_share_of_a_cap_is_bounded_from_above_and_closely(d: int, cosine: float) -> None:
    true, bound = cap_share(d, cosine), math.exp(log_cap_share(d, 1 - cosine))
    assert true * (1 - 1e-6) <= bound <= true * (1 + 1e-6 if cosine > 0.1 else 1.2)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_torus_codes_are_as_large_as_counted_and_have_their_gap(d: int) -> None:
    built = 0
    for level in LEVELS:
        count = torus_codes(d).count[level]
        if count > MOST_BUILT:
            break
        keys = tori._code(d, level)
        assert keys.shape == (count, d)
        assert torch.allclose(keys.norm(dim=1), torch.ones(len(keys), dtype=torch.float64), atol=1e-12)
        assert one_sided_gaps(keys).min() >= level_gaps()[level] - 1e-12
        built += 1
    assert built >= 3


def too_near(gap: np.ndarray, shift: float) -> np.ndarray:
    """Put layers at nine tenths of the angle that they need."""
    return spherical_latitudes(gap * 0.8, shift)


def undivided(gap: np.ndarray, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give the codes of a layer the gap of the whole code, as if their radius were 1."""
    return spherical_levels(gap + 0 * phi, 0 * phi)[0], spherical_levels(gap + 0 * phi, 0 * phi)[0]


spherical_latitudes, spherical_levels = spherical.latitudes, spherical.inner_levels


@pytest.mark.parametrize(("name", "mutant"), [("latitudes", too_near), ("inner_levels", undivided)])
def test_a_wrong_layer_breaks_the_gap(name: str, mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (spherical, tori):
        monkeypatch.setattr(module, name, mutant)
    torus_codes.cache_clear()
    try:
        keys, level = tori._code(4, 83), 83
        assert one_sided_gaps(keys).min() < level_gaps()[level] - 1e-3
    finally:
        torus_codes.cache_clear()


@given(st.integers(2, 80), st.floats(1e-5, 1.0), st.floats(1.0, 3.0))
def test_more_dimensions_have_no_fewer_keys_and_larger_gaps_no_more(d: int, gap: float, factor: float) -> None:
    here = floors.log_packing_count(d, gap)
    assert floors.log_packing_count(d + 1, gap) >= here
    assert floors.log_packing_count(d, min(1.0, gap * factor)) <= here + 1e-9
    assert here >= math.log(2 * d)


def test_no_more_keys_are_claimed_than_exist() -> None:
    """The kissing numbers: keys at an angle of 60 degrees, the most that exist."""
    most = {2: 6, 3: 12, 4: 24, 8: 240}
    claimed = {d: math.exp(floors.log_packing_count(d, 0.5)) for d in most}
    assert all(claimed[d] <= most[d] * (1 + 1e-9) for d in most)
    assert floors.log_packing_count(2, 0.48) == pytest.approx(math.log(6))


@pytest.mark.parametrize(("n", "d"), [(3, 2), (41, 3), (300, 8), (1000, 20)])
def test_keys_of_the_game_are_so_many_and_wide(n: int, d: int) -> None:
    keys = tori.torus_keys(n, d)
    assert keys.shape == (n, d) and one_sided_gaps(keys).min() > 0
    with pytest.raises(ValueError, match="is too many"):
        tori.torus_keys(10**30, d)
