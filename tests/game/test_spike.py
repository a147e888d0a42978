"""The spike: constants, direct sums over heads and layers, sampled rows, and the precision that a method keeps."""

import dataclasses
import math

import pytest
import torch

from kvfloor import Spec, floors, parse
from kvfloor.game import play
from kvfloor.game.engine.decode import leak_ratio
from kvfloor.game.engine.instance import agreed, keys_for
from kvfloor.game.engine.secret import Hidden
from kvfloor.game.instances import spike
from kvfloor.game.instances.spike import Spike
from kvfloor.game.keys.gaps import one_sided_gaps
from kvfloor.game.keys.public import aim
from tests.game.weighing import weights

PAID = math.log2(4) + 20  # for the best of four certificates, and for alpha = 2^-20


def instance_of(n=64, d=32, bits=1, eta=0.5, family=None, copies=1, dtype="float32", seed=0, dv=None):
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=seed, dtype=dtype)
    return Spike(**shared, n=n, public=keys_for(shared, n, family), copies=copies)


@pytest.mark.parametrize(("n", "d"), [(64, 32), (200, 16), (30, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize(("bits", "eta"), [(1, 0.5), (1, 0.0), (1, 0.9), (6, 0.5)])
def test_every_query_gives_its_key_all_but_the_allowed_leak(n, d, bits, eta):
    weight = weights(instance_of(n, d, bits, eta))
    assert weight.diagonal().min() >= 1 / (1 + leak_ratio(bits, eta)) - 1e-5
    assert weight.sum(dim=1).max() <= 1 + 1e-5


def test_a_mutant_with_half_the_query_length_leaks_too_much(monkeypatch):
    monkeypatch.setattr(spike, "spike_C", lambda *given: 0.5 * floors.spike_C(*given))
    assert weights(instance_of()).diagonal().min() < 1 / (1 + leak_ratio(1, 0.5)) - 0.01


@pytest.mark.parametrize(("n", "d", "dv"), [(300, 2, 8), (100, 3, 5), (256, 8, 4), (2, 1, 64), (1, 1, 64), (50, 64, 1)])
def test_exact_holds_in_every_dimension(n, d, dv):
    result = play("exact", n=n, d=d, dv=dv, isolated=False)
    assert (result.verdict, result.bit_error, result.row_success) == ("holds", 0.0, 1.0)
    assert result.certified_bits == pytest.approx(max(0.0, n * dv - PAID))
    assert (result.n, result.d, result.dv, result.rows_asked, result.alpha) == (n, d, dv, n, 2.0**-20)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 0.99])
def test_exact_holds_at_every_relative_error(eta):
    result = play("exact", n=128, d=32, bits=1, eta=eta, isolated=False)
    assert (result.verdict, result.row_success) == ("holds", 1.0)
    assert result.certified_bits == pytest.approx(128 * 32 - PAID)


@pytest.mark.parametrize("family", ["chirp", "reed_solomon", "sphere", "rademacher", "hypercube", "packing"])
def test_every_family_can_be_asked_for(family):
    result = play("exact", n=32, d=64, family=family, isolated=False)
    assert (result.verdict, result.details["family"]) == ("holds", family)
    gaps = one_sided_gaps(instance_of(32, 64, family=family).keys)
    assert result.details["worst_gap"] == pytest.approx(gaps.min().item())


@pytest.mark.parametrize("kept", [16, 32, 64])
def test_certified_bits_follow_what_is_kept(kept):
    result = play(f"window(block=1)@{kept}", n=128, d=64, isolated=False)
    assert result.certified_bits == pytest.approx(kept * 64 - PAID, abs=8)
    assert (result.verdict, result.row_success) == ("breaks", kept / 128)
    assert result.certified_bits < result.floor_bits == floors.row_bits(128, 64, 0.9)


def test_window_certifies_the_quarter_it_keeps():
    result = play("window@256", n=1024, d=64, isolated=False)
    assert result.certified_bits == pytest.approx(65_536 / 4, rel=0.01)
    assert result.certified_bits <= 65_536 / 4
    assert result.live_certified_bits == result.certified_bits
    assert (result.verdict, result.row_success) == ("breaks", 0.25)


# ---- heads and layers -----------------------------------------------------------------------------------------------


def test_heads_and_layers_are_a_direct_sum():
    one, six = (play("exact", n=48, d=32, isolated=False, **copies) for copies in ({}, {"heads": 3, "layers": 2}))
    assert six.hidden_bits == 6 * one.hidden_bits == 6 * 48 * 32
    assert six.certified_bits == pytest.approx(6 * 48 * 32 - PAID)
    assert six.floor_bits == pytest.approx(6 * one.floor_bits)
    assert (six.rows_asked, six.n, six.verdict) == (6 * 48, 48, "holds")


def test_every_head_hides_values_of_its_own_and_loses_its_own():
    result = play("random(block=1)@12", n=48, d=32, heads=8, isolated=False)
    assert result.row_success == pytest.approx(0.25)
    assert result.certified_bits == pytest.approx(8 * 12 * 32 - PAID, abs=40)
    levels = Hidden(1).levels(8 * 48, 32, 1).view(8, 48, 32)
    assert all(not torch.equal(levels[0], levels[head]) for head in range(1, 8))


def test_a_mutant_that_asks_the_first_head_for_everything_is_rejected(monkeypatch):
    by_reading = spike.by_reading
    monkeypatch.setattr(spike, "by_reading", lambda state, copy, queries: by_reading(state, 0 * copy, queries))
    result = play("exact", n=48, d=32, heads=4, isolated=False)
    assert (result.verdict, result.row_success) == ("breaks", 0.25)


def test_rows_are_sampled_across_heads_with_the_certificate_of_samples():
    result = play("exact", n=100, d=32, heads=2, rows=150, isolated=False)
    assert (result.rows_asked, result.certificate) == (150, "sampled rows")
    e = 1 - (2.0**-21) ** (1 / 150)  # no wrong row among 150
    assert result.certified_bits == pytest.approx(200 * (32 * (1 - e) - floors.H2(e)) - 21)
    lost = play("window(block=1)@50", n=100, d=32, heads=2, rows=150, isolated=False)
    assert lost.row_success == pytest.approx(0.5, abs=0.15)
    assert lost.certified_bits < 2 * 50 * 32


# ---- precision ------------------------------------------------------------------------------------------------------

PRECISION = [
    ("exact", {"bits": 24}, 23.9, 24.0),
    ("exact", {"bits": 16, "dtype": "float16"}, 10.8, 11.5),
    ("exact", {"bits": 16, "dtype": "bfloat16"}, 7.8, 8.5),
    ("quant(bits=8)", {"bits": 8}, 7.0, 8.0),
    ("quant(bits=4)", {"bits": 4}, 3.8, 4.0),
    ("quant(bits=4)", {"bits": 8}, 2.5, 4.5),
    ("quant(bits=2)", {"bits": 2}, 1.4, 2.0),
    ("quant(bits=2)", {"bits": 4}, 1.4, 2.0),
]


@pytest.mark.parametrize(("text", "given", "least", "most"), PRECISION)
def test_fine_values_read_out_the_precision_that_is_kept(text, given, least, most):
    result = play(text, n=128, d=32, isolated=False, **given)
    assert least <= result.bits_per_value <= most
    assert result.bits_per_value == pytest.approx(result.certified_bits / (128 * 32))
    assert result.certified_bits <= 8 * result.payload_bytes


def test_coarse_answers_to_fine_values_break_and_exact_ones_hold():
    assert play("exact", n=64, d=32, bits=16, isolated=False).bit_error == 0.0
    coarse = play("quant(bits=4)", n=64, d=32, bits=8, isolated=False)
    assert coarse.verdict == "breaks"
    assert 2.5 * 64 * 32 < coarse.certified_bits < 4.5 * 64 * 32


# ---- aiming ---------------------------------------------------------------------------------------------------------


def test_queries_are_public_numbers_in_steps_that_float_noise_does_not_move():
    instance = instance_of(100, 32, family="sphere")
    queries, gaps = instance.queries(torch.arange(100))
    keys = instance.keys.double()
    lengths = (queries.double() * keys).sum(dim=1) / keys.square().sum(dim=1)
    assert torch.allclose(64 * lengths, (64 * lengths).round(), atol=1e-3)
    exact = [floors.spike_C(100, 0, min(gap, 1.0), 1.0, 0.125) for gap in gaps.tolist()]
    over = lengths - torch.tensor(exact, dtype=torch.float64)
    assert over.min() > -1e-4 and over.max() < 1 / 64 + 1e-4
    some = torch.tensor([7, 7, 3])
    assert torch.equal(instance.queries(some)[0], queries[some])


def test_queries_undo_the_specs_scale():
    keys, spec = torch.eye(4), Spec(rows=1, d=4, dv=1, scale=0.25)
    queries, gaps = aim(keys, torch.arange(4), spec, lambda gap, norm: 3.0)
    assert torch.equal(queries, 12.0 * keys)
    assert gaps.tolist() == [1.0] * 4


def test_keys_that_no_query_singles_out_are_refused():
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"some of the 3 keys in d=2 dimensions cannot be singled out.*worst gap 0"):
        aim(keys, torch.arange(3), Spec(rows=1, d=2, dv=1), lambda gap, norm: 1.0)


def test_the_stream_is_the_public_keys_with_hidden_levels_between_0_and_1():
    instance = dataclasses.replace(instance_of(40, 32, bits=3), copies=2)
    state, levels = parse("exact").open(instance.spec()), Hidden(1).levels(80, 32, 3)
    instance.feed(state, levels, Hidden(1))
    view = state.slots.view()  # type: ignore[attr-defined]
    assert torch.equal(view.k, instance.keys.expand(2, -1, -1))
    assert torch.equal(view.v, (levels.double() / 7).float().view(2, 40, 32))
    assert state.sealed


@pytest.mark.slow
def test_a_long_context_is_certified_within_a_minute():
    result = play("exact", n=65_536, d=128)
    print(f"n=65536, d=128: {result.seconds:.1f} s of play, {result.certified_bits / result.hidden_bits:.4f} certified")
    assert result.verdict == "holds"
    assert result.certified_bits > 0.98 * result.hidden_bits
    assert result.seconds < 60
