"""The floor of a result is that of the values really hidden: coarse answers need less, fine ones more."""

import pytest

from kvfloor import floors
from kvfloor.game import play
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.play import play_index
from kvfloor.game.engine.result import conclude
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances.spike import Spike
from tests.game.coarse import Coarse

N, D = 512, 32


def coarse(bits, eta, told=None):
    """Play the coarse method for (bits, eta), made for the relative error `told` (eta unless given)."""
    shared = agreed(d=D, dv=None, bits=bits, eta=eta, seed=0)
    instance = Spike(**shared, n=N, public=keys_for(shared, N))
    public = instance.public
    method = Coarse(public.family, N, public.seed, bits, eta if told is None else told)
    return conclude(play_index(method, instance, Hidden(1), isolated=False), instance, seed=0)


@pytest.mark.parametrize("eta", [0.97, 0.95, 0.92])
@pytest.mark.parametrize("bits", [6, 8])
def test_coarse_answers_hold_with_fewer_bits_than_one_bit_values_need_and_never_below_their_floor(bits, eta):
    result = coarse(bits, eta)
    assert (result.verdict, result.row_success) == ("holds", 1.0)
    assert 8 * result.payload_bytes < floors.space(N, D, values="binary").bits  # what the result called a floor once
    assert 0.0 < result.floor_bits < 8 * result.payload_bytes
    assert result.certified_bits <= 8 * result.message_bytes
    assert result.certificate == "rows" and result.certified_bits > result.floor_bits


def test_answers_coarser_than_allowed_break():
    result = coarse(8, 0.9, told=0.95)
    assert (result.verdict, result.certified_bits) == ("breaks", 0.0)


def test_exact_answers_need_all_bits_that_are_hidden():
    result = play("exact", n=128, d=32, bits=8, eta=0.0, isolated=False)
    assert (result.verdict, result.row_success) == ("holds", 1.0)
    assert result.floor_bits == pytest.approx(128 * (0.9 * 8 * 32 - floors.H2(0.9)))
    assert result.floor_bits > 7.9 * floors.space(128, 32, values="binary").bits


def test_fine_values_at_half_relative_error_need_a_little_more_than_single_bits():
    played = play("exact", n=64, d=32, bits=12, isolated=False)
    assert 1.0 < played.floor_bits / floors.space(64, 32, values="binary").bits < 1.05


def test_the_smallest_method_reaches_the_floor_that_is_played():
    for bits in (1, 3, 8):
        best = play("optimum", n=96, d=32, bits=bits, eta=0.0, isolated=False)
        assert best.floor_bits == pytest.approx(8 * best.payload_bytes * 0.9 - 96 * floors.H2(0.9), rel=1e-9)


# ---- no method holds below its floor ---------------------------------------------------------------------------------


def test_a_message_below_the_floor_cannot_hold_by_spoiling_whole_rows(planted):
    """All bits of 24 rows of 256 are wrong and no answer looks sure: single bits certify about half of the floor."""
    result = planted("Lies", n=256, d=64, isolated=False)
    assert result.row_success == pytest.approx(1.0 - 24 / 256) and result.row_success > 0.9
    assert 8 * result.message_bytes < 0.85 * result.floor_bits
    assert result.bit_error == pytest.approx(24 / 256)
    assert (result.verdict, result.certificate) == ("cheats", "rows")
    assert result.floor_bits - 22.0 <= result.certified_bits <= result.hidden_bits


def test_with_the_floors_bits_the_same_answers_hold(planted):
    result = planted("Lies(idle=1900)", n=256, d=64, isolated=False)
    assert result.verdict == "holds" and 8 * result.message_bytes > result.floor_bits


@pytest.mark.parametrize("eta", [0.2, 0.5])
def test_certified_bits_of_what_holds_are_no_fewer_than_the_floor_less_the_payments(eta):
    for bits in (1, 4, 8):
        for method in ("exact", "quant(bits=8)"):
            result = play(method, n=96, d=32, bits=bits, eta=eta, isolated=False)
            if result.verdict == "holds":
                assert result.certified_bits >= result.floor_bits - 22.0
            else:
                assert (result.verdict, method) == ("breaks", "quant(bits=8)")
