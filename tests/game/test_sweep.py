"""Sweeps are the single games, one after the other."""

from kvfloor.floors import row_bits
from kvfloor.floors.norm_bounded import N_dr
from kvfloor.game import play
from kvfloor.game.sweep import packings, precision


def test_the_precision_sweep_leaves_the_diagonal_where_the_method_stops():
    exact, coarse = (precision(text, bits=(1, 4, 8, 12), n=64) for text in ("exact", "quant(bits=4)"))
    assert [point.hidden for point in exact] == [1, 4, 8, 12]
    assert all(point.hidden - 0.1 < point.certified <= point.hidden for point in exact)
    assert coarse[1].certified > 3.8
    assert coarse[3].certified < 5


def test_the_packing_sweep_is_a_grid_of_games():
    points = packings("window(block=1)@8", dimensions=(2, 4), radii=(8.0, 24.0), n=48, dv=16)
    assert [(point.d, point.radius) for point in points] == [(2, 8.0), (2, 24.0), (4, 8.0), (4, 24.0)]
    for point in points:
        game = play("exact", barrier="packing", n=48, d=point.d, dv=16, radius=point.radius, isolated=False)
        assert point.hidden_bits == game.hidden_bits
        assert point.certified_bits <= 8 * 16
        assert point.floor_bits == row_bits(int(min(48.0, N_dr(point.d, point.radius, 0.5))), 16, 0.9)
