"""Key families: norms, closed forms and gaps against naive loops."""

import math

import pytest
import torch

from kvfloor import floors
from kvfloor.game.keys.codes import chirp_parameters, primes_up_to, reed_solomon_parameters
from kvfloor.game.keys.families import FAMILIES, jl_dimension
from kvfloor.game.keys.gaps import best_family, one_sided_gaps, promised_gaps


def naive_gap(keys, i):
    """|k_i|^2 less the largest inner product with any other key, in plain Python."""
    rows = keys.tolist()
    own = math.fsum(x * x for x in rows[i])
    others = [row for j, row in enumerate(rows) if j != i]
    return own - max(math.fsum(a * b for a, b in zip(rows[i], row, strict=True)) for row in others)


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_norm_and_determinism(family):
    keys = FAMILIES[family](40, 34, 5)
    assert keys.shape == (40, 34)
    assert keys.dtype == torch.float64
    assert torch.equal(keys, FAMILIES[family](40, 34, 5))
    if family != "jl":
        assert torch.allclose(keys.norm(dim=1), torch.ones(40, dtype=torch.float64), atol=1e-12)
    explicit = torch.equal(keys, FAMILIES[family](40, 34, 6))
    assert explicit is (family in ("chirp", "reed_solomon", "hypercube", "tori"))


def test_families_draw_from_their_own_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for family in FAMILIES.values():
        family(10, 20, 7)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("family", FAMILIES)
def test_gaps_equal_the_naive_loop(family):
    keys = FAMILIES[family](30, 34, 5)
    rows = torch.tensor([29, 3, 0])
    expected = torch.tensor([naive_gap(keys, i) for i in rows.tolist()], dtype=torch.float64)
    assert torch.allclose(one_sided_gaps(keys, rows), expected, atol=1e-12)
    assert torch.allclose(one_sided_gaps(keys)[rows], expected, atol=1e-12)


def test_a_single_key_stands_out_by_its_whole_norm():
    assert one_sided_gaps(torch.tensor([[3.0, 4.0]])).tolist() == [25.0]


@pytest.mark.parametrize(("n", "d"), [(49, 14), (343, 14), (961, 62), (1024, 64)])
def test_chirp_keeps_weils_bound(n, d):
    code = chirp_parameters(n, d)
    assert code is not None
    keys = FAMILIES["chirp"](n, d, 0)
    worst = (keys @ keys.T - 2 * torch.eye(n)).max().item()
    assert worst <= floors.mu_chirp(*code) + 1e-12


@pytest.mark.parametrize(("n", "d"), [(20, 23), (200, 100), (1000, 120)])
def test_reed_solomon_keeps_its_bound(n, d):
    code = reed_solomon_parameters(n, d)
    assert code is not None
    keys = FAMILIES["reed_solomon"](n, d, 0)
    products = keys @ keys.T - 2 * torch.eye(n)
    assert products.max().item() <= floors.mu_reed_solomon(code[1], code[2]) + 1e-12
    assert keys.min().item() >= 0.0


@pytest.mark.parametrize(
    ("n", "d", "code"), [(256, 64, (31, 2)), (1024, 64, (31, 3)), (65536, 64, (31, 4)), (9, 4, None)]
)
def test_chirp_parameters_by_the_table(n, d, code):
    assert chirp_parameters(n, d) == code


def test_hypercube_gap_is_exact():
    gaps = one_sided_gaps(FAMILIES["hypercube"](64, 10, 0))
    assert torch.allclose(gaps, torch.full((64,), floors.gap_hypercube(6), dtype=torch.float64), atol=1e-12)


def test_packing_beats_a_random_sphere_and_is_the_circle_in_the_plane():
    packed, drawn = (one_sided_gaps(FAMILIES[family](200, 6, 1)).min() for family in ("packing", "sphere"))
    assert packed > 1.5 * drawn
    assert one_sided_gaps(FAMILIES["packing"](9, 2, 1)).min().item() == pytest.approx(floors.gap_circle(9))


def test_jl_keys_fall_short_of_their_theorem_at_real_widths():
    assert jl_dimension(1024) == 9242
    assert one_sided_gaps(FAMILIES["jl"](1024, 32, 0)).min() < 0


def test_primes():
    assert primes_up_to(30) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]


@pytest.mark.parametrize(("n", "d"), [(1024, 64), (256, 8), (30, 2), (2, 1), (20, 32), (70_000, 64), (100_000, 2)])
def test_the_best_family_is_no_worse_than_any_other(n, d):
    best = best_family(n, d)
    some = torch.arange(n)[:: max(1, n // 50)]
    worst = {
        name: one_sided_gaps(FAMILIES[name](n, d, 0), some if n > 2000 else None).min().item()
        for name in {best, *(promised_gaps(n, d) if n <= 2000 else ())}
    }
    assert worst[best] > 0
    assert worst[best] >= max(worst.values()) - 1e-12


def test_no_family_in_one_dimension():
    with pytest.raises(ValueError, match=r"n=3 keys that a query can tell apart in d=1"):
        best_family(3, 1)


def test_families_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="needs d of at least 5, got 4"):
        FAMILIES["hypercube"](17, 4, 0)
    with pytest.raises(ValueError, match="no chirp code"):
        FAMILIES["chirp"](10, 3, 0)
    with pytest.raises(ValueError, match="no Reed-Solomon code"):
        FAMILIES["reed_solomon"](10, 2, 0)
